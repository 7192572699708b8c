# SPDX-License-Identifier: Apache-2.0
"""What a stage was made from, by content: a moved folder is the same input, an edited file is not.

A stage's identity is the digest of its settings and of the content of everything they name. A
pipeline skips a finished stage whose identity is unchanged; a resumed run refuses inputs that are
no longer those it began with.
"""

import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf.config import resume
from jaxrlhf.config.base import Section
from jaxrlhf.config.load import STAGE_REFERENCE, dotted
from jaxrlhf.config.reward import function_file, is_function
from jaxrlhf.config.schema import walk
from jaxrlhf.data.sources import matching
from jaxrlhf.data.tokenizer import is_path
from jaxrlhf.errors import ConfigError, DataError, ModelError
from jaxrlhf.parallel.distributed import from_primary, is_primary
from jaxrlhf.stages.rundir import is_finished, read_summary, write_json

# Of a folder's files, those that say when and where something ran, not what came of it.
RECORDS = ("summary.json", "environment.json", "config.yaml", "run.lock", "lineage.json")

MISSING = "missing"  # the digest of what is not there
# Files of a result that say which function it is.
CONFIGS = ("config.json", "adapter_config.json")


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; read again only if its size or time changed."""
    stat = path.stat()
    return _file_digest(str(path), stat.st_size, stat.st_mtime_ns)


def files_digest(folder: Path, names: list[str] | None = None) -> str:
    """SHA-256 over the names and contents of a folder's files (or of those named)."""
    total = hashlib.sha256()
    paths = (
        [folder / name for name in names]
        if names is not None
        else [p for p in folder.rglob("*") if p.is_file() and p.name not in RECORDS]
    )
    for path in sorted(paths):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\0".encode())
    return total.hexdigest()


def check_weights(run: Path) -> None:
    """Refuses a finished run whose result's weights or configuration are no longer the files that
    it wrote. The first process reads them, all hear what it found.

    Raises:
        ModelError: one is missing or another file, by name.
    """
    wrong = ""
    if is_primary():
        kept = ((read_summary(run) or {}).get("files") or {}).get("each") or {}
        for name, digest in sorted(kept.items()):
            path = run / name
            if path.suffix != ".safetensors" and path.name not in CONFIGS:
                continue
            now = file_digest(path) if path.is_file() else "missing"
            if now != digest:
                wrong = (
                    f"{path} is not the file that its run wrote: its SHA-256 was {digest[:12]}, "
                    f"now it is {now[:12]}. Restore it; if it was changed on purpose, give "
                    f"{path.parent}, which is taken as it is"
                )
                break
    if from_primary(bool(wrong)):
        raise ModelError(wrong or f"{run / 'export'} is damaged, the first process says where")


def content_of(place: str) -> str:
    """The content digest of a model or source: a run's own, else of its files, else its name."""
    pattern = _is_pattern(place)
    if not is_path(place) and not pattern:
        return f"name:{place}"  # a hub name or tfds:NAME; its revision is not ours to know
    path = Path(place).expanduser()
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        files = matching(str(path)) if pattern else []
        each = "".join(f"{file.name}\0{file_digest(file)}\0" for file in files)
        return hashlib.sha256(each.encode()).hexdigest() if files else MISSING
    summary = read_summary(path)
    if summary is not None and is_finished(path):
        return str(summary["content"])
    return files_digest(path)


def contents(config: Section) -> dict[str, str]:
    """{dotted key: content digest} of every model, source and run a configuration reads.

    Raises:
        DataError: a file there cannot be read.
    """
    found = {}
    for key, place in _inputs(config):
        try:
            found[key] = content_of(place)
        except OSError as error:
            where = error.filename or place
            raise DataError(f"{key}: {where} cannot be read: {error.strerror}") from error
    return found


def _inputs(config: Section) -> Iterator[tuple[str, str]]:
    """(dotted key, place) of every model, source, run and function's file a configuration reads."""
    for path, value, shape in walk(config):
        reads = shape.where in ("model", "source", "reward") or shape.resume == "content"
        if not isinstance(value, str) or not reads:
            continue
        if shape.where == "reward" and is_function(value):
            if (file := function_file(value)) is not None:
                yield dotted(path), str(file.absolute())
            continue
        yield dotted(path), value


def absent(config: Section) -> list[str]:
    """A line for each place on this machine that a configuration reads and that is not there."""
    found = []
    for key, place in _inputs(config):
        path = os.path.expanduser(place)
        there = os.path.exists(path) or (_is_pattern(place) and bool(matching(path)))
        if not there and (is_path(place) or _is_pattern(place)):
            found.append(f"{key}: there is no {place}")
    return found


def _is_pattern(place: str) -> bool:
    return glob.has_magic(place) and not place.startswith(("tfds:", STAGE_REFERENCE))


def identity(stage: str, config: Section) -> str:
    """The digest by which a finished stage is recognised."""
    parts = {"settings": resume.digest(stage, config), "contents": contents(config)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def record(run: Path, config: Section) -> None:
    """Writes down what the inputs of a run are, for `check_inputs`."""
    if is_primary():
        write_json(run / "lineage.json", contents(config))


def check_inputs(run: Path, config: Section) -> None:
    """Refuses to go on with inputs whose content is no longer what the run began with."""
    try:
        before = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = contents(config)
    if changed := [key for key in before if key in now and before[key] != now[key]]:
        raise ConfigError(
            f"{run} cannot be resumed: the content of {', '.join(changed)} changed since it began. "
            "Restore it, or start anew in another folder (--output DIR)"
        )
