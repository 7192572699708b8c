# SPDX-License-Identifier: Apache-2.0
"""The commands as functions, for notebooks: `jaxrlhf.dpo(model=..., data=..., beta=0.1)`.

Any key is a keyword, dotted ones as `**{"optim.learning_rate": 1e-4}`; TRL's names work too. Wrong
settings raise ConfigError with everything that is wrong; nothing here exits the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

File = str | os.PathLike[str]


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
    return run_stage(command, checked, output=checked.output_dir, **extra)


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
