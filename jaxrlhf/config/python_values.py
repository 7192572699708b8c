# SPDX-License-Identifier: Apache-2.0
"""What only Python can hold, as settings: a function by its file, rows by the file they go to."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config.aliases import aliases
from jaxrlhf.config.base import Section
from jaxrlhf.config.data import Source
from jaxrlhf.config.load import STAGE_REFERENCE
from jaxrlhf.config.schema import Shape, fields, find
from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ConfigError

ROWS = "rows"  # what rows in memory are written to: `stage:rows/NAME` until the folder is known
Texts = dict[str, str]  # {name of a file: what it holds}


def settings_of(command: str, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], Texts]:
    """(keywords that a file could hold, the files of the rows among them).

    Rows are lists of dicts and `datasets.Dataset`s. Their file is named by what it holds: other
    rows are another file.

    Raises:
        ConfigError: a function that no file holds, rows that JSON cannot, any other object.
    """
    files: Texts = {}
    table, section = aliases(command), STAGES[command]
    found = {
        key: _written(value, key, tuple(table.get(key, key).split(".")), section, files)
        for key, value in keywords.items()
    }
    return found, files


def _written(
    value: Any, key: str, path: tuple[str | int, ...], section: type[Section], files: Texts
) -> Any:
    takes = _takes(find(section, path))
    if takes == "reward" and callable(value):
        return function_name(value, key)
    if takes == "source" and (rows := _rows(value)) is not None:
        text = _jsonl(rows, key)
        name = f"{key.rpartition('.')[2]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        files[name] = text
        return f"{STAGE_REFERENCE}{ROWS}/{name}"
    if isinstance(value, Mapping):
        inner = {str(k): (f"{key}.{k}", (*path, *str(k).split("."))) for k in value}
        return {k: _written(value[k], *inner[k], section, files) for k in inner}
    if isinstance(value, list | tuple):
        return [
            _written(item, f"{key}.{i}", (*path, i), section, files) for i, item in enumerate(value)
        ]
    if callable(value) or (hasattr(value, "__iter__") and not isinstance(value, str)):
        way = (
            "; rows are a list of dicts, a datasets.Dataset or a file" if takes == "source" else ""
        )
        raise ConfigError(f"{key}: {type(value).__name__} is no value of a setting{way}")
    return value


def _takes(shape: Shape | None) -> str | None:
    """The kind of place that a bare value of a shape names, see base.Where."""
    while shape is not None and shape.where is None:
        if shape.kind == "section" and shape.section is not None and shape.section.shorthand:
            shape = fields(shape.section)[shape.section.shorthand]
        else:
            shape = shape.item
    return shape.where if shape is not None else None


def _rows(value: Any) -> list[Mapping[str, Any]] | None:
    """The rows that a value is, or None: a list of {source: ..., weight: ...} is none."""
    if hasattr(value, "column_names") and hasattr(value, "to_list"):
        return value.to_list()  # datasets.Dataset
    if not isinstance(value, list | tuple) or not value:
        return None
    entry = set(Source.model_fields)
    if all(
        isinstance(row, Mapping) and not ("source" in row and entry >= set(row)) for row in value
    ):
        return list(value)
    return None


def _jsonl(rows: list[Mapping[str, Any]], key: str) -> str:
    lines = []
    for i, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{key}: row {i} cannot be written down: {error}; use texts, numbers and lists"
            ) from error
    return "".join(lines)


def function_name(function: Callable[..., Any], key: str) -> str:
    """`file.py:name` of a function at the top of a file.

    Raises:
        ConfigError: it is in no file, or inside another function or class.
    """
    plain = inspect.unwrap(function)
    name = getattr(plain, "__qualname__", type(function).__name__)
    code = getattr(plain, "__code__", None)
    file = Path(code.co_filename).absolute() if code is not None else None
    if file is None or file.suffix != ".py" or not file.is_file() or not name.isidentifier():
        raise ConfigError(
            f"{key}: {name} is a function that no file holds at its top (a lambda, a notebook's "
            "cell, a method). A run that is resumed has to find it again: write it into a file, "
            f"say rewards.py, and give {key} 'rewards.py:NAME'"
        )
    return f"{file}:{name}"
