# SPDX-License-Identifier: Apache-2.0
"""`reward`: a model, a function, or a weighted list of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import Float, RewardName, Section, as_list
from jaxrlhf.config.python_files import functions_of

# `package.module:function`, or `path/to/file.py:function`
FUNCTION = re.compile(r"(?P<place>[A-Za-z_][\w.]*|.*\.py):(?P<function>[A-Za-z_]\w*)")


def is_function(source: str) -> bool:
    """Whether a reward names a Python callable rather than a model."""
    return not source.startswith("stage:") and FUNCTION.fullmatch(source) is not None


def function_file(source: str) -> Path | None:
    """The file of a function named as file.py:function or module:function, found without importing
    it or the packages it is in; None where no file is known."""
    found = FUNCTION.fullmatch(source)
    if found is None:
        return None
    if found["place"].endswith(".py"):
        return Path(found["place"])
    spec, places = None, None
    for part in found["place"].split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


class RewardTerm(Section):
    """One scorer; a bare value is its `source`."""

    shorthand: ClassVar[str | None] = "source"

    source: RewardName = Field(
        description="a reward model, module:function or file.py:function; a function is called "
        "with (prompts, completions, **columns) and returns a list of floats"
    )
    weight: Float = Field(default=1.0, description="the sum of weight x score is what is optimised")
    name: str | None = Field(default=None, description="how it is logged; null = told by source")

    def contradictions(self) -> Iterator[str]:
        if self.source.endswith(".py"):
            found = functions_of(self.source)
            file = self.source.rsplit("/", 1)[-1]
            has = f"; it has {', '.join(found[:12])}" if found else ""
            name = found[0] if len(found) == 1 else "FUNCTION"
            yield f"source = {self.source}: name a function in it: {file}:{name}{has}"

    @property
    def kind(self) -> Literal["model", "function"]:
        return "function" if is_function(self.source) else "model"

    @property
    def label(self) -> str:
        """The name in metrics: `name`, the function's, or the last part of the model's path."""
        if self.name:
            return self.name
        return re.split(r"[/:]", self.source.rstrip("/"))[-1]


Rewards = Annotated[list[RewardTerm], BeforeValidator(as_list)]
