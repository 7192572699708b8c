# SPDX-License-Identifier: Apache-2.0
"""The commands as functions, for notebooks: `jaxrlhf.dpo(model=..., data=..., beta=0.1)`.

Any key is a keyword, dotted ones as `**{"optim.learning_rate": 1e-4}`; TRL's names work too. Wrong
settings raise ConfigError with everything that is wrong; nothing here exits the interpreter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
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
    **keys: Any,
) -> Any:
    """Runs one command of the command line; returns its run (`.metrics`, `.generate(...)`, ...).

    Args:
        command: `sft`, `reward`, `dpo`, `ppo`, `generate`, `eval`...
        config: YAML files, later ones override earlier ones; keywords override both.
        output: the run directory; None gives runs/<stage>-<time>.
        resume: auto, never or a path, for stages that train.
    """
    from jaxrlhf.cli import note, prepare, second_pass
    from jaxrlhf.config.load import load
    from jaxrlhf.config.stages import TRAINING

    files = [config] if isinstance(config, str | os.PathLike) else list(config)
    if output is not None:
        keys["output_dir"] = os.fspath(output)
    paths = [os.fspath(file) for file in files]
    checked = load(command, paths, (), second_pass, keywords=keys, note=note)
    prepare(checked)
    from jaxrlhf.stages import run_stage

    extra: dict[str, Any] = {"resume": resume} if command in TRAINING else {}
    return Run(run_stage(command, checked, output=checked.output_dir, **extra))


def pretrain(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """A language model on plain text; see `stage`."""
    return stage("pretrain", config, **keys)


def sft(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """Supervised fine-tuning on demonstrations; see `stage`."""
    return stage("sft", config, **keys)


def reward(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """A reward model from comparisons; see `stage`."""
    return stage("reward", config, **keys)


def dpo(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """A policy straight from comparisons; see `stage`."""
    return stage("dpo", config, **keys)


def ppo(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """A policy by reinforcement learning; see `stage`."""
    return stage("ppo", config, **keys)


def generate(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """Completions for prompts; see `stage`."""
    return stage("generate", config, **keys)


def score(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """Log-probs or rewards of given completions; see `stage`."""
    return stage("score", config, **keys)


def evaluate(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """The `eval` command; see `stage`."""
    return stage("eval", config, **keys)


def export(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """A run as an HF folder; see `stage`."""
    return stage("export", config, **keys)


def report(config: File | Iterable[File] = (), **keys: Any) -> Any:
    """One HTML page of one or several runs; see `stage`."""
    return stage("report", config, **keys)


def run(pipeline: File, *overrides: str, resume: str = "auto") -> Any:
    """A pipeline file, with `NAME.key=value` overrides."""
    from jaxrlhf.cli import note, prepare, second_pass
    from jaxrlhf.config.pipeline import load_pipeline

    plan = load_pipeline(os.fspath(pipeline), overrides, second_pass, note=note)
    prepare(*(planned.config for planned in plan.stages))
    from jaxrlhf.pipeline import run_pipeline

    return run_pipeline(plan, output=plan.output_dir, resume=resume)
