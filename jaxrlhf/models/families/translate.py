# SPDX-License-Identifier: Apache-2.0
"""A whole config.json to a ModelConfig and back.

A field that nothing reads, and that is not listed as harmless, is refused: what changes the maths
must not be ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrlhf.errors import ModelError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families.describe import REQUIRED, Field
from jaxrlhf.models.families.table import FAMILIES, HARMLESS, MUST_BE


def supported() -> str:
    """The model types that can be read, for messages."""
    return ", ".join(sorted(FAMILIES))


def _read_field(entry: Field, hf: Mapping[str, Any], problems: list[str]) -> Any:
    given = {name: hf[name] for name in (entry.hf, *entry.also) if hf.get(name) is not None}
    if not given and entry.nullable and entry.hf in hf:
        value = None
    elif not given:
        if entry.default is REQUIRED:
            problems.append(f"{entry.hf} is missing")
            return None
        value = entry.default
    else:
        value = next(iter(given.values()))
        if any(other != value for other in given.values()):
            problems.append(f"{given} disagree: they name the same thing")
    if entry.names is None or value is None:
        return value
    if value not in entry.names:
        choices = ", ".join(sorted(map(str, entry.names)))
        problems.append(f"{entry.hf} = {value!r}: supported are {choices}")
        return None
    return entry.names[value]


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture that a config.json describes, in the spelling of transformers 4 or 5.

    Raises:
        ModelError: model_type is not supported, a field is missing or has a value we do not
            compute, or a field is there that nothing reads; all of them in one message.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{where}: model_type = {kind!r} is not supported; supported: {supported()}"
        )
    family = FAMILIES[kind]
    problems: list[str] = []
    values: dict[str, Any] = {"family": kind, **family.constants}
    known = set(HARMLESS) | family.harmless
    for entry in family.fields:
        known |= {entry.hf, *entry.also}
        value = _read_field(entry, hf, problems)
        values |= dict.fromkeys(entry.ours, value)
    if values.get("mlp_dim") is None and isinstance(values.get("hidden_size"), int):
        values["mlp_dim"] = 4 * values["hidden_size"]
    for part in family.parts:
        known |= part.known
        part.read(hf, values, problems)
    for name, accepted in {**MUST_BE, **family.must_be}.items():
        if name in known:
            continue
        known.add(name)
        if name in hf and hf[name] not in accepted:
            problems.append(f"{name} = {hf[name]!r} is not supported (only {accepted[0]!r})")
    for name, value in hf.items():
        if name not in known and not name.startswith("_") and value is not None:
            problems.append(
                f"{name} = {value!r} is not read: remove it if it does not change the maths"
            )
    if not problems:
        try:
            return ModelConfig(**values)
        except (ModelError, TypeError) as error:
            problems.append(str(error))
    raise ModelError(
        f"{where} ({kind}) cannot be used: "
        + "; ".join(problems)
        + f". Supported model types: {supported()}"
    )


def config_to_hf(config: ModelConfig, kind: str = "lm") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read; the inverse of `config_from_hf`.

    Raises ModelError if the family cannot express the config (llama with biases on q, k, v only).
    """
    if config.family not in FAMILIES:
        raise ModelError(f"family = {config.family!r} is not supported; supported: {supported()}")
    family = FAMILIES[config.family]
    if kind not in family.architectures:
        raise ModelError(f"kind = {kind!r}: one of {', '.join(family.architectures)}")
    hf: dict[str, Any] = {
        "architectures": [family.architectures[kind]],
        "model_type": config.family,
    }
    for entry in family.fields:
        value = getattr(config, entry.ours[0])
        if entry.names is not None:
            value = next((name for name, ours in entry.names.items() if ours == value), value)
        hf[entry.hf] = value
    for part in family.parts:
        hf |= part.write(config)
    back = config_from_hf(hf, "the exported config")
    if back != config:
        differs = [
            f"{f.name} = {getattr(config, f.name)!r}"
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != getattr(back, f.name)
        ]
        raise ModelError(f"a {config.family} folder cannot express {', '.join(differs)}")
    return hf
