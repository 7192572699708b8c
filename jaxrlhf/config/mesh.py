# SPDX-License-Identifier: Apache-2.0
"""`mesh.*`: how the devices are laid out."""

from __future__ import annotations

from collections.abc import Iterator

import pydantic
from pydantic import Field

from jaxrlhf.config.base import Int, Section


class Mesh(Section):
    """How the devices are laid out; one size may be -1 = the rest. The product is their number."""

    data: Int = Field(default=1, description="copies of the model, each with its own rows")
    fsdp: Int = Field(default=-1, description="parts of weights and optimizer, gathered when used")
    tensor: Int = Field(
        default=1, description="parts of every matrix product (heads, MLP, vocabulary)"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _rest_once(cls, data):
        if isinstance(data, dict) and "fsdp" not in data and -1 in data.values():
            return {**data, "fsdp": 1}
        return data

    def contradictions(self) -> Iterator[str]:
        sizes = self.model_dump()
        for axis, n in sizes.items():
            if n < 1 and n != -1:
                yield f"{axis} = {n}: a size is positive, or -1 = the rest"
        free = [axis for axis, n in sizes.items() if n == -1]
        if len(free) > 1:
            yield f"{' and '.join(free)} are both -1: only one axis can take the rest"
