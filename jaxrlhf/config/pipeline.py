# SPDX-License-Identifier: Apache-2.0
"""A pipeline file: stages in order, each checked with its own sections before anything runs.

    seed: 0
    defaults: {train: {batch_size: 64}}       # given to every stage that has such a key
    stages:
      - {stage: world}
      - {name: sft, stage: sft, model: PATH, data: stage:world/demonstrations.jsonl}
      - {stage: ppo, model: stage:sft, ..., for_each: {rl.kl_coef: [0.01, 0.1]}}
      - {stage: report, runs: [stage:sft, stage:ppo]}

Where a path can stand, `stage:NAME` is the run directory of an earlier stage and
`stage:NAME/file` a file in it. `for_each` repeats a stage over values of a key (several keys: their
lists go in step); the repetitions are NAME[0], NAME[1]... in folders NAME-0, NAME-1..., and in a
list `stage:NAME` stands for all of them. `for_each: {model: stage:NAME}` goes over them too.
(Inside [...] and {...} YAML wants 'stage:NAME[0]' in quotes.)

On the command line `NAME.key=value` changes the stage NAME, and `defaults.key=value` every stage
that has such a key and does not set it. A key of for_each has its values there alone, so they are
changed there: 'ppo.for_each.rl.kl_coef=[0.2]'.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config import places
from jaxrlhf.config.base import Section
from jaxrlhf.config.load import (
    STAGE_REFERENCE,
    SecondPass,
    build,
    dotted,
    listing,
    locate,
    merge,
    settle,
    translate,
)
from jaxrlhf.config.places import Value, to_python
from jaxrlhf.config.schema import Shape, allows_extra, fields, find, nearest, walk
from jaxrlhf.config.stages import PIPELINE_STAGES, STAGES, StageConfig
from jaxrlhf.errors import ConfigError

TOP = ("seed", "output_dir", "defaults", "stages")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(
    r"stage:(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)(?:\[(?P<index>\d+)\])?(?:/(?P<file>.*))?"
)


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One stage as it will run; its config may still hold `stage:` references."""

    name: str  # NAME, or NAME[0]...
    group: str  # NAME
    stage: str  # a key of STAGES
    folder: str  # below the pipeline's directory
    config: StageConfig
    parents: tuple[str, ...]  # names of stages whose outputs it reads
    values: dict[str, Any]  # the for_each values that make it this repetition


@dataclasses.dataclass(frozen=True)
class PipelinePlan:
    """Stages in the order in which they run."""

    name: str
    seed: int
    output_dir: str
    stages: tuple[PlannedStage, ...]


def load_pipeline(
    files: str | Path | Iterable[str | Path],
    overrides: Iterable[str] = (),
    second_pass: SecondPass | None = None,
    *,
    note: Callable[[str], object] | None = None,
) -> PipelinePlan:
    """The plan in one or several files (later ones override, stages by name) and `key=value`.

    Overrides are `seed=`, `output_dir=`, `defaults.KEY=` and `NAME.KEY=` for the stage NAME.
    Raises ConfigError naming every error of every stage.
    """
    files = [files] if isinstance(files, str | Path) else list(files)
    errors: list[str] = []
    top: dict[str, Value] = {}
    for file in files:
        if (tree := places.read_file(file, errors)) is not None:
            top = _over(top, tree, errors)
    unreadable = bool(errors) and not top
    entries = [] if unreadable else _entries(top.get("stages"), errors)
    named = dict(entries)
    for text in overrides:
        if (tree := places.read_override(text, errors)) is not None:
            _override(top, named, tree, errors)

    seed = _seed(top.get("seed"), errors)
    stem = Path(files[0]).stem if files else "pipeline"
    output = f"runs/{stem}"
    if (given := top.get("output_dir")) is not None:
        # As it was written: a folder may be called 20240601.
        name = given.data if isinstance(given.data, str) else given.text
        if name:
            output = locate(name, "path", given.base)
        else:
            errors.append(f"output_dir ({given.place}): expected a path; got {places.kind(given)}")
    planner = _Planner(seed, top.get("defaults"), second_pass, note, errors)
    for name, _ in entries:
        planner.add(name, named[name])
    planner.unused_defaults()
    if errors:
        raise ConfigError(listing(errors, f"{', '.join(map(str, files))}: "))
    return PipelinePlan(stem, seed, output, tuple(planner.planned))


def _over(top: dict[str, Value], tree: Value, errors: list[str]) -> dict[str, Value]:
    merged = dict(top)
    for key, value in tree.data.items():
        first, _, rest = key.partition(".")
        if first not in TOP:
            close = nearest(first, TOP)
            hint = f"did you mean {close}?" if close else f"keys here: {', '.join(TOP)}"
            errors.append(f"{key} ({value.place}): unknown key of a pipeline; {hint}")
            continue
        if rest:
            value = dataclasses.replace(value, data={rest: value}, text=None)
        if first == "stages" and first in merged:
            value = _stages_over(merged[first], value)
        elif first in merged:
            value = merge(merged[first], value)
        merged[first] = value
    return merged


def _stages_over(old: Value, new: Value) -> Value:
    """A later file's stages: one with a known name changes that stage, another is appended."""
    if not isinstance(old.data, list) or not isinstance(new.data, list):
        return new
    items = list(old.data)
    names = [_entry_name(item) for item in items]
    for item in new.data:
        name = _entry_name(item)
        if name in names and name is not None:
            i = names.index(name)
            items[i] = merge(items[i], item)
        else:
            items.append(item)
    return dataclasses.replace(old, data=items)


def _entry_name(entry: Value) -> str | None:
    if not isinstance(entry.data, dict):
        return None
    named = entry.data.get("name", entry.data.get("stage"))
    return str(named.data) if named is not None else None


def _entries(stages: Value | None, errors: list[str]) -> list[tuple[str, Value]]:
    if stages is None or not isinstance(stages.data, list) or not stages.data:
        place = f" ({stages.place})" if stages is not None else ""
        errors.append(f"stages{place}: is needed: a list of {{stage: ..., key: value...}}")
        return []
    found: dict[str, Value] = {}
    for entry in stages.data:
        if not isinstance(entry.data, dict):
            errors.append(f"stages ({entry.place}): a stage is a mapping, e.g. {{stage: sft}}")
            continue
        stage = entry.data.get("stage")
        if stage is None or stage.data not in PIPELINE_STAGES:
            said = "is needed" if stage is None else f"got {places.kind(stage)}"
            close = stage is not None and nearest(str(stage.data), PIPELINE_STAGES)
            hint = f"; did you mean {close}?" if close else ""
            place = (stage or entry).place
            errors.append(f"stage ({place}): {said}: one of {', '.join(PIPELINE_STAGES)}{hint}")
            continue
        name = _entry_name(entry) or ""
        if not _NAME.fullmatch(name) or name in TOP:
            errors.append(
                f"name ({entry.place}): {name!r} cannot name a stage: letters, digits, - and _, "
                f"other than {', '.join(TOP)}"
            )
        elif name in found:
            errors.append(
                f"name ({entry.place}): {name} names two stages, first at {found[name].place}; "
                "give one of them another name"
            )
        else:
            found[name] = entry
    return list(found.items())


def _override(
    top: dict[str, Value], entries: dict[str, Value], tree: Value, errors: list[str]
) -> None:
    ((key, value),) = tree.data.items()
    first, _, rest = key.partition(".")
    if first in ("seed", "output_dir") and not rest:
        top[first] = value
    elif first == "defaults" and rest:
        inner = Value({rest: value}, value.place)
        old = top.get("defaults")
        top["defaults"] = Value([old, inner], value.place) if old is not None else inner
    elif first in entries and rest:
        inner = Value({rest: value}, value.place)
        entries[first] = dataclasses.replace(
            entries[first], data={**entries[first].data, **_later(entries[first], inner)}
        )
    else:
        names = ("seed", "output_dir", "defaults", *entries)
        close = nearest(first, names)
        hint = f"did you mean {close}?" if close else f"{', '.join(names)}"
        errors.append(f"{value.place}: an override is NAME.key=value for a stage NAME; {hint}")


LATER = "\0overrides"  # overrides of one stage, in order, beside its own keys


def _later(entry: Value, tree: Value) -> dict[str, Value]:
    old = entry.data.get(LATER)
    return {LATER: Value([*(old.data if old is not None else []), tree], tree.place)}


def _seed(value: Value | None, errors: list[str]) -> int:
    if value is None:
        return 0
    whole = isinstance(value.data, int) and not isinstance(value.data, bool)
    if whole and 0 <= value.data < 2**63:
        return value.data
    errors.append(
        f"seed ({value.place}): expected a whole number >= 0 and < 2**63; got {places.kind(value)}"
    )
    return 0


class _Planner:
    """Checks stages one after the other; each may refer to those before it."""

    def __init__(
        self,
        seed: int,
        defaults: Value | None,
        second_pass: SecondPass | None,
        note: Callable[[str], object] | None,
        errors: list[str],
    ):
        self.seed, self.second_pass, self.note, self.errors = seed, second_pass, note, errors
        self.defaults: list[tuple[str, Value]] = []
        parts = defaults.data if defaults is not None and isinstance(defaults.data, list) else None
        for part in parts or ([defaults] if defaults is not None else []):
            self._flatten(part, "")
        self.used: set[str] = set()
        self.planned: list[PlannedStage] = []
        self.repeats: dict[str, int | None] = {}  # NAME: how often, None = once, without index

    def _flatten(self, value: Value, prefix: str) -> None:
        if isinstance(value.data, dict) and value.data:
            for key, inner in value.data.items():
                self._flatten(inner, f"{prefix}.{key}" if prefix else key)
        elif prefix:
            self.defaults.append((prefix, value))
        elif not isinstance(value.data, dict) and value.data is not None:
            self.errors.append(
                f"defaults ({value.place}): expected a mapping of keys to values; got "
                f"{places.kind(value)}"
            )

    def _defaults_for(self, stage: str, section: type[Section]) -> Value:
        tree = Value({}, "")
        for key, value in self.defaults:
            renamed = translate(Value({key: value}, ""), stage, section, [])
            if all(_known(section, name) for name in renamed.data) and renamed.data:
                self.used.add(key)
                tree = merge(tree, settle(renamed, section, self.errors))
        return tree

    def unused_defaults(self) -> None:
        for key, value in self.defaults:
            if key not in self.used:
                names = tuple(n for p in self.planned for n in fields(type(p.config)))
                close = nearest(key.split(".")[0], names) if "." in key else None
                hint = f"; did you mean {close}?" if close and close != key.split(".")[0] else ""
                self.errors.append(
                    f"defaults.{key} ({value.place}): no stage of this pipeline has it{hint}"
                )

    def add(self, name: str, entry: Value) -> None:
        """Plans one entry, repeated as its for_each says."""
        stage = entry.data["stage"].data
        section = STAGES[stage]
        context = f"{name}: "
        errors: list[str] = []
        parts = [entry, *(entry.data[LATER].data if LATER in entry.data else [])]
        for_each: dict[str, Value] = {}
        tree, overrides = self._defaults_for(stage, section), Value({}, "")
        for part in parts:
            own: dict[str, Value] = {}
            for key, value in part.data.items():
                if key in ("name", "stage", LATER):
                    continue
                if key == "for_each" and isinstance(value.data, dict):
                    each = translate(value, stage, section, errors, self.note)
                    for_each.update(each.data)
                elif key.startswith("for_each."):
                    each = Value({key.removeprefix("for_each."): value}, value.place)
                    for_each.update(translate(each, stage, section, errors, self.note).data)
                elif key == "for_each":
                    errors.append(f"for_each ({value.place}): expected {{key: [values]}}")
                elif key == "output_dir":
                    errors.append(
                        f"output_dir ({value.place}): the pipeline gives each stage its folder; "
                        "set output_dir of the pipeline"
                    )
                else:
                    own[key] = value
            renamed = translate(Value(own, part.place), stage, section, errors, self.note)
            settled = settle(renamed, section, errors)
            tree = merge(tree, settled)
            if part is not entry:
                overrides = merge(overrides, settled)
        if "seed" not in tree.data:
            tree = merge(tree, Value({"seed": Value(self.seed, "")}, ""))

        rounds = self._rounds(for_each, errors)
        errors += _unread(name, for_each, overrides, section)
        for i, chosen in enumerate(rounds):
            repeated = tree
            if chosen:
                repeated = merge(tree, settle(Value(dict(chosen), ""), section, errors))
            repeated = self._all_of_group(repeated, Shape("section", "", section=section))
            config = build(section, repeated, errors, self.second_pass)
            if config is None:
                continue
            label = f"{name}[{i}]" if for_each else name
            folder = f"{name}-{i}" if for_each else name
            parents = self._parents(config, repeated, errors)
            values = {key: to_python(value) for key, value in chosen.items()}
            self.planned.append(PlannedStage(label, name, stage, folder, config, parents, values))
        self.errors += [context + error for error in dict.fromkeys(errors)]
        self.repeats[name] = len(rounds) if for_each else None

    def _rounds(self, for_each: dict[str, Value], errors: list[str]) -> list[dict[str, Value]]:
        lists: dict[str, list[Value]] = {}
        for key, value in for_each.items():
            if isinstance(value.data, str) and value.data.startswith(STAGE_REFERENCE):
                lists[key] = self._members(value)
            elif isinstance(value.data, list) and value.data:
                lists[key] = value.data
            else:
                errors.append(
                    f"for_each.{key} ({value.place}): expected a list of values; "
                    f"got {places.kind(value)}"
                )
        counts = {key: len(values) for key, values in lists.items()}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{key} has {n}" for key, n in counts.items())
            errors.append(f"for_each: lists go in step and need one length: {said}")
            return [{}]
        length = max(counts.values(), default=1)
        return [{key: values[i] for key, values in lists.items()} for i in range(length)]

    def _members(self, value: Value) -> list[Value]:
        """The repetitions a `stage:NAME` without index stands for; itself where there are none."""
        found = _REFERENCE.fullmatch(value.data)
        count = self.repeats.get(found["name"]) if found and found["index"] is None else None
        if not found or count is None:
            return [value]
        rest = f"/{found['file']}" if found["file"] is not None else ""
        texts = [f"stage:{found['name']}[{i}]{rest}" for i in range(count)]
        return [dataclasses.replace(value, data=text, text=text) for text in texts]

    def _all_of_group(self, value: Value, shape: Shape | None) -> Value:
        """In lists, `stage:NAME` of a repeated stage becomes one item for each repetition."""
        if shape is None:
            return value
        if isinstance(value.data, dict) and shape.section is not None:
            known = fields(shape.section)
            inner = {k: self._all_of_group(v, known.get(k)) for k, v in value.data.items()}
            return dataclasses.replace(value, data=inner)
        if isinstance(value.data, list) and shape.item is not None:
            items: list[Value] = []
            for item in value.data:
                holder = item.data if isinstance(item.data, dict) else None
                key = shape.item.section.shorthand if shape.item.section is not None else None
                text = holder.get(key or "") if holder is not None else item
                if text is not None and isinstance(text.data, str) and _is_reference(text.data):
                    for member in self._members(text):
                        data = {**holder, key: member} if holder is not None else member.data
                        items.append(dataclasses.replace(item, data=data))
                else:
                    items.append(self._all_of_group(item, shape.item))
            return dataclasses.replace(value, data=items)
        return value

    def _parents(self, config: StageConfig, tree: Value, errors: list[str]) -> tuple[str, ...]:
        names = {planned.name for planned in self.planned}
        known = tuple(self.repeats)
        found: list[str] = []
        for path, value, _ in walk(config):
            if not isinstance(value, str) or not _is_reference(value):
                continue
            key, place = dotted(path), _place_in(tree, path)
            match = _REFERENCE.fullmatch(value)
            if match is None or ".." in (match["file"] or "").split("/"):
                errors.append(
                    f"{key}{place}: {value!r} is not a reference; write stage:NAME, "
                    "stage:NAME[0] or stage:NAME/relative/file"
                )
                continue
            name, index = match["name"], match["index"]
            if name not in self.repeats:
                close = nearest(name, known)
                hint = f"; did you mean {close}?" if close else f": {', '.join(known) or 'none'}"
                errors.append(f"{key}{place}: {name} is not an earlier stage{hint}")
                continue
            count = self.repeats[name]
            label = f"{name}[{index}]" if index is not None else name
            if count is not None and index is None:
                errors.append(
                    f"{key}{place}: {name} is repeated {count} times; say which, {name}[0] to "
                    f"{name}[{count - 1}]"
                )
            elif index is not None and (count is None or int(index) >= count):
                last = f"{name}[0] to {name}[{count - 1}]" if count else "it is not repeated"
                errors.append(f"{key}{place}: there is no {label}: {last}")
            elif label in names:
                found.append(label)
        return tuple(dict.fromkeys(found))


def _unread(
    name: str, for_each: dict[str, Value], overrides: Value, section: type[Section]
) -> Iterator[str]:
    """Overrides of a stage that each of its repetitions would replace: nobody would read them."""
    leaves = _leaves(overrides)
    for key, values in for_each.items():
        for path in _leaves(settle(Value({key: values}, ""), section, [])):
            if path in leaves:
                value = leaves[path]
                shown = value.text if value.text is not None else "..."
                yield (
                    f"{dotted(path)} ({value.place}): the values of {key} are those of for_each "
                    f"({values.place}), and this one would be ignored; say "
                    f"{name}.for_each.{key}=[{shown}] to have it instead of them"
                )


def _leaves(tree: Value, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Value]:
    """{path: value} of what is no mapping."""
    if not isinstance(tree.data, dict):
        return {path: tree}
    found: dict[tuple[str, ...], Value] = {}
    for key, value in tree.data.items():
        found |= _leaves(value, (*path, key))
    return found


def _known(section: type[Section], key: str) -> bool:
    parts = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    for depth in range(len(parts), 0, -1):
        shape = find(section, parts[:depth])
        if shape is not None:
            inside = shape.section is not None and allows_extra(shape.section)
            return depth == len(parts) or shape.kind == "dict" or inside
    return False


def _is_reference(text: str) -> bool:
    return text.startswith(STAGE_REFERENCE)


def _place_in(tree: Value, path: tuple[str | int, ...]) -> str:
    value = tree
    for part in path:
        try:
            value = value.data[part]
        except (KeyError, IndexError, TypeError):
            break
    return f" ({value.place})" if value.place else ""


def resolve(config: StageConfig, outputs: Mapping[str, str | Path]) -> StageConfig:
    """The config with every reference replaced by the folder of the stage it names.

    `outputs` maps names (NAME, NAME[0]...) to folders.
    """

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replace(inner) for inner in value]
        if isinstance(value, str) and (found := _REFERENCE.fullmatch(value)):
            index = f"[{found['index']}]" if found["index"] is not None else ""
            folder = Path(outputs[found["name"] + index])
            return str(folder / found["file"] if found["file"] else folder)
        return value

    return type(config).model_validate(replace(config.model_dump()))
