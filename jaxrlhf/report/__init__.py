# SPDX-License-Identifier: Apache-2.0
"""Run directories in, one self-contained HTML page out."""

from pathlib import Path


def write_report(runs: list[Path], output: Path) -> Path:
    """Writes one HTML file that compares `runs` and returns its path.

    Args:
        runs: run directories, or pipeline directories (a folder with pipeline.json). Whatever a
            run lacks (unfinished, damaged, never evaluated) is named in the report, never fatal.
        output: the file, or a folder to put `report.html` into.

    The page loads nothing, runs no script, and everything that came from data is a text node. The
    same runs give the same bytes.

    Raises DataError if a run is no folder at all, or `runs` is empty.
    """
    from jaxrlhf.report.page import write

    return write([Path(run) for run in runs], Path(output))
