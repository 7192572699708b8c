# SPDX-License-Identifier: Apache-2.0
"""Where a run goes on from, and whether it may: all that is refused before anything is touched."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config.load import load
from jaxrlhf.config.resume import check_resume
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.errors import CheckpointError
from jaxrlhf.stages import lineage
from jaxrlhf.train.checkpoint import Checkpoints


def origin(
    command: str, config: TrainingConfig, output: Path, resume: str, allow: Sequence[str]
) -> Path | None:
    """The run directory whose checkpoints a run goes on from; None where it begins anew.

    A run that went on from another one (`resume` = its directory) and has checkpoints of its own
    goes on from those, so that the same command can be called again.

    Raises:
        CheckpointError: there is something that may not be overwritten, nothing to go on from, or
            what is there is of another stage or beyond the planned steps.
        ConfigError: it was started with other settings or inputs.
    """
    own = Checkpoints(output).steps()
    said = f"{output} holds checkpoints of steps {', '.join(map(str, own))}"
    if resume == "never":
        if own:
            raise CheckpointError(
                f"--resume never: {said}, and nothing is overwritten: leave it out to go on from "
                "them, or begin anew in another folder (--output DIR)"
            )
        return None
    source = output
    if resume != "auto" and Path(resume).resolve() != output.resolve():
        source = Path(resume)
        if own:
            if _meta(output).get("continues") != str(source.resolve()):
                raise CheckpointError(
                    f"--resume {resume}: {said}, which did not go on from {resume}: leave it "
                    "out to go on from them, or give another --output"
                )
            source = output
        elif not Checkpoints(source).steps():
            raise CheckpointError(
                f"--resume {resume}: no checkpoints there; give auto, never or a run directory"
            )
    steps = Checkpoints(source).steps()
    if not steps:
        return None
    stage = _meta(source).get("stage", command)
    if stage != command:
        raise CheckpointError(
            f"{source} holds checkpoints of {stage}, which {command} cannot go on from: give a "
            f"model to begin from as model.path (-m), and {command} an --output of its own"
        )
    if (source / "config.yaml").is_file():
        check_resume(load(command, [source / "config.yaml"]), config, allow, source)
        lineage.check_inputs(source, config)
    if config.train.steps is not None:
        check_planned(source, steps[-1], config.train.steps)
    return source


def check_planned(run: Path, step: int, planned: int) -> None:
    """Raises CheckpointError where a checkpoint is of a longer run than the one planned."""
    if step > planned:
        raise CheckpointError(
            f"{run} is at step {step} already, {planned} are planned: give more train.steps (or "
            "train.epochs), or begin anew in another folder (--output DIR)"
        )


def _meta(run: Path) -> dict[str, Any]:
    """What the newest checkpoint whose meta can be read says of its run."""
    found = Checkpoints(run)
    for step in reversed(found.steps()):
        with contextlib.suppress(CheckpointError):
            return found.read_meta(step)
    return {}
