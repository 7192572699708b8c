# SPDX-License-Identifier: Apache-2.0
"""What every configuration section is made of. No jax here, nor anything that imports it.

A field says with its annotation what it accepts, with its description what it means and in which
unit, and with a mark what else is true of it: `Where` (its text names a place: relative paths are
resolved against the file that holds them), `KeyOf` (its text names a function) and `OnResume` (what
may change between a run and its continuation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator


class Section(pydantic.BaseModel):
    """A group of settings: frozen, and an unknown key is an error.

    `shorthand` names the field that a bare value stands for: `model: path` is `model.path: path`.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None
    synonyms: ClassVar[dict[str, str]] = {}  # other names of fields

    @pydantic.model_validator(mode="before")
    @classmethod
    def _bare_value(cls, data: Any) -> Any:
        if cls.shorthand and isinstance(data, str | list):
            return {cls.shorthand: data}
        return data

    def contradictions(self) -> Iterator[str]:
        """What settings that are each right get wrong together, one message each."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _consistent(self, info: pydantic.ValidationInfo) -> Section:
        if info.context and info.context.get("contradictions") is False:
            return self  # they are reported already; the rest is still to be checked
        if wrong := list(self.contradictions()):
            raise ValueError("\n".join(wrong))
        return self


@dataclasses.dataclass(frozen=True)
class Where:
    """The text names a place.

    path    a file or folder
    model   a run directory, a model folder or a hub name
    source  data: a file, a folder, a hub name or `tfds:NAME`
    reward  a model as above, `module:function` or `file.py:function`
    """

    kind: Literal["path", "model", "source", "reward"]


@dataclasses.dataclass(frozen=True)
class KeyOf:
    """The text names a function: it is a key of that table in that file of the package."""

    file: str
    table: str


@dataclasses.dataclass(frozen=True)
class OnResume:
    """What a continued run may do to the field; without this mark a change is refused.

    free     change at will: it does not touch what is computed
    result   change at will: of what is computed all the same, it chooses what comes of the run
    grow     only become larger, where what was computed stays a prefix (see `config.resume`)
    content  the place may move; what lies there is compared by its digest instead
    """

    rule: Literal["free", "result", "grow", "content"]


FREE = OnResume("free")
RESULT = OnResume("result")
GROW = OnResume("grow")
CONTENT = OnResume("content")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def _some_numbers(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """A single item where a list is wanted is a list of one; null is the empty list."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Natural = Annotated[Int, Ge(0)]
Seed = Annotated[Int, Ge(0), Lt(2**63)]
Positive = Annotated[Int, Ge(1)]
NonNegative = Annotated[Float, Ge(0)]
PositiveFloat = Annotated[Float, Gt(0)]
Share = Annotated[Float, Ge(0), Le(1)]
Rate = Annotated[Float, Ge(0), Lt(1)]
OpenShare = Annotated[Float, Gt(0), Lt(1)]
Counts = Annotated[list[Positive], BeforeValidator(_some_numbers)]
Coefficients = Annotated[list[PositiveFloat], BeforeValidator(_some_numbers)]

PathName = Annotated[str, Where("path"), FREE]
ModelName = Annotated[str, Where("model"), CONTENT]
SourceName = Annotated[str, Where("source"), CONTENT]
RewardName = Annotated[str, Where("reward")]


def _dtype(value: Any) -> Any:
    names = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32"}
    return names.get(value, value) if isinstance(value, str) else value


DType = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_dtype)]
