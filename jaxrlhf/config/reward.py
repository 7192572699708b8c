# SPDX-License-Identifier: Apache-2.0
"""`reward`: a model, a function, or a weighted list of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import Float, RewardName, Section, as_list
from jaxrlhf.config.python_files import functions_of

# `package.module:function`, or `path/to/file.py:function`
FUNCTION = re.compile(r"(?P<place>[A-Za-z_][\w.]*|.*\.py):(?P<function>[A-Za-z_]\w*)")


def is_function(source: str) -> bool:
    """Whether a reward names a Python callable rather than a model."""
    return not source.startswith("stage:") and FUNCTION.fullmatch(source) is not None


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
