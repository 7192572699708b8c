# SPDX-License-Identifier: Apache-2.0
"""Files and key=value to one checked configuration: every error at once, each with its place.

The first pass is the sections, which need no jax. The second pass, a function handed in by whoever
may import the stage, checks the parameters of the named algorithms; its errors join the others.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from jaxrlhf.config import places
from jaxrlhf.config.aliases import REFUSED, REMARKS, VALUES, aliases
from jaxrlhf.config.base import Section
from jaxrlhf.config.places import Value
from jaxrlhf.config.reward import FUNCTION
from jaxrlhf.config.schema import Shape, allows_extra, entries, fields, find, leaves, nearest
from jaxrlhf.config.stages import STAGES, StageConfig
from jaxrlhf.errors import ConfigError

S = TypeVar("S", bound=Section)
Path_ = tuple[str | int, ...]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
STAGE_REFERENCE = "stage:"


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a second pass found: errors as `key: message`, and the config with defaults filled."""

    errors: list[str]
    config: Any


SecondPass = Callable[[Any], "Checked | list[str]"]


def load(
    command: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    second_pass: SecondPass | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    note: Callable[[str], object] | None = None,
) -> Any:
    """The configuration of one command (a key of `stages.STAGES`).

    Args:
        files: YAML files, later ones override earlier ones.
        overrides: `key.path=value` texts, which override files and keywords.
        second_pass: called with the config; returns errors as `key: message`, or a `Checked`.
        keywords: settings from Python, dotted or nested; they override files.
        note: told of every name that was translated.

    Raises:
        ConfigError: naming every error at once.
    """
    errors: list[str] = []
    trees = [places.read_file(file, errors) for file in files]
    for key, data in (keywords or {}).items():
        trees.append(places.from_python({key: data}, f"{key}="))
    trees += [places.read_override(text, errors) for text in overrides]
    section = STAGES[command]
    tree = Value({}, "")
    for part in trees:
        if part is not None:
            part = translate(part, command, section, errors, note)
            tree = merge(tree, settle(part, section, errors))
    config = build(section, tree, errors, second_pass)
    if errors:
        raise ConfigError(listing(errors, f"{command}: "))
    assert config is not None
    return config


def listing(errors: list[str], prefix: str = "") -> str:
    """All errors under one headline, each once."""
    unique = list(dict.fromkeys(errors))
    if len(unique) == 1:
        return unique[0]
    return "\n".join([f"{prefix}{len(unique)} settings to mend", *(f"  {e}" for e in unique)])


# ----------------------------------------------------------------- names and places into the tree


def translate(
    tree: Value,
    command: str,
    section: type[Section],
    errors: list[str],
    note: Callable[[str], object] | None = None,
) -> Value:
    """TRL's names at the top level under ours; what has no meaning here is refused."""
    known, table = fields(section), aliases(command)
    found: dict[str, Value] = {}
    for key, value in tree.data.items():
        target = key
        if key not in known and key in REFUSED:
            errors.append(f"{key} ({value.place}): {REFUSED[key]}")
            continue
        if key not in known and key in table and _reaches(section, table[key]):
            target, said = table[key], ""
            ours = VALUES.get((command, key), {})
            if isinstance(value.data, str) and value.data in ours:
                value = dataclasses.replace(value, data=ours[value.data], text=ours[value.data])
                said = f"={value.data}"
            if note:
                remark = REMARKS.get((command, key))
                said += f": {remark}" if remark else ""
                note(f"{key} ({value.place}) is {target}{said}")
        if target in found:
            errors.append(
                f"{target} ({value.place}, as {key}): given twice, first at {found[target].place}"
            )
            continue
        found[target] = value
    if "per_device_train_batch_size" in tree.data and "train.microbatch_size" in found:
        # TRL's batch is rows a device x passes, and passes default to 1.
        explicit = {"train.accumulation", "train.batch_size", "train"} & found.keys()
        if not explicit:
            place = found["train.microbatch_size"].place
            found["train.accumulation"] = Value(1, place, "1")
    return dataclasses.replace(tree, data=found)


def _reaches(section: type[Section], dotted: str) -> bool:
    parts = tuple(dotted.split("."))
    if find(section, parts) is not None:
        return True
    above = find(section, parts[:-1])
    return above is not None and above.section is not None and allows_extra(above.section)


class Indexed(dict[str, Value]):
    """Changes to items of a list, by position: `data.train.0.weight=2`."""


class Every(list[Value]):
    """Changes to all items of a list, `data.train.limit=5`: one item without what makes it one."""


def settle(tree: Value, section: type[Section], errors: list[str], prefix: Path_ = ()) -> Value:
    """Dotted keys nested, shorthands spelled out, places absolute, texts as written."""
    shapes = fields(section)
    found: dict[str, Value] = {}
    for key, value in tree.data.items():
        name, dot, rest = key.partition(".")
        if name in section.synonyms:
            name = section.synonyms[name]
            key = name + dot + rest
        if key not in shapes and dot and name in shapes:
            value = dataclasses.replace(value, data={rest: value}, text=None)
        else:
            name = key
        shape = shapes.get(name)
        if shape is not None:
            value = _settle_value(value, shape, errors, (*prefix, name))
        elif dot and rest:  # below an unknown or an extra key
            name = key
        if name in found:
            value = merge(found[name], value, once=(errors, ".".join(map(str, (*prefix, name)))))
        found[name] = value
    return dataclasses.replace(tree, data=found)


def _settle_value(value: Value, shape: Shape, errors: list[str], path: Path_) -> Value:
    data = value.data
    if shape.kind == "section" and shape.section is not None:
        if data is None and not shape.optional:
            return dataclasses.replace(value, data={})  # a block whose lines are all comments
        if not isinstance(data, dict) and data is not None and shape.section.shorthand:
            value = dataclasses.replace(value, data={shape.section.shorthand: value}, text=None)
        if isinstance(value.data, dict):
            return settle(value, shape.section, errors, path)
        return value
    if shape.kind == "list" and shape.item is not None:
        if isinstance(data, dict) and data and all(re.match(r"\d+(\.|$)", k) for k in data):
            return _settle_indices(value, shape.item, errors, path)
        if data is None:
            return value
        items = data if isinstance(data, list) else [value]
        settled = [_settle_value(v, shape.item, errors, (*path, i)) for i, v in enumerate(items)]
        inner = shape.item.section
        if isinstance(data, dict) and inner is not None and inner.shorthand not in settled[0].data:
            settled = Every(settled)
        return dataclasses.replace(value, data=settled, text=None)
    if shape.kind == "scalar":
        if shape.text and value.text is not None and not isinstance(data, str):
            meant = data is not None or (not shape.optional and value.text not in ("", "~"))
            value = dataclasses.replace(value, data=value.text) if meant else value
        if shape.where and isinstance(value.data, str):
            value = dataclasses.replace(value, data=locate(value.data, shape.where, value.base))
    return value


def _settle_indices(value: Value, item: Shape, errors: list[str], path: Path_) -> Value:
    found = Indexed()
    for key, inner in value.data.items():
        index, _, rest = key.partition(".")
        if rest:
            inner = dataclasses.replace(inner, data={rest: inner}, text=None)
        found[index] = _settle_value(inner, item, errors, (*path, int(index)))
    return dataclasses.replace(value, data=found, text=None)


def locate(text: str, kind: str, base: Path) -> str:
    """An absolute path where the text names a place on this machine, else the name unchanged.

    A model or source whose text begins with `.`, `/` or `~`, or whose first part exists, is a
    path; else it is a hub name. Data files are told by their suffix too.
    """
    if not text or text.startswith(STAGE_REFERENCE):
        return text
    if kind == "reward":
        function = FUNCTION.fullmatch(text)
        if function and function["place"].endswith(".py"):
            return f"{_absolute(function['place'], base)}:{function['function']}"
        return text if function else locate(text, "model", base)
    if kind == "source":
        if text.startswith("tfds:"):
            return text
        if text.endswith(DATA_SUFFIXES):
            return _absolute(text, base)
    if kind == "path" or text[0] in "./~" or _exists(base / text.split("/")[0]):
        return _absolute(text, base)
    return text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _absolute(text: str, base: Path) -> str:
    return os.path.normpath(os.path.join(base, os.path.expanduser(text)))


def merge(old: Value, new: Value, once: tuple[list[str], str] | None = None) -> Value:
    """`new` over `old`, key by key; with `once` a value that both give is an error."""
    if isinstance(new.data, Indexed):
        if isinstance(old.data, list):
            items = list(old.data)
            for index, value in new.data.items():
                i = int(index)
                if i < len(items):
                    items[i] = merge(items[i], value)
                else:
                    items.append(value)
            return dataclasses.replace(old, data=items)
        if isinstance(old.data, Indexed):
            both = Indexed(old.data)
            for index, value in new.data.items():
                inner = (once[0], f"{once[1]}.{index}") if once else None
                both[index] = merge(both[index], value, inner) if index in both else value
            return dataclasses.replace(new, data=both)
        return new
    if isinstance(new.data, Every):
        if isinstance(old.data, Indexed):
            each = Indexed({index: merge(item, new.data[0]) for index, item in old.data.items()})
            return dataclasses.replace(old, data=each)
        if isinstance(old.data, list) and old.data:
            return dataclasses.replace(
                old, data=type(old.data)(merge(item, new.data[0]) for item in old.data)
            )
        return new
    if isinstance(old.data, dict) and isinstance(new.data, dict):
        merged = dict(old.data)
        for key, value in new.data.items():
            inner = (once[0], f"{once[1]}.{key}") if once else None
            merged[key] = merge(merged[key], value, inner) if key in merged else value
        return dataclasses.replace(new, data=merged)
    if once and not isinstance(new.data, dict):
        once[0].append(f"{once[1]} ({new.place}): given twice, first at {old.place}")
    return new


# ------------------------------------------------------------------------------------- validation


def build(
    section: type[S],
    tree: Value,
    errors: list[str],
    second_pass: SecondPass | None = None,
    context: str = "",
) -> S | None:
    """The validated section, or None with everything that is wrong appended to `errors`.

    What is wrong is taken out and the rest checked again, so that one bad value hides neither
    missing keys nor contradictions nor errors of the second pass.
    """
    where: dict[Path_, Value] = {}
    data = _plain(tree, (), where)
    removed: list[str] = []
    found: list[str] = []
    config: S | None = None
    skip = None
    for _ in range(100):
        try:
            config = section.model_validate(data, context=skip)
            break
        except pydantic.ValidationError as invalid:
            for error in invalid.errors(include_url=False):
                path = _real_path(section, error["loc"])
                for message in _messages(section, error, path, where, removed):
                    if message not in found:
                        found.append(message)
                if path:
                    removed.append(_remove(data, path))
                else:
                    skip = {"contradictions": False}
    if config is not None and second_pass is not None:
        result = second_pass(config)
        checked = result if isinstance(result, Checked) else Checked(result, config)
        found += [_with_place(text, where) for text in checked.errors if text not in removed]
        config = checked.config
    errors += [context + message for message in found]
    return None if found else config


def _plain(value: Value, path: Path_, where: dict[Path_, Value]) -> Any:
    where[path] = value
    if isinstance(value.data, dict):
        keys = sorted(value.data, key=int) if isinstance(value.data, Indexed) else value.data
        data = {key: _plain(value.data[key], (*path, key), where) for key in keys}
        return list(data.values()) if isinstance(value.data, Indexed) else data
    if isinstance(value.data, list):
        return [_plain(item, (*path, i), where) for i, item in enumerate(value.data)]
    return value.data


def _real_path(section: type[Section], loc: tuple[str | int, ...]) -> Path_:
    """pydantic's location without the names of union members it appends."""
    path: Path_ = ()
    for part in loc:
        above = find(section, path)
        if above is None or above.kind == "scalar":
            break
        if above.kind == "section" and not isinstance(part, str):
            break
        if above.kind == "list" and not isinstance(part, int):
            break
        path = (*path, part)
    return path


def dotted(path: Path_) -> str:
    """A path as users write it."""
    return ".".join(map(str, path))


def _place(path: Path_, where: dict[Path_, Value]) -> str:
    """` (file:line)` of a path, or of what holds it; nothing where nobody wrote it."""
    while path and path not in where:
        path = path[:-1]
    return f" ({where[path].place})" if path and where[path].place else ""


def _messages(
    section: type[Section],
    error: Any,
    path: Path_,
    where: dict[Path_, Value],
    removed: list[str],
) -> list[str]:
    name, place = dotted(path), _place(path, where)
    shape = find(section, path)
    if error["type"] == "extra_forbidden":
        return [f"{name}{place}: {unknown(section, path)}"]
    if error["type"] == "missing":
        said = f"{shape.accepts}" if shape else ""
        return [f"{name}{place}: is needed: {said}"]
    if error["type"] == "value_error" and (shape is None or shape.kind == "section"):
        texts = str(error["ctx"]["error"]).split("\n")
        return [m for text in texts if (m := _contradiction(text, path, where, removed))]
    if shape is None:
        return [f"{name}{place}: {error['msg']}"]
    given = where.get(path)
    got = places.kind(given) if given is not None else repr(error.get("input"))
    said = f"{name}{place}: expected {shape.accepts}; got {got}"
    if shape.choices and isinstance(error.get("input"), str):
        names = tuple(str(choice) for choice in shape.choices)
        if close := nearest(error["input"], names):
            said += f"; did you mean {close}?"
    return [said]


def unknown(section: type[Section], path: Path_) -> str:
    """What to say of a key that is not there."""
    above = find(section, path[:-1])
    near = above.section if above is not None and above.section is not None else section
    prefix = path[:-1]
    names = tuple(fields(near))
    # What is written inside a section is seldom meant for another, unless it is spelled alike.
    found = nearest(str(path[-1]), names, tuple(leaves(section)), 0.85 if prefix else 0.75)
    if found in names:
        found = dotted((*prefix, found))
    if found:
        return f"unknown key; did you mean {found}?"
    for entry, lists in entries(section).items():
        key = next((key for key in lists if dotted(prefix) in ("", key, key.partition(".")[0])), "")
        if key and entry.shorthand and path[-1] in fields(entry):
            shown = f"{key}={{{entry.shorthand}: ..., {path[-1]}: ...}}"
            return f"unknown key; it is one of an entry of {key}, write '{shown}'"
    here = f"keys of {dotted(prefix)}" if prefix else "keys"
    return f"unknown key; {here}: {', '.join(names)}"


_MENTION = re.compile(r"[a-z_]\w*(?:\.\w+)*")


def _contradiction(text: str, path: Path_, where: dict[Path_, Value], removed: list[str]) -> str:
    """The message under its full name with the places of what it mentions; empty if it only
    follows from a value that was already found wrong."""
    if path and not text.startswith(dotted(path)):
        text = f"{dotted(path)}.{text}" if _MENTION.match(text) else f"{dotted(path)}: {text}"
    mentions = [m for m in _MENTION.findall(text) if not _is_word(m, text)]
    subject = mentions[0] if mentions else ""
    for gone in removed:
        below = [m for m in mentions if m == gone or m.startswith(gone + ".")]
        if below or gone.startswith(subject + "."):
            return ""
    known = {dotted(p): v.place for p, v in where.items() if p}
    candidates = mentions + [f"{dotted(path)}.{m}" for m in mentions if path]
    written = [known[m] for m in candidates if known.get(m)]
    unique = list(dict.fromkeys(written))
    return f"{text} ({', '.join(unique)})" if unique else text


def _is_word(mention: str, text: str) -> bool:
    """A bare name counts as a key only where a value follows it or it opens the message."""
    if "." in mention or text.startswith(mention):
        return False
    return re.search(rf"\b{re.escape(mention)}\b (?:=|and|are|is)", text) is None


def _with_place(text: str, where: dict[Path_, Value]) -> str:
    """`key: message` of a second pass with the key's place put in."""
    name, colon, rest = text.partition(": ")
    path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    if colon and path in where:
        return f"{name}{_place(path, where)}: {rest}"
    return text


def _remove(data: Any, path: Path_) -> str:
    """Takes a value, or the nearest thing that holds it, out of the data; says what went."""
    for depth in range(len(path), 0, -1):
        holder = data
        try:
            for part in path[: depth - 1]:
                holder = holder[part]
            del holder[path[depth - 1]]
        except (KeyError, IndexError, TypeError):
            continue
        return dotted(path[:depth])
    return dotted(path)


# ----------------------------------------------------------------------------------------- output


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    ambiguous = not isinstance(places.plain(text), str) or "${" in text
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text.replace("${", "$${"), style="'" if ambiguous else None
    )


_Dumper.add_representer(str, _text)


def to_yaml(config: Section) -> str:
    """The resolved configuration, everything filled; `load` reads it back equal."""
    return yaml.dump(
        config.model_dump(mode="python"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def save(config: StageConfig, file: str | Path) -> None:
    """Writes `config.yaml`, whole or not at all."""
    path = Path(file)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, path)
