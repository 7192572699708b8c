# SPDX-License-Identifier: Apache-2.0
"""The sections read as data: which keys there are, what each accepts, which name is near."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from jaxrlhf.config.base import KeyOf, OnResume, Section, Where


@dataclasses.dataclass(frozen=True)
class Shape:
    """What stands at a place of the tree of settings."""

    kind: Literal["section", "list", "dict", "scalar"]
    accepts: str
    section: type[Section] | None = None
    item: Shape | None = None
    where: str | None = None  # kind of place the text names, see base.Where
    table: KeyOf | None = None  # of the functions that the text names, see base.KeyOf
    resume: str = "refuse"  # see base.OnResume
    text: bool = False  # a text is wanted: what was written counts, not its YAML type
    choices: tuple[Any, ...] = ()
    optional: bool = False


def limits(marks: Sequence[Any]) -> str:
    """The limits among the marks of an annotation, in words that follow what it is."""
    low = [m for m in marks if isinstance(m, Ge | Gt)]
    high = [m for m in marks if isinstance(m, Le | Lt)]
    said = ""
    for m in low[-1:]:
        said += f" >= {m.ge:g}" if isinstance(m, Ge) else f" > {m.gt:g}"
    for m in high[-1:]:
        said += " and" if low else ""
        said += f" <= {m.le:g}" if isinstance(m, Le) else f" < {m.lt:g}"
    return said


def within(value: Any, marks: Sequence[Any]) -> bool:
    """Whether a number keeps the limits among the marks of an annotation."""
    return all(
        not (isinstance(m, Ge) and value < m.ge)
        and not (isinstance(m, Gt) and value <= m.gt)
        and not (isinstance(m, Le) and value > m.le)
        and not (isinstance(m, Lt) and value >= m.lt)
        for m in marks
    )


def _scalar_words(annotation: Any, marks: list[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, str(annotation)) + limits(marks)


def shape_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> Shape:
    """The shape of an annotation, with the marks and limits found on the way to its core."""
    marks = list(metadata)
    while typing.get_origin(annotation) is Annotated:
        annotation, *more = typing.get_args(annotation)
        marks = [*more, *marks]
    resume = next((m.rule for m in marks if isinstance(m, OnResume)), "refuse")
    where = next((m.kind for m in marks if isinstance(m, Where)), None)
    origin = typing.get_origin(annotation)

    if origin in (Union, types.UnionType):
        parts = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = len(parts) < len(typing.get_args(annotation))
        shapes = [shape_of(part) for part in parts]
        first = shapes[0]
        said = " or ".join([*(s.accepts for s in shapes), *(["null"] if optional else [])])
        rule = resume if resume != "refuse" else first.resume
        if len(shapes) == 1:
            return dataclasses.replace(
                first, accepts=said, optional=optional, resume=rule, where=where or first.where
            )
        choices = tuple(c for s in shapes for c in s.choices)
        text = all(s.text for s in shapes)
        return Shape("scalar", said, choices=choices, resume=rule, text=text, optional=optional)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        keys = ", ".join(annotation.model_fields)
        return Shape("section", f"keys ({keys})", section=annotation, resume=resume)
    if origin is list:
        item = shape_of(typing.get_args(annotation)[0])
        rule = resume if resume != "refuse" else item.resume
        return Shape("list", f"a list, each {item.accepts}", item=item, resume=rule)
    if origin is dict:
        item = shape_of(typing.get_args(annotation)[1])
        return Shape("dict", f"a mapping of names to {item.accepts}", item=item, resume=resume)
    if origin is Literal:
        choices = list(typing.get_args(annotation))
        said = ", ".join(map(str, choices))
        said = f"one of {said}" if len(choices) > 1 else said
        text = all(isinstance(c, str) for c in choices)
        return Shape("scalar", said, choices=tuple(choices), resume=resume, text=text)
    said = _scalar_words(annotation, marks)
    if where:
        said = {"path": "a path", "model": "a model", "source": "data", "reward": "a reward"}[where]
    table = next((m for m in marks if isinstance(m, KeyOf)), None)
    text = annotation is str
    return Shape("scalar", said, where=where, table=table, resume=resume, text=text)


@functools.cache
def fields(section: type[Section]) -> dict[str, Shape]:
    """The shapes of a section's own fields, by name."""
    return {
        name: shape_of(info.annotation, tuple(info.metadata))
        for name, info in section.model_fields.items()
    }


def allows_extra(section: type[Section]) -> bool:
    """Whether other keys are parameters of an algorithm, checked in the second pass."""
    return section.model_config.get("extra") == "allow"


@functools.cache
def leaves(section: type[Section], prefix: str = "") -> dict[str, tuple[Shape, FieldInfo]]:
    """Every dotted key below a section that is not itself a section, in order."""
    found: dict[str, tuple[Shape, FieldInfo]] = {}
    for name, shape in fields(section).items():
        if shape.kind == "section" and shape.section is not None:
            found |= leaves(shape.section, f"{prefix}{name}.")
        else:
            found[prefix + name] = (shape, section.model_fields[name])
    return found


def entries(section: type[Section]) -> dict[type[Section], tuple[str, ...]]:
    """{section: keys} of the lists whose entries are mappings themselves."""
    found: dict[type[Section], tuple[str, ...]] = {}
    for key, (shape, _) in leaves(section).items():
        if shape.item is not None and shape.item.section is not None:
            inner = shape.item.section
            found[inner] = (*found.get(inner, ()), key)
    return found


def find(section: type[Section], path: tuple[str | int, ...]) -> Shape | None:
    """The shape at a path, or None where there is none (an unknown or an extra key)."""
    shape: Shape | None = Shape("section", "", section=section)
    for part in path:
        if shape is None:
            return None
        if shape.kind == "section" and shape.section is not None:
            shape = fields(shape.section).get(str(part))
        else:
            shape = shape.item
    return shape


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


# What other libraries and papers call these; only for suggestions.
SYNONYMS = {
    "bs": "batch_size",
    "wd": "weight_decay",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "clip": "clip_norm",
    "gradient_clipping": "clip_norm",
    "max_steps": "steps",
    "iterations": "steps",
    "num_epochs": "epochs",
    "gradient_accumulation": "accumulation",
    "grad_accum": "accumulation",
    "accum": "accumulation",
    "optimizer": "name",
    "beta1": "b1",
    "beta2": "b2",
    "epsilon": "eps",
    "dp": "data",
    "tp": "tensor",
    "num_generations": "samples_per_prompt",
    "group_size": "samples_per_prompt",
    "function": "source",
    "model_name": "path",
    "name_or_path": "path",
    "max_tokens": "max_new_tokens",
    "max_seq_length": "max_length",
    "gradient_checkpointing": "remat",
    "checkpoint_every": "save_every",
    "test": "eval",
    "valid": "eval",
    "validation": "eval",
}


def nearest(
    name: str, near: tuple[str, ...], elsewhere: tuple[str, ...] = (), cutoff: float = 0.75
) -> str | None:
    """The key that was probably meant: among its neighbours `near`, else anywhere.

    Tries spelling that differs only in case or separators, known synonyms, initials (`lr`), then
    difflib. `elsewhere` holds full dotted keys, compared by their last part, which must be alike to
    `cutoff`.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    def among(names: dict[str, str], cutoff: float) -> str | None:
        for short, full in names.items():
            if plain(short) == plain(name) or SYNONYMS.get(name) == short:
                return full
        for short, full in names.items():
            if "_" in short and _initials(short) == name.lower():
                return full
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=cutoff)
        return names[close[0]] if close else None

    return among({n: n for n in near}, 0.6) or among(
        {full.rsplit(".", 1)[-1]: full for full in reversed(elsewhere)}, cutoff
    )


def walk(section: Section, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any, Shape]]:
    """(path, value, shape) of every leaf of a filled section; lists of sections are entered."""

    def enter(value: Any, path: tuple[str | int, ...], shape: Shape | None):
        if isinstance(value, Section):
            yield from walk(value, path)
        elif isinstance(value, list) and shape is not None and shape.item is not None:
            inner = shape.item
            if shape.resume != "refuse":
                inner = dataclasses.replace(inner, resume=shape.resume)
            for i, item in enumerate(value):
                yield from enter(item, (*path, i), inner)
        else:
            yield path, value, shape or Shape("scalar", "")

    shapes = fields(type(section))
    for name in type(section).model_fields:
        yield from enter(getattr(section, name), (*prefix, name), shapes[name])
    for name, value in (section.model_extra or {}).items():
        yield (*prefix, name), value, Shape("scalar", "")
