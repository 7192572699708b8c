# SPDX-License-Identifier: Apache-2.0
"""Stages: each file is the wiring of one, its dataflow readable from top to bottom.

`run_stage` runs any of them by name; nothing is imported before it is needed.
"""

from collections.abc import Callable, Sequence
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
    from jaxrlhf.stages.training import check_optimizer

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
        checked.errors.extend(check_optimizer(config.optim))
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
) -> "StageResult":
    """Runs one stage (a key of `config.stages.STAGES`) and returns how it ended.

    Args:
        output: the run directory; default `config.output_dir`, else runs/<stage>-<time>.
        resume: "auto", "never", or the run directory to continue from.
        allow_change: settings that may differ from those a resumed run began with.
        dry_run: check everything, compute nothing.
        stop_requested: polled between units of work; by default signals are handled.
    """
    from jaxrlhf.stages.rundir import default_directory

    given = output or config.output_dir
    folder = Path(given) if given is not None else default_directory(command)
    if command in TRAINING:
        from jaxrlhf.stages.training import run_training

        return run_training(
            command,
            config,
            _recipe(command),
            folder,
            resume=resume,
            allow_change=allow_change,
            dry_run=dry_run,
            stop_requested=stop_requested,
        )
    from jaxrlhf.stages.once import run_once

    work = _work(command)
    return run_once(command, config, folder, lambda path: work(config, path))


def _recipe(command: str) -> Callable[..., Any]:
    if command in ("pretrain", "sft"):
        from jaxrlhf.stages.sft import sft

        return sft
    if command == "reward":
        from jaxrlhf.stages.reward import reward

        return reward
    if command == "dpo":
        from jaxrlhf.stages.preference import dpo

        return dpo
    from jaxrlhf.stages.ppo import ppo

    return ppo


def _work(command: str) -> Callable[..., Any]:
    if command == "world":
        from jaxrlhf.stages.world import write_world

        return write_world
    if command == "label":
        from jaxrlhf.stages.world import label

        return label
    raise ConfigError(f"{command}: no such stage")
