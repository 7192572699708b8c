# SPDX-License-Identifier: Apache-2.0
"""The commands as functions, for notebooks: `jaxrlhf.dpo(model=..., data=..., beta=0.1)`.

Any key is a keyword, dotted ones as `**{"optim.learning_rate": 1e-4}`; TRL's names work too. Wrong
settings raise ConfigError with everything that is wrong; nothing here exits the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

File = str | os.PathLike[str]


class Run:
    """What a command left behind: its directory, exit code and figures; a model to talk to."""

    def __init__(self, result: Any):
        self._result = result

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._result.path

    def __fspath__(self) -> str:
        """A run stands where a model or a run directory is asked for."""
        return os.fspath(self.path.resolve())

    @property
    def exit_code(self) -> int:
        """0 if everything planned was done."""
        return int(self._result.exit_code)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first; of commands without one, their figures."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return [dict(self._result.metrics)]
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: steps, final metrics, seconds, memory, digests."""
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    def generate(self, prompt: str | list[str], **sampling: Any) -> Any:
        """Completions by the model of this run: a text for a text, a list for a list.

        Args:
            sampling: temperature, top_k, top_p, min_p, max_new_tokens, stop.
        """
        from jaxrlhf.cli import prepare
        from jaxrlhf.config.load import load

        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        keys = {"model.path": os.fspath(self.path.resolve()), "prompt": texts}
        keys |= {f"sampling.{name}": value for name, value in sampling.items()}
        config = load("generate", keywords=keys)
        prepare(config)
        from jaxrlhf.parallel.mesh import make_mesh
        from jaxrlhf.parallel.rules import use_mesh
        from jaxrlhf.stages.generate import completions_of

        with use_mesh(make_mesh(**config.mesh.sizes)) as mesh:
            found = completions_of(config, mesh).texts
        return found[0] if isinstance(prompt, str) else found

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, exit_code={self.exit_code})"


class Loaded:
    """A model that stays open. Adapters on it are swapped without reading the base again, and run
    the programs that others of their shape compiled:

        base = jaxrlhf.load("runs/base")
        terse, kind = base.with_adapter("runs/terse"), base.with_adapter("runs/kind")
        terse.generate("Where is my order?"), kind.generate("Where is my order?")
    """

    def __init__(self, loaded: Any, keys: dict[str, Any]):
        self._loaded, self._keys = loaded, keys

    def with_adapter(self, folder: File) -> Loaded:
        """The base of this model with another adapter: of a finished run, or a PEFT folder.

        Raises:
            ModelError: it is no adapter, or was trained on other weights.
        """
        return Loaded(self._loaded.with_adapter(os.fspath(folder)), self._keys)

    def generate(self, prompt: str | list[str], **sampling: Any) -> Any:
        """Completions: a text for a text, a list for a list.

        Args:
            sampling: temperature, top_k, top_p, min_p, max_new_tokens, stop.
        """
        from jaxrlhf.config.load import load as read

        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        keys = {f"sampling.{name}": value for name, value in sampling.items()}
        found = self._loaded.generate(
            read("generate", keywords={**self._keys, "prompt": texts, **keys})
        )
        return found[0] if isinstance(prompt, str) else found

    def score(self, prompt: str | list[str], completion: str | list[str], **keys: Any) -> Any:
        """Log-probs of completions, nats, summed over tokens; of a reward model its rewards. A
        number for a text, a list for a list.

        Args:
            keys: max_length, append_eos (true for a reward model's finished texts), batch_size.
        """
        from jaxrlhf.config.load import load as read

        single = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        completions = [completion] if isinstance(completion, str) else list(completion)
        config = read("score", keywords={**self._keys, "data": ["none"], **keys})
        found = self._loaded.score(config, prompts, completions)
        return found[0] if single else found

    def __repr__(self) -> str:
        return f"Loaded({self._loaded.model.source!r})"


def load(model: File, **keys: Any) -> Loaded:
    """Opens a model once, to generate and score with it and with adapters of it; see `Loaded`.

    Args:
        model: a run, a folder or a hub name.
        keys: e.g. `**{"model.dtype": "bfloat16", "mesh.fsdp": 8}`.
    """
    from jaxrlhf.cli import prepare
    from jaxrlhf.config.load import load as read

    keys = {"model.path": os.fspath(model), **keys}
    config = read("generate", keywords={**keys, "prompt": ["x"]})
    prepare(config)
    from jaxrlhf.parallel.mesh import make_mesh
    from jaxrlhf.stages import loaded

    return Loaded(loaded.load(config, make_mesh(**config.mesh.sizes)), keys)


def stage(
    command: str,
    config: File | Iterable[File] = (),
    *,
    output: File | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
    **keys: Any,
) -> Run:
    """Runs any command of the command line, as `jaxrlhf COMMAND` does.

    Args:
        command: `sft`, `reward`, `dpo`, `ppo`, `generate`, `eval`, `"data show"`...
        config: YAML files, later ones override earlier ones; keywords override both.
        output: the run directory; None gives runs/<stage>-<time>. The same call with the same
            directory goes on where it stopped, or does nothing where it is finished.
        resume: "auto", "never" or a run directory, for stages that train.
        allow_change: keys that may differ from those a resumed run began with.
        dry_run: check settings, data and memory, of stages that train; compute nothing.
        keys: settings, as `jaxrlhf COMMAND --help` lists them: nested, `optim={"name": "sgd"}`,
            dotted, `**{"optim.learning_rate": 1e-4}`, or by TRL's names, `learning_rate=1e-4`.
            A model may be a `Run`. Data may be rows: a list of dicts or a `datasets.Dataset`, which
            are written into the run directory. A reward may be a function at the top of a file.

    Returns:
        A `Run`: `.path`, `.exit_code` (0 = everything planned was done), `.metrics`, `.summary`,
        `.generate("Hello")`.

    Raises:
        ConfigError: naming every setting that is wrong.
        DataError, ModelError, CheckpointError: what is read or resumed is not as it should be.
    """
    from jaxrlhf.cli import note, prepare, second_pass
    from jaxrlhf.config.load import load
    from jaxrlhf.config.python_values import settings_of
    from jaxrlhf.config.stages import TRAINING

    files = [config] if isinstance(config, str | os.PathLike) else list(config)
    if output is not None:
        keys["output_dir"] = os.fspath(output)
    paths = [os.fspath(file) for file in files]
    settings, rows = settings_of(command, keys)
    checked = load(command, paths, (), second_pass, keywords=settings, note=note)
    prepare(checked)
    from jaxrlhf.stages import run_stage

    extra: dict[str, Any] = {"rows": rows} if rows else {}
    if command in TRAINING:
        extra |= {"resume": resume, "allow_change": tuple(allow_change), "dry_run": dry_run}
    elif dry_run:
        extra["dry_run"] = True
    place: Any = checked.output_dir
    with contextlib.ExitStack() as stack:
        if rows and dry_run:  # which leaves nothing behind
            place = stack.enter_context(tempfile.TemporaryDirectory())
        return Run(run_stage(command, checked, output=place, **extra))


def pretrain(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """A language model on plain text, from fresh weights or continued.

        run = jaxrlhf.pretrain(
            model={"init": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_dim": 128},
                   "tokenizer": "tokenizer-folder"},
            data="text.jsonl", num_train_epochs=1, output="runs/base")

    Args:
        config: YAML files, if any.
        keys: settings, and `output`, `resume`, `dry_run`; see `help(jaxrlhf.stage)`, and
            `jaxrlhf pretrain --help` for all of them.

    Returns:
        A `Run`: `.path`, `.metrics`, `.summary`, `.generate("Hello")`.
    """
    return stage("pretrain", config, **keys)


def sft(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """Supervised fine-tuning on demonstrations.

        rows = [{"prompt": "2 + 2 =", "completion": " 4"}, ...]  # or "rows.jsonl", or a Dataset
        run = jaxrlhf.sft(model="path-or-name", data=rows, learning_rate=1e-5, output="runs/sft")
        print(run.metrics[-1], run.generate("2 + 3 ="))

    Args:
        config: YAML files, if any.
        keys: settings, and `output`, `resume`, `dry_run`; see `help(jaxrlhf.stage)`, and
            `jaxrlhf sft --help` for all of them.

    Returns:
        A `Run`: `.path`, `.metrics`, `.summary`, `.generate("Hello")`.
    """
    return stage("sft", config, **keys)


def reward(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """A reward model from comparisons.

        judge = jaxrlhf.reward(model="runs/sft", data="pairs.jsonl", output="runs/reward",
                               **{"data.eval_fraction": 0.1})
        print(judge.summary["metrics"])
        print(jaxrlhf.load(judge).score("Where is my order?", "On its way.", append_eos=True))

    Args:
        config: YAML files, if any.
        keys: settings, and `output`, `resume`, `dry_run`; see `help(jaxrlhf.stage)`, and
            `jaxrlhf reward --help` for all of them. data: rows of prompt, chosen and rejected, or
            rankings or ratings.

    Returns:
        A `Run`: `.path`, `.metrics`, `.summary`.
    """
    return stage("reward", config, **keys)


def dpo(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """A policy straight from comparisons, by DPO or another preference loss (loss.name).

        run = jaxrlhf.dpo(model="path-or-name", data="pairs.jsonl", learning_rate=5e-6, beta=0.1)
        print(run.metrics[-1], run.generate("Hello"))

    Args:
        config: YAML files, if any.
        keys: settings, and `output`, `resume`, `dry_run`; see `help(jaxrlhf.stage)`, and
            `jaxrlhf dpo --help` for all of them. data: rows of prompt, chosen and rejected.

    Returns:
        A `Run`: `.path`, `.metrics`, `.summary`, `.generate("Hello")`.
    """
    return stage("dpo", config, **keys)


def ppo(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """A policy by reinforcement learning: PPO, or another estimator (rl.advantage).

        from rewards import short  # def short(prompts, completions, **columns): -> list of floats
        run = jaxrlhf.ppo(model="runs/sft", data="prompts.jsonl", reward=short, kl_coef=0.05,
                          **{"train.steps": 100, "sampling.max_new_tokens": 64})

    Args:
        config: YAML files, if any.
        keys: settings, and `output`, `resume`, `dry_run`; see `help(jaxrlhf.stage)`, and
            `jaxrlhf ppo --help` for all of them. data: rows with a prompt. reward: a reward model,
            or a function at the top of a file (itself, or "file.py:name"), or a list of them.

    Returns:
        A `Run`: `.path`, `.metrics`, `.summary`, `.generate("Hello")`.
    """
    return stage("ppo", config, **keys)


def generate(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """Completions for prompts, printed or as rows of completions.jsonl in the run directory.

        jaxrlhf.generate(model="runs/dpo", prompts="prompts.jsonl", n=4, output="runs/said")

    `Run.generate` and `load(model).generate` return texts instead. See `help(jaxrlhf.stage)`.
    """
    return stage("generate", config, **keys)


def score(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """Log-probs or rewards of given completions, as rows of scores.jsonl in the run directory.

        jaxrlhf.score(model="runs/reward", data="completions.jsonl", append_eos=True)

    `load(model).score` returns numbers instead. See `help(jaxrlhf.stage)`.
    """
    return stage("score", config, **keys)


def evaluate(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """The `eval` command: figures of one model with intervals, in eval.json and `.metrics`.

        run = jaxrlhf.evaluate(model="runs/dpo", data={"eval": "held-out.jsonl"})

    See `help(jaxrlhf.stage)`.
    """
    return stage("eval", config, **keys)


def export(config: File | Iterable[File] = (), **keys: Any) -> Run:
    """A model as an HF folder, or its adapter as a PEFT folder: export/ in the run directory.

        folder = jaxrlhf.export(model="runs/dpo", format="merged").path / "export"

    See `help(jaxrlhf.stage)`.
    """
    return stage("export", config, **keys)


def run(
    pipeline: File | Iterable[File],
    *overrides: str,
    output: File | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
) -> Any:
    """Runs the stages of a pipeline that are not finished.

        jaxrlhf.run("configs/pipelines/quickstart.yaml", "seed=1", "ppo.train.steps=10")

    Args:
        pipeline: a file or several, later ones override earlier ones.
        overrides: `NAME.key=value` for the stage NAME, `seed=`, `defaults.key=`.
        output: the directory; None gives the one that the pipeline names.
        resume: "auto", or "never" to run every stage anew.
        allow_change: keys that may differ from those a resumed stage began with.
        dry_run: say what would be run, and run nothing.

    Returns:
        `.path`, `.exit_code` and a record of each stage in `.stages`.
    """
    from jaxrlhf.cli import note, prepare, second_pass
    from jaxrlhf.config.pipeline import load_pipeline

    files = [pipeline] if isinstance(pipeline, str | os.PathLike) else list(pipeline)
    if output is not None:
        overrides = (*overrides, f"output_dir={os.fspath(output)}")
    paths = [os.fspath(file) for file in files]
    plan = load_pipeline(paths, overrides, second_pass, note=note)
    prepare(*(planned.config for planned in plan.stages))
    from jaxrlhf.pipeline import run_pipeline

    return run_pipeline(
        plan,
        output=plan.output_dir,
        resume=resume,
        allow_change=tuple(allow_change),
        dry_run=dry_run,
    )


def write_report(*runs: File, output: File | None = None) -> Path:
    """The `report` command: one HTML page of one or several runs; returns where it is.

        jaxrlhf.write_report("runs/dpo", "runs/ppo", output="compared.html")

    Args:
        runs: run or pipeline directories, or what a command returned.
        output: the file, or a folder for report.html; None = the first run.
    """
    from jaxrlhf import report

    folders = [Path(run) for run in runs]
    return report.write_report(folders, Path(output) if output is not None else Path(*folders[:1]))
