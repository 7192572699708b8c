# SPDX-License-Identifier: Apache-2.0
"""Run directories in, one self-contained HTML page out.

import jaxrlhf
page = jaxrlhf.report("runs/dpo", "runs/ppo", output="compared.html")
"""

import os
import sys
from pathlib import Path
from types import ModuleType


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


class _Callable(ModuleType):
    """This package is an attribute of jaxrlhf once it is imported, whatever else had that name: it
    is the command, too."""

    def __call__(
        self, *runs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
    ) -> Path:
        """Writes the page of one or several runs; returns where it is.

        Args:
            runs: run or pipeline directories, or what a command returned.
            output: the file, or a folder for report.html; None = the first run.
        """
        folders = [Path(run) for run in runs]
        return write_report(folders, Path(output) if output is not None else Path(*folders[:1]))


sys.modules[__name__].__class__ = _Callable
