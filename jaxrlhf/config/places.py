# SPDX-License-Identifier: Apache-2.0
"""YAML and key=value read into trees whose every value knows where it was written.

The YAML is the 1.2 core schema, without its traps: only true and false are booleans (`no` and
`on` are texts), `1e-5` is a number, dates and sexagesimals are texts, a key given twice is an
error, and tags make no objects. `${NAME}` and `${NAME:-default}` are taken from the environment
before the type is told; `$${` is a literal `${`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 50
MAX_VALUES = 100_000


@dataclasses.dataclass
class Value:
    """A scalar, a dict of text to Value or a list of Value, with its place."""

    data: Any
    place: str  # "train.yaml:7" or the override's text
    text: str | None = None  # a plain scalar as it was written
    base: Path = dataclasses.field(default_factory=Path.cwd)  # relative paths start here


class _Core(yaml.SafeLoader):
    """SafeLoader with the types of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def plain(text: str) -> Any:
    """The value of an unquoted scalar."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text) if len(text) < 4000 else text
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def expand(text: str, place: str, errors: list[str], env: Mapping[str, str] | None = None) -> str:
    """`${NAME:-default}` replaced; a name that is not set and has no default is an error."""
    known = os.environ if env is None else env

    def value(found: re.Match[str]) -> str:
        if found.group() == "$${":
            return "${"
        name, default = found.groups()
        if name in known and (known[name] or default is None):
            return known[name]
        if default is None:
            errors.append(
                f"{place}: ${{{name}}} is not set in the environment; "
                f"set it, or write ${{{name}:-default}}"
            )
            return ""
        return default

    return _VARIABLE.sub(value, text)


def read_file(file: str | Path, errors: list[str]) -> Value | None:
    """The mapping in a YAML file; what is wrong with the file is appended to `errors`."""
    path = Path(os.path.expanduser(file))  # a user that is not known stays as it is
    try:
        raw = path.read_bytes()
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            import difflib

            names = [p.name for p in path.parent.iterdir()]
            close = difflib.get_close_matches(path.name, names, n=1)
            hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        errors.append(f"{file}: cannot be read ({error.strerror}){hint}")
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        errors.append(f"{file}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8")
        return None
    return parse(text, str(file), path.resolve().parent, errors)


def parse(text: str, name: str, base: Path, errors: list[str]) -> Value | None:
    """YAML text whose top is a mapping; an empty one has no settings."""
    try:
        loader = _Core(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        column = f" column {mark.column + 1}" if mark else ""
        errors.append(f"{name}{line}:{column} not YAML: {error.problem or error.context}")
        return None
    except (yaml.YAMLError, ValueError) as error:
        errors.append(f"{name}: not YAML: {str(error).splitlines()[0]}")
        return None
    except RecursionError:
        errors.append(f"{name}: nested too deeply to be settings")
        return None
    if node is None:
        return Value({}, name, base=base)
    value = _Reader(name, base, errors).value(node)
    if not isinstance(value.data, dict):
        errors.append(f"{value.place}: settings are `key: value` lines, this is {kind(value)}")
        return None
    return value


def kind(value: Value) -> str:
    """What a value is, in words, as written."""
    if isinstance(value.data, dict):
        return "a mapping"
    if isinstance(value.data, list):
        return "a list"
    if value.data is None:
        return "null"
    return repr(value.data if value.text is None else value.text)


class _Reader:
    def __init__(self, name: str, base: Path, errors: list[str]):
        self.name, self.base, self.errors = name, base, errors
        self.count = 0
        self.open: list[int] = []  # nodes being read: an anchor inside itself would not end

    def value(self, node: yaml.Node) -> Value:
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.count += 1
        if id(node) in self.open or len(self.open) > MAX_DEPTH or self.count > MAX_VALUES:
            if self.count < 2 * MAX_VALUES:  # said once; the rest is not entered
                self.errors.append(f"{place}: nested or repeated too often to be settings")
                self.count = 2 * MAX_VALUES
            return Value(None, place, base=self.base)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, place)
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Value([self.value(item) for item in node.value], place, base=self.base)
            assert isinstance(node, yaml.MappingNode)
            return self.mapping(node, place)
        finally:
            self.open.pop()

    def scalar(self, node: yaml.ScalarNode, place: str) -> Value:
        text = expand(node.value, place, self.errors)
        core = ("tag:yaml.org,2002:str", "!", None)
        if node.tag not in core:
            self.errors.append(
                f"{place}: the tag {node.tag} is not accepted; write the value plainly"
            )
        if node.style is None and node.tag != "!":  # unquoted
            return Value(plain(text), place, text, self.base)
        return Value(text, place, text, self.base)

    def mapping(self, node: yaml.MappingNode, place: str) -> Value:
        if node.tag != "tag:yaml.org,2002:map":
            self.errors.append(f"{place}: the tag {node.tag} is not accepted; write keys plainly")
        found: dict[str, Value] = {}
        inherited: dict[str, Value] = {}
        for key_node, value_node in node.value:
            key_place = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.errors.append(f"{key_place}: a key is a word, not a list or mapping")
                continue
            key, value = key_node.value, self.value(value_node)
            if key == "<<" and key_node.style is None:
                parts = value.data if isinstance(value.data, list) else [value]
                for part in parts:
                    if isinstance(part.data, dict):
                        inherited = {**part.data, **inherited}
                    else:
                        self.errors.append(f"{key_place}: << merges mappings only")
                continue
            if key in found:
                self.errors.append(f"{key} ({key_place}): given twice, first at {found[key].place}")
                continue
            # A setting is found by its key's line, also where its value starts further down.
            found[key] = dataclasses.replace(value, place=key_place)
        return Value({**inherited, **found}, place, base=self.base)


def read_override(text: str, errors: list[str]) -> Value | None:
    """`key.path=value` as a mapping of one dotted key; the value is YAML."""
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not key:
        errors.append(f"{text}: a setting is given as key=value, e.g. optim.learning_rate=1e-4")
        return None
    written = expand(written, text, errors)
    ignored: list[str] = []
    value = Value(plain(written), text, written)
    if written.lstrip()[:1] in ("[", "{", '"', "'"):
        inner = parse(f"value: {written}", text, Path.cwd(), ignored)
        if inner is not None and not ignored and "value" in inner.data:
            value = _placed(inner.data["value"], text)
            if isinstance(value.data, str):
                value.text = value.data
    return Value({key: value}, text)


def _placed(value: Value, place: str) -> Value:
    data = value.data
    if isinstance(data, dict):
        data = {key: _placed(item, place) for key, item in data.items()}
    elif isinstance(data, list):
        data = [_placed(item, place) for item in data]
    return Value(data, place, value.text)


def from_python(data: Any, place: str) -> Value:
    """A Python value (a notebook's keyword) as if it had been read."""
    if isinstance(data, Mapping):
        return Value({str(k): from_python(v, place) for k, v in data.items()}, place)
    if isinstance(data, list | tuple):
        return Value([from_python(item, place) for item in data], place)
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    return Value(data, place, data if isinstance(data, str) else None)


def to_python(value: Value) -> Any:
    """What was read without its places: `from_python` undone."""
    if isinstance(value.data, dict):
        return {key: to_python(item) for key, item in value.data.items()}
    if isinstance(value.data, list):
        return [to_python(item) for item in value.data]
    return value.data
