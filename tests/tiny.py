# SPDX-License-Identifier: Apache-2.0
"""Fixtures of whole stages: a tiny world, tiny models made by the stages, and processes to kill."""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "max_positions": 96}
FEW = {"train.batch_size": 8, "data.max_length": 32}  # one bucket of lengths: one program
# What a resumed run repeats: everything but wall-clock time.
WALL = "time/"


def run(command: str, output: Path, resume: str = "auto", **keys: Any) -> Any:
    """One stage in this process, with dotted keys written as keywords."""
    from jaxrlhf import api

    return api.stage(command, output=output, resume=resume, **keys)


def words(command: str, output: Path, keys: dict[str, Any], *more: str) -> list[str]:
    """The same stage as words of the command line."""
    items = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items()]
    return [command, "--output", str(output), *items, *more]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's record without wall-clock things."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(WALL)}
        for line in lines
        if line["split"] == split
    ]


def record(folder: Path) -> dict[str, Any]:
    """Everything that must be equal between a run and the same run again."""
    summary = json.loads((folder / "summary.json").read_text())
    manifests = {}
    for file in sorted((folder / "checkpoints").glob("*/manifest.json")):
        found = json.loads(file.read_text())
        manifests[file.parent.name] = (found["content"], found["metrics"])
    samples = folder / "samples.jsonl"
    kept = ("content", "metrics", "steps_done", "steps_planned", "exit_reason", "parents")
    return {
        "summary": {name: summary.get(name) for name in kept},
        "export": [
            hashlib.sha256((folder / "export" / name).read_bytes()).hexdigest()
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        ],
        "metrics": metrics(folder) + metrics(folder, "eval"),
        "samples": samples.read_text() if samples.exists() else "",
        "checkpoints": manifests,
    }


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny world and models that the stages made on it; all paths."""

    folder: Path
    tokenizer: Path
    text: Path
    demonstrations: Path
    pairs: Path
    prompts: Path
    held_out: Path

    @property
    def base(self) -> dict[str, Any]:
        """Settings of the pretraining run that made `models.base`."""
        return {
            "model.init": SHAPE,
            "model.tokenizer": str(self.tokenizer),
            "data.train": str(self.text),
            "data.eval_fraction": 0.1,
            "train.steps": 12,
            "train.eval_every": 6,
            "train.save_every": 4,
            "optim.learning_rate": 0.02,
            "optim.schedule": "constant",
            **FEW,
            "train.batch_size": 16,
        }

    def sft(self, model: Path) -> dict[str, Any]:
        return {
            "model": str(model),
            "data.train": str(self.demonstrations),
            "data.eval_fraction": 0.2,
            "train.steps": 6,
            "train.eval_every": 3,
            "train.save_every": 2,
            "train.ema_decay": 0.5,
            "train.microbatch_size": 4,
            "optim.learning_rate": 0.01,
            **FEW,
        }

    def comparisons(self, model: Path) -> dict[str, Any]:
        """Settings of a reward model or of DPO."""
        return {
            "model": str(model),
            "data.train": str(self.pairs),
            "data.eval_fraction": 0.2,
            "train.steps": 6,
            "train.eval_every": 3,
            "train.save_every": 2,
            "optim.learning_rate": 0.01,
            **FEW,
        }

    def ppo(self, model: Path, reward: Path | str) -> dict[str, Any]:
        """Without held-out prompts: an evaluation compiles as much again."""
        return {
            "model": str(model),
            "reward": str(reward),
            "data.train": str(self.prompts),
            "data.max_length": 64,
            "train.steps": 3,
            "train.save_every": 1,
            "train.batch_size": 8,
            "train.microbatch_size": 2,
            "rl.critic": "shared",
            "rl.epochs": 2,
            "rl.minibatches": 2,
            "rl.samples_per_prompt": 2,
            "sampling.max_new_tokens": 12,
            "sampling.temperature": 0.7,
            "optim.learning_rate": 0.01,
        }

    def settings(self, stage: str, models: "Models") -> dict[str, Any]:
        """Those of a training stage."""
        if stage == "pretrain":
            return self.base
        if stage == "sft":
            return self.sft(models.base)
        if stage == "ppo":
            return self.ppo(models.base, models.judge)
        return self.comparisons(models.base)


@dataclasses.dataclass(frozen=True)
class Models:
    """Finished runs: a language model and a reward model of it."""

    base: Path
    judge: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The embedded world, small: files only."""
    from tokenizers import Tokenizer

    from jaxrlhf.data.synthetic import World

    folder = tmp_path_factory.mktemp("tiny") / "world"
    World(0, vocab_size=400).write(
        folder, pretraining=120, demonstrations=300, prompts_train=40, prompts_eval=8
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def fits(row: dict[str, Any]) -> bool:
        return len(tokenizer.encode(row["prompt"] + row["completion"]).ids) < 32

    # Ragged, and short enough that nothing is cut.
    rows = [row for row in read_jsonl(folder / "demonstrations.jsonl") if fits(row)][:80]
    pairs = [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in itertools.pairwise(rows)
        if a["completion"] != b["completion"] and fits({**b, "prompt": a["prompt"]})
    ]
    return Tiny(
        folder=folder,
        tokenizer=folder / "tokenizer",
        text=folder / "pretrain.jsonl",
        demonstrations=write_jsonl(folder / "short.jsonl", rows),
        pairs=write_jsonl(folder / "pairs.jsonl", pairs),
        prompts=folder / "prompts_train.jsonl",
        held_out=folder / "prompts_eval.jsonl",
    )


@pytest.fixture(scope="session")
def models(tiny: Tiny) -> Models:
    """A language model and a reward model, as their stages leave them."""
    base, judge = tiny.folder.parent / "base", tiny.folder.parent / "judge"
    assert run("pretrain", base, **tiny.base).exit_code == 0
    assert run("reward", judge, **tiny.comparisons(base)).exit_code == 0
    return Models(base, judge)


class Finished:
    """Runs that nobody interrupted, by stage; each is made once, when first asked for.

    What PPO froze and what it scored are kept as well: `frozen` holds (name, parameters, digest
    when they were made), `experience` holds (rollout, scores, experience) of each iteration.
    """

    def __init__(self, tiny: Tiny, models: Models, folder: Path):
        self.tiny, self.models, self.folder = tiny, models, folder
        self.folders = {"pretrain": models.base, "reward": models.judge}
        self.frozen: list[tuple[str, Any, str]] = []
        self.experience: list[tuple[Any, Any, Any]] = []
        self.embeddings: list[int] = []  # buffers of its size while PPO scores

    def __call__(self, stage: str) -> Path:
        if stage not in self.folders:
            path = self.folder / stage
            with pytest.MonkeyPatch.context() as patch:
                if stage == "ppo":
                    self._watch(patch)
                assert run(stage, path, **self.tiny.settings(stage, self.models)).exit_code == 0
            self.folders[stage] = path
        return self.folders[stage]

    def _watch(self, patch: pytest.MonkeyPatch) -> None:
        import jax

        def embeddings(shape: tuple[int, ...]) -> int:
            arrays = [x for x in jax.live_arrays() if x.shape == shape and not x.is_deleted()]
            return len({x.unsafe_buffer_pointer() for x in arrays})

        from jaxrlhf.stages import completions, ppo
        from jaxrlhf.train.digest import content_digest

        begin, open_model, make = ppo.reference_params, completions.open_model, ppo.make_experience

        def began(model: Any) -> Any:
            found = begin(model)
            self.frozen.append(("reference", found, content_digest(found)))
            return found

        def opened(*args: Any, **kwargs: Any) -> Any:
            model = open_model(*args, **kwargs)
            self.frozen.append(("reward", model.params, content_digest(model.params)))
            return model

        shapes = {x.shape for x in jax.live_arrays() if x.ndim == 2}
        others = {shape: embeddings(shape) for shape in shapes}

        def made(*args: Any, **kwargs: Any) -> Any:
            program = make(*args, **kwargs)

            def scored(params: Any, ref: Any, rollout: Any, scores: Any, kl_coef: Any) -> Any:
                shape = ref["embed"]["embedding"].shape
                self.embeddings.append(embeddings(shape) - others.get(shape, 0))
                found = program(params, ref, rollout, scores, kl_coef)
                self.experience.append(jax.device_get((rollout, scores, found[0])))
                return found

            return scored

        patch.setattr(ppo, "reference_params", began)
        patch.setattr(completions, "open_model", opened)
        patch.setattr(ppo, "make_experience", made)


@pytest.fixture(scope="session")
def finished(tiny: Tiny, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """See `Finished`."""
    return Finished(tiny, models, tmp_path_factory.mktemp("finished"))


SERVER = """
import json, os, sys
import jaxrlhf.cli
import jaxrlhf.pipeline
import jaxrlhf.stages.evaluate, jaxrlhf.stages.generate, jaxrlhf.stages.ppo
import jaxrlhf.stages.preference, jaxrlhf.stages.reward, jaxrlhf.stages.sft
import orbax.checkpoint, tensorboardX
from orbax.checkpoint import v1
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(job["env"])
        out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 70  # a bug: its traceback is in the output
        try:
            if job["limit"]:
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"],) * 2)
            code = jaxrlhf.cli.main(job["words"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Commands in processes of their own, which may be killed, without paying for imports each.

    A server that has imported everything, and started nothing, is forked for each command.
    """

    def __init__(self, folder: Path):
        self.out = folder / "out.txt"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.server = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self._line() == "ready"

    def start(self, words: list[str], *, env: dict[str, str] | None = None, limit: int = 0) -> int:
        """Begins a command; returns its process id. `end` must be called before the next."""
        assert self.server.stdin is not None
        self.out.write_text("")  # not what the last command said
        job = {"words": words, "env": env or {}, "limit": limit, "out": str(self.out)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def end(self) -> tuple[int, str]:
        """(exit code, what it printed); -9 = killed."""
        return int(self._line()), self.out.read_text(encoding="utf-8")

    def __call__(self, words: list[str], *, crash: str = "", limit: int = 0) -> tuple[int, str]:
        """A whole command; `crash` = where it kills itself, as in JAXRLHF_CRASH_AT."""
        self.start(words, env={"JAXRLHF_CRASH_AT": crash}, limit=limit)
        return self.end()

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, f"the server ended with {self.server.poll()}"
        return line.strip()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """See `Commands`."""
    found = Commands(tmp_path_factory.mktemp("commands"))
    yield found
    assert found.server.stdin is not None
    found.server.stdin.close()
    found.server.wait()
