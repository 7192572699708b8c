# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline: stages in order, finished and verified ones skipped, lineage written down.

    DIR/pipeline.json    {stages: [{name, stage, dir, status, seconds, content, parents, values}],
                          repeats: [{name, values, over, runs, metrics: {name: {mean, interval}}}]}
    DIR/NAME/            the run directory of each stage

A stage is skipped only if it finished, its settings and the content of all its inputs are what they
were, and its result is still the bytes it wrote. A stage whose inputs changed is run anew; what its
folder held is moved aside, never removed.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config.pipeline import PipelinePlan, PlannedStage, resolve
from jaxrlhf.config.stages import StageConfig
from jaxrlhf.errors import ConfigError, JaxrlhfError


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """How a pipeline ended: its directory, exit code, and a record of each stage."""

    path: Path
    exit_code: int
    stages: list[dict[str, Any]]


def run_pipeline(
    plan: PipelinePlan,
    output: str | Path | None = None,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
) -> PipelineResult:
    """Runs every stage of the plan that is not finished.

    Args:
        output: the pipeline's directory; default the plan's.
        resume: "auto", or "never" to run every stage anew (what is there is moved aside).
        dry_run: say what would be done, and do nothing.

    Raises:
        ConfigError: another `resume`, the directory cannot be made, or (dry_run) something read is
            not there.
        JaxrlhfError: a stage failed for a reason its message names; what is finished stays so.
    """
    if resume not in ("auto", "never"):
        raise ConfigError(
            f"--resume {resume}: a pipeline takes auto, or never to run every stage anew; to go on "
            "from another run's checkpoints call the stage itself"
        )
    from jaxrlhf.parallel.distributed import barrier, is_primary, together
    from jaxrlhf.stages.lineage import absent
    from jaxrlhf.stages.outputs import check_output
    from jaxrlhf.stages.rundir import write_json
    from jaxrlhf.train.signals import graceful_stop

    def write(content: dict[str, Any]) -> None:
        if is_primary():
            write_json(folder / "pipeline.json", content)
        barrier("pipeline.json")

    folder = Path(output or plan.output_dir).resolve()
    outputs = {planned.name: folder / planned.folder for planned in plan.stages}
    records: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    began = time.perf_counter()
    if dry_run:
        missing = [(stage.name, line) for stage in plan.stages for line in absent(stage.config)]
        if missing:
            raise ConfigError("\n".join(f"{name}: {line}" for name, line in missing))
    with together(), graceful_stop() as stop_requested:
        check_output(folder, "output_dir", folder=True)
        for i, planned in enumerate(plan.stages):
            config = resolve(planned.config, outputs)
            place = f"[{i + 1}/{len(plan.stages)}] {planned.name}"
            if dry_run:
                _say(f"{place}: {planned.stage} in {outputs[planned.name]}")
                continue
            if stop_requested():
                _say(f"{place}: stopped before it began; call again to go on")
                return PipelineResult(folder, 143, records)
            exit_code, record = _run(
                planned,
                config,
                outputs[planned.name],
                place,
                fresh=resume == "never",
                allow_change=allow_change,
                stop_requested=stop_requested,
            )
            records.append({**record, "parents": list(planned.parents), "values": planned.values})
            written = {"name": plan.name, "stages": records}
            write(written)
            if exit_code:
                return PipelineResult(folder, exit_code, records)
            if i + 1 == len(plan.stages) or plan.stages[i + 1].group != planned.group:
                means += _means(planned.group, plan, outputs)
        if means:
            write({**written, "repeats": means})
    ran = sum(record["status"] == "done" for record in records)
    if not dry_run:
        _say(
            f"{plan.name}: {ran} stages run, {len(records) - ran} were finished already, "
            f"{time.perf_counter() - began:.0f} s; results in {folder}"
        )
    return PipelineResult(folder, 0, records)


def _run(
    planned: PlannedStage,
    config: StageConfig,
    folder: Path,
    place: str,
    *,
    fresh: bool,
    allow_change: Sequence[str],
    stop_requested: Any,
) -> tuple[int, dict[str, Any]]:
    """Runs one stage unless it is finished; returns (exit code, its record)."""
    from jaxrlhf.parallel import distributed
    from jaxrlhf.stages import run_stage
    from jaxrlhf.stages.lineage import identity
    from jaxrlhf.stages.rundir import read_summary, write_json

    mine = identity(planned.stage, config)
    summary = read_summary(folder)
    record = {"name": planned.name, "stage": planned.stage, "dir": planned.folder}
    finished = not fresh and summary is not None and _finished(folder, summary, mine)
    if distributed.from_primary(finished):  # another process may see other files, or none
        _say(f"{place}: finished already")
        kept = {"seconds": "wall_seconds", "content": "content"}
        found = {name: (summary or {}).get(key) for name, key in kept.items()}
        return 0, {**record, "status": "skipped", **found}
    _say(f"{place}: {planned.stage}")
    if distributed.is_primary():
        if folder.exists() and (fresh or _identity_of(folder) != mine):
            _move_aside(folder, place)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "identity.json", {"identity": mine})
    distributed.barrier(f"the folder of {planned.name}")
    try:
        result = run_stage(
            planned.stage,
            config,
            folder,
            allow_change=allow_change,
            stop_requested=stop_requested,
        )
    except JaxrlhfError as error:
        raise type(error)(f"{place}: {error}") from error
    finally:
        _release()
    summary = read_summary(folder) or {}
    status = "done" if result.exit_code == 0 else summary.get("exit_reason", "failed")
    found = {"status": status, "seconds": summary.get("wall_seconds")}
    return result.exit_code, {**record, **found, "content": summary.get("content")}


HEADLINES = ("accuracy", "ece", "nats_per_token", "gold", "proxy", "objective", "kl")


def _means(group: str, plan: PipelinePlan, outputs: dict[str, Path]) -> list[dict[str, Any]]:
    """What the repetitions of a stage over seeds or folds say together; its headlines printed."""
    from jaxrlhf.evaluation.repeats import repeated
    from jaxrlhf.stages.rundir import read_summary

    runs = [
        (planned.values, (read_summary(outputs[planned.name]) or {}).get("metrics", {}))
        for planned in plan.stages
        if planned.group == group and planned.values
    ]
    found = []
    for one in repeated(runs):
        what = ", ".join(f"{k}={v}" for k, v in one.values.items())
        metrics = {}
        for name, (mean, interval) in one.metrics.items():
            metrics[name] = {"mean": mean, "interval": list(interval)}
            if name.removeprefix("eval/") in HEADLINES:
                _say(
                    f"{group}{' ' if what else ''}{what}: {name} {mean:.4f} [{interval[0]:.4f}, "
                    f"{interval[1]:.4f}], mean of {one.count} ({', '.join(one.over)})"
                )
        told = {"name": group, "values": dict(one.values), "over": list(one.over)}
        found.append({**told, "runs": one.count, "metrics": metrics})
    return found


def _finished(folder: Path, summary: dict[str, Any], identity: str) -> bool:
    """Whether a stage is done, made of what it would be made of now, and undamaged."""
    from jaxrlhf.stages.lineage import files_digest

    if summary.get("exit_reason") != "done" or "content" not in summary:
        return False
    if _identity_of(folder) != identity:
        return False
    try:
        kept = summary.get("files", {"names": [], "digest": None})
        return kept["digest"] is None or files_digest(folder, kept["names"]) == kept["digest"]
    except OSError:
        return False


def _identity_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / "identity.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _move_aside(folder: Path, place: str) -> None:
    """Makes room without losing anything."""
    if not any(folder.iterdir()):
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"{place}: settings or inputs changed; the earlier run is kept as {target}", flush=True)


def _say(text: str) -> None:
    """Once, whatever the number of processes."""
    from jaxrlhf.parallel.distributed import is_primary

    if is_primary():
        print(text, flush=True)


def _release() -> None:
    """Frees what a stage leaves in memory: its programs, and cycles that hold its arrays."""
    import gc

    import jax

    jax.clear_caches()
    gc.collect()
