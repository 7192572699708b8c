# SPDX-License-Identifier: Apache-2.0
"""Stages: each file is the wiring of one, its dataflow readable from top to bottom.

`run_stage` runs any of them by name; nothing is imported before it is needed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.config.stages import TRAINING
from jaxrlhf.errors import ConfigError

if TYPE_CHECKING:
    from jaxrlhf.config.load import Checked
    from jaxrlhf.stages.training import StageResult


def check_algorithms(config: Any) -> "Checked":
    """The second pass of a configuration: named algorithms and their settings."""
    from jaxrlhf.config import signatures
    from jaxrlhf.config.stages import DPOConfig, PPOConfig, RewardConfig, TrainingConfig
    from jaxrlhf.losses.policy import POLICY_LOSSES, clipped_value
    from jaxrlhf.losses.preference import PREFERENCE_LOSSES
    from jaxrlhf.losses.reward import REWARD_LOSSES
    from jaxrlhf.ops.advantages import ESTIMATORS
    from jaxrlhf.train.optim import OPTIMIZERS

    tables: dict[str, Any] = {}
    if isinstance(config, DPOConfig):
        tables = {"loss.name": PREFERENCE_LOSSES}
    elif isinstance(config, RewardConfig):
        tables = {"loss.name": REWARD_LOSSES}
    elif isinstance(config, PPOConfig):
        tables = {"rl.advantage": ESTIMATORS, "rl.policy_loss": POLICY_LOSSES}
        if config.rl.advantage == "gae":
            tables["rl.value_loss"] = clipped_value
    checked = signatures.check(config, tables)
    if isinstance(config, TrainingConfig):
        known = signatures.keys(OPTIMIZERS[config.optim.name])
        checked.errors.extend(
            f"optim.{name}: {config.optim.name} has no such setting; it has {', '.join(known)}"
            for name in config.optim.settings()
            if name not in known
        )
    return checked


def run_stage(
    command: str,
    config: Any,
    output: str | Path | None = None,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
    stop_requested: Callable[[], bool] | None = None,
    rows: Mapping[str, str] | None = None,
) -> "StageResult":
    """Runs one stage (a key of `config.stages.STAGES`) and returns how it ended.

    Args:
        output: the run directory; default `config.output_dir`, else runs/<stage>-<time>.
        resume: "auto", "never", or the run directory to continue from.
        allow_change: settings that may differ from those a resumed run began with.
        dry_run: check everything, compute nothing.
        stop_requested: polled between units of work; by default signals are handled.
        rows: files of rows that the settings name as stage:rows/NAME, with what they hold; they are
            written into rows/ of the run directory.

    Raises:
        ConfigError: (dry_run) something that is read is not there.
    """
    from jaxrlhf.stages.rundir import default_directory, write_rows

    given = output or config.output_dir
    named = given is not None
    if rows:
        from jaxrlhf.config.pipeline import resolve
        from jaxrlhf.config.python_values import ROWS

        given = Path(given or default_directory(command)).resolve()
        write_rows(given / ROWS, rows)
        config = resolve(config, {ROWS: given / ROWS})

    def folder() -> Path:
        if given is None and dry_run:
            return Path()  # a dry run makes nothing
        return Path(given) if given is not None else default_directory(command)

    if command in TRAINING:
        from jaxrlhf.stages.training import run_training

        return run_training(
            command,
            config,
            _recipe(command, dry_run),
            folder(),
            resume=resume,
            allow_change=allow_change,
            dry_run=dry_run,
            stop_requested=stop_requested,
            named=named,
        )
    from jaxrlhf.stages.once import run_once
    from jaxrlhf.stages.training import StageResult

    if dry_run:
        from jaxrlhf.stages.lineage import absent

        if lines := absent(config):
            raise ConfigError("\n".join(lines))
        return StageResult(folder(), 0, {}, "dry run: the settings are right, nothing was run")
    work = _work(command, config)
    # A file asked for by name, or text on the terminal: that is the result, not a run directory.
    if given is None and (command in NO_DIRECTORY or _names_its_output(command, config)):
        where = Path(config.runs[0]) if command == "report" else Path()
        metrics, _ = work(where)
        return StageResult(where, 0, metrics)
    return run_once(command, config, folder(), work)


NO_DIRECTORY = ("report", "chat", "data show", "data pairs")


def _names_its_output(command: str, config: Any) -> bool:
    text_only = command == "generate" and config.prompt and not config.prompts
    return getattr(config, "output", None) is not None or bool(text_only)


def _recipe(command: str, dry_run: bool = False) -> Callable[..., Any]:
    if command in ("pretrain", "sft"):
        from jaxrlhf.stages.sft import sft

        return sft
    if command == "reward":
        from jaxrlhf.stages.reward import reward

        return reward
    if command == "dpo":
        from jaxrlhf.stages.preference import dpo

        return functools.partial(dpo, dry_run=dry_run)
    from jaxrlhf.stages.ppo import ppo

    return ppo


def _work(command: str, config: Any) -> Callable[[Path], tuple[dict[str, float], list[str]]]:
    """What a stage that trains nothing does, given its directory."""
    if command in ("world", "label"):
        from jaxrlhf.stages import world

        function = world.write_world if command == "world" else world.label
        return lambda path: _by_one(function, config, path)
    from jaxrlhf.stages import tools

    if command == "report":
        return lambda path: _by_one(tools.report, config, path)
    if command in ("data show", "data pairs"):
        show = tools.data_show if command == "data show" else tools.data_pairs

        def printed(config: Any, path: Path) -> tuple[dict[str, float], list[str]]:
            show(config)
            return {}, []

        return lambda path: _by_one(printed, config, path)
    return lambda path: _on_mesh(command, config, path)


def _by_one(
    work: Callable[[Any, Path], tuple[dict[str, float], list[str]]], config: Any, path: Path
) -> tuple[dict[str, float], list[str]]:
    """Work that needs no devices: of several processes the first does it."""
    from jaxrlhf.parallel import distributed

    with distributed.together():
        return work(config, path) if distributed.is_primary() else ({}, [])


def _on_mesh(command: str, config: Any, path: Path) -> tuple[dict[str, float], list[str]]:
    """A stage that runs a model: on the mesh of the settings, models sharded over it."""
    from jaxrlhf.parallel import distributed
    from jaxrlhf.parallel.mesh import make_mesh
    from jaxrlhf.parallel.rules import use_mesh
    from jaxrlhf.stages import tools

    sizes: dict[str, Any] = config.mesh.sizes if hasattr(config, "mesh") else {"fsdp": -1}
    with distributed.together(), use_mesh(make_mesh(**sizes)) as mesh:
        if command == "chat":
            tools.chat(config, mesh)
            return {}, []
        if command == "export":
            from jaxrlhf.stages.export import export

            return export(config, path, mesh)
        if command == "generate":
            from jaxrlhf.stages.generate import generate

            return generate(config, path, mesh)
        if command == "score":
            from jaxrlhf.stages.score import score

            return score(config, path, mesh)
        if command == "eval":
            from jaxrlhf.stages.evaluate import evaluate

            return evaluate(config, path, mesh)
    raise ConfigError(f"{command}: no such stage")
