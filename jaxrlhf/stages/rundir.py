# SPDX-License-Identifier: Apache-2.0
"""A run directory: what it was told, where it ran, what came of it.

config.yaml       the resolved configuration
environment.json  versions, devices, command
summary.json      how it ended; exit code 0 only if everything planned was done
"""

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import environment
from jaxrlhf.config.load import save
from jaxrlhf.config.stages import StageConfig
from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.parallel.distributed import barrier, from_primary, is_primary, together
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.train.lock import run_lock


def default_directory(command: str) -> Path:
    """runs/<stage>-<time>, where nobody said where; the time is the first process's.

    The folder is made: of two runs that begin in one second, the later has a number behind it.

    Raises:
        JaxrlhfError: it cannot be made.
    """
    with together():
        seconds = from_primary(int(time.time()))
        now = time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))
        name = f"{command.replace(' ', '-')}-{now}"
        number = from_primary(_make_new(Path("runs") / name) if is_primary() else 0)
    return Path("runs") / _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _make_new(path: Path) -> int:
    """Makes a folder that was not there, and returns its number."""
    number = 1
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(_numbered(path.name, number)).mkdir()
        except FileExistsError:
            if not path.parent.is_dir():
                raise JaxrlhfError(f"{path.parent} is no folder; give an --output") from None
            number += 1
        except OSError as error:
            raise JaxrlhfError(
                f"{path} cannot be made: {error.strerror}; give an --output"
            ) from error
        else:
            return number


@contextlib.contextmanager
def run_directory(path: Path, config: StageConfig) -> Iterator[Path]:
    """Holds the directory of a run, with its configuration and environment written down.

    Raises:
        JaxrlhfError: it cannot be written, or another run is at work in it.
    """
    if not is_primary():
        yield path
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxrlhfError(f"output_dir {path} cannot be made: {error.strerror}") from error
    with run_lock(path):
        try:
            save(config, path / "config.yaml")
            write_json(path / "environment.json", environment.describe())
        except OSError as error:
            raise JaxrlhfError(
                f"output_dir {path} cannot be written: {error.strerror}; give another --output"
            ) from error
        yield path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into that takes `folder`'s place at the end.

    A failure leaves what was there. Over several processes all call, the first makes the folders.
    """
    partial = folder.with_name(folder.name + ".partial")
    if is_primary():
        shutil.rmtree(partial, ignore_errors=True)
    barrier(f"{folder.name} begins")
    yield partial
    if is_primary():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
    barrier(f"{folder.name} ends")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_rows(folder: Path, texts: Mapping[str, str]) -> None:
    """Files of rows, each named by what it holds: one that is there already is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).exists():
            partial = folder / f"{name}.{os.getpid()}.partial"  # every process may write it
            partial.write_text(text, encoding="utf-8", newline="\n")
            os.replace(partial, folder / name)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer's files into a folder.

    Raises:
        JaxrlhfError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no OSError
        raise JaxrlhfError(
            f"the tokenizer cannot be written to {folder}: {error}. Free some space or give "
            "another --output; what has been saved so far is untouched and the run can be resumed"
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer's folder, whole or not at all: what was there before stays until then."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_tokenizer(tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json of a run, or None where it is not there or was cut short."""
    try:
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_finished(run: Path) -> bool:
    """Whether a run has a result and has not trained on since, as one does whose steps grew."""
    summary = read_summary(run) or {}
    newest = max(Checkpoints(run).steps(), default=0)
    return "content" in summary and newest <= summary.get("steps_done", 0)


def peak_memory_bytes() -> int:
    """Most memory this process has held so far: of the device where it says, else of the host."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(stats.get("peak_bytes_in_use", host))
