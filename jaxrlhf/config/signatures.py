# SPDX-License-Identifier: Apache-2.0
"""The second pass: a named algorithm's keyword-only parameters are the keys of its section.

`def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta: float = 0.1, ...)` makes `loss.beta`
a key with a type and a default as soon as `loss.name` is `dpo`. Nothing here imports an algorithm:
the stage hands its tables in.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union

from jaxrlhf.config.base import Section
from jaxrlhf.config.load import Checked
from jaxrlhf.config.schema import limits, nearest, within

Function = Callable[..., Any]
Table = Mapping[str, Function]


def _annotations(function: Function) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError):  # shapes of arrays that only a type checker resolves
        return dict(getattr(inspect.unwrap(function), "__annotations__", {}))


def keys(function: Function) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters: what may stand in the function's section."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def statistics(function: Function) -> tuple[str, ...]:
    """The positional parameters: what the stage computes and hands over, in order."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in positional)


def words(annotation: Any) -> str:
    """What an annotation accepts, in words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return words(parts[0]) + limits(parts[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (tuple, list) or annotation in (tuple, list):
        inner = [part for part in parts if part is not Ellipsis]
        return "a list" + (f", each {words(inner[0])}" if inner else "")
    plain = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return plain.get(annotation, "a value")


_WRONG = object()


def convert(value: Any, annotation: Any) -> Any:
    """The value as the annotation wants it and within its limits, or `_WRONG`: 1 is a float, 1.0 an
    int, true neither."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is inspect.Parameter.empty or annotation is Any:
        return value
    if origin is Annotated:
        found = convert(value, parts[0])
        return found if found is not _WRONG and within(found, parts[1:]) else _WRONG
    if origin in (Union, types.UnionType):
        exact = [p for p in parts if isinstance(p, type) and type(value) is p]
        for part in [*exact, *parts]:
            if (found := convert(value, part)) is not _WRONG:
                return found
        return _WRONG
    if origin is Literal:
        same = [part for part in parts if type(part) is type(value) and part == value]
        return same[0] if same else _WRONG
    if origin in (tuple, list) or annotation in (tuple, list):
        if not isinstance(value, list | tuple):
            return _WRONG
        inner = next((part for part in parts if part is not Ellipsis), Any)
        items = [convert(item, inner) for item in value]
        if any(item is _WRONG for item in items):
            return _WRONG
        return tuple(items) if (origin or annotation) is tuple else items
    if annotation is type(None):
        return None if value is None else _WRONG
    if annotation is bool:
        return value if isinstance(value, bool) else _WRONG
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        finite = number and value == value and abs(value) != float("inf")
        return float(value) if finite else _WRONG
    if annotation is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole and not isinstance(value, bool) else _WRONG
    if annotation is str:
        return value if isinstance(value, str) else _WRONG
    return value


def keywords(function: Function, section: Section) -> dict[str, Any]:
    """The keyword arguments a section holds for a function, as `function(..., **keywords)`."""
    given = {**(section.model_extra or {}), **{k: getattr(section, k) for k in _declared(section)}}
    return {name: given[name] for name in keys(function) if name in given}


def _declared(section: Section) -> tuple[str, ...]:
    return tuple(type(section).model_fields)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def check_section(
    section: Section, prefix: str, functions: Mapping[str, Function]
) -> tuple[list[str], dict[str, Any]]:
    """The extra keys of one section against the functions chosen there, {what chose it: function}.

    Returns errors as `prefix.key: message`, and the section's extras with every default filled in.
    A key that the section itself declares (`epochs`...) is not an algorithm's parameter, and its
    value goes to the function of the same parameter name.
    """
    accepted: dict[str, tuple[Any, Any]] = {}  # name: (annotation, default)
    for function in functions.values():
        hints = _annotations(function)
        for name, parameter in keys(function).items():
            if name not in _declared(section):
                annotation = hints.get(name, parameter.annotation)
                accepted.setdefault(name, (annotation, parameter.default))
    errors: list[str] = []
    filled: dict[str, Any] = {}
    given = dict(section.model_extra or {})
    for name, value in given.items():
        if name in accepted:
            annotation, _ = accepted[name]
            found = convert(value, annotation)
            if found is _WRONG:
                errors.append(f"{prefix}.{name}: expected {words(annotation)}; got {_shown(value)}")
            else:
                filled[name] = found
            continue
        chosen = ", ".join(f"{prefix}.{key}" for key in functions)
        names = (*accepted, *_declared(section))
        close = nearest(name, names)
        hint = f"did you mean {prefix}.{close}?" if close else f"keys here: {', '.join(names)}"
        errors.append(f"{prefix}.{name}: unknown key for the chosen {chosen}; {hint}")
    for name, (annotation, default) in accepted.items():
        if name in given:
            continue
        if default is inspect.Parameter.empty:
            errors.append(f"{prefix}.{name}: is needed: {words(annotation)}")
        else:
            filled[name] = default
    return errors, {name: filled[name] for name in accepted if name in filled}


def check(config: Any, tables: Mapping[str, Table | Function]) -> Checked:
    """The whole second pass of a stage.

    Args:
        config: a stage's configuration after the first pass.
        tables: {dotted key that names an algorithm: its table}, e.g. `{"loss.name":
            PREFERENCE_LOSSES}`. A function instead of a table takes part always, whatever the
            key: `{"rl.values": clipped_value}`.
    """
    errors: list[str] = []
    chosen: dict[str, dict[str, Function]] = {}
    undecided: set[str] = set()
    for key, table in tables.items():
        prefix, _, field = key.rpartition(".")
        if callable(table):
            chosen.setdefault(prefix, {})[field] = table
            continue
        name = getattr(_at(config, prefix), field)
        if name in table:
            chosen.setdefault(prefix, {})[field] = table[name]
            continue
        close = nearest(str(name), tuple(table))
        hint = f"; did you mean {close}?" if close else ""
        errors.append(f"{key}: expected one of {', '.join(sorted(table))}; got {name!r}{hint}")
        undecided.add(prefix)
    for prefix, functions in chosen.items():
        if prefix in undecided:
            continue  # which keys are right depends on the name that is not
        section = _at(config, prefix)
        found, extras = check_section(section, prefix, functions)
        errors += found
        if not found:
            config = _replace(config, prefix, section.model_copy(update=extras))
    return Checked(errors, config)


def _at(config: Any, prefix: str) -> Any:
    for part in prefix.split("."):
        config = getattr(config, part)
    return config


def _replace(config: Any, prefix: str, section: Section) -> Any:
    first, _, rest = prefix.partition(".")
    inner = _replace(getattr(config, first), rest, section) if rest else section
    return config.model_copy(update={first: inner})
