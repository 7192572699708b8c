# SPDX-License-Identifier: Apache-2.0
"""The words in which a family is described."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxrlhf.models.config import ModelConfig


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Field:
    """One field of config.json.

    Attributes:
        hf: its name there; `also` are other names for the same.
        ours: the ModelConfig fields it sets (several: all equal).
        default: what transformers takes if it is absent or null.
        nullable: null is a value of its own: only absence means the default.
        names: the values, theirs to ours; None = as they are.
    """

    hf: str
    ours: tuple[str, ...]
    default: Any = REQUIRED
    also: tuple[str, ...] = ()
    names: Mapping[Any, Any] | None = None
    nullable: bool = False


class Part(Protocol):
    """Fields of config.json that say one thing together."""

    @property
    def known(self) -> frozenset[str]:
        """The fields of config.json that it reads."""
        ...

    def read(self, hf: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        """Adds ModelConfig fields to `values` (those of `Field`s are there), or says what is
        wrong."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that read back as this."""
        ...


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file ("{layer}" and "{expert}" stand for numbers).

    Attributes:
        leaves: paths in our tree; several = they stand side by side in it, along our last axis.
        transpose: stored [out, in] (torch's Linear) where ours is [in, out].
        by_head: the several stand side by side within each head: q, k, v of head 0, of head 1, ...
        also: other names that files have for it.
    """

    hf: str
    leaves: tuple[str, ...]
    transpose: bool = False
    by_head: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers is read and written.

    Attributes:
        architectures: class name in transformers per kind of model ("lm", "reward").
        constants: ModelConfig fields that all its members share.
        fields, parts, tensors: the translation.
        must_be: config.json fields that switch maths we do not have: accepted values.
        harmless: further fields of config.json without influence on the forward pass.
        prefix: what names of tensors begin with; files of the bare model lack it.
        buffers: endings of tensor names that are constants, not weights: skipped when read.
    """

    architectures: Mapping[str, str]
    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...] = ()
    must_be: Mapping[str, tuple] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    prefix: str = ""
    buffers: tuple[str, ...] = ()
