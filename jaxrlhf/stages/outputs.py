# SPDX-License-Identifier: Apache-2.0
"""The files and folders that somebody names for a result: tried before the work, written whole."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.errors import ConfigError
from jaxrlhf.parallel.distributed import is_primary


def check_output(path: Path, key: str = "output", *, folder: bool = False) -> None:
    """Refuses a place that could not be written to. It leaves nothing there; of several processes
    the first tries, as it is the one that writes.

    Args:
        key: the setting that named it.
        folder: a folder is to be written, not a file.

    Raises:
        ConfigError: a folder where a file is to be or the reverse, or nothing can be made there.
    """
    if not is_primary():
        return
    try:
        if path.exists() and path.is_dir() != folder:
            is_there, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
            raise ConfigError(f"{key} = {path} is {is_there}; name {wanted}")
        above = path if folder and path.exists() else path.parent
        while not above.exists():
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{key} = {path} cannot be written: {reason}; name another") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A jsonl file, whole or not at all. What JSON has no form for (the dates of a parquet file)
    is written as its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    partial.rename(path)
