# SPDX-License-Identifier: Apache-2.0
"""Runs a stage that leaves files behind and trains nothing: all of it, or nothing to rely on."""

import time
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.config.stages import StageConfig
from jaxrlhf.parallel import distributed
from jaxrlhf.stages import lineage
from jaxrlhf.stages.rundir import peak_memory_bytes, run_directory, write_json
from jaxrlhf.stages.training import StageResult

# (run directory) -> (figures, names of the files that are the result)
Work = Callable[[Path], tuple[dict[str, float], list[str]]]


def run_once(command: str, config: StageConfig, output: Path, work: Work) -> StageResult:
    """Does the work in its run directory and writes the summary.

    The summary is removed first: a stage that is killed is never taken for a finished one.
    """
    began = time.perf_counter()
    with distributed.together(), run_directory(output, config):
        if distributed.is_primary():
            (output / "summary.json").unlink(missing_ok=True)
        lineage.record(output, config)
        metrics, files = work(output)
        if distributed.is_primary():
            content = lineage.files_digest(output, files)
            write_json(
                output / "summary.json",
                {
                    "stage": command,
                    "steps_done": 1,
                    "steps_planned": 1,
                    "exit_reason": "done",
                    "metrics": {k: v for k, v in metrics.items() if v == v},
                    "content": content,
                    "files": {"names": files, "digest": content},
                    "parents": lineage.contents(config),
                    "wall_seconds": round(time.perf_counter() - began, 3),
                    "peak_memory_bytes": peak_memory_bytes(),
                },
            )
        distributed.barrier("summary")  # what comes next may read it
    return StageResult(output, 0, metrics)
