# SPDX-License-Identifier: Apache-2.0
"""`mesh.*`: how the devices are laid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pydantic
from pydantic import Field

from jaxrlhf.config.base import Int, Section


class Mesh(Section):
    """How the devices are laid out; one size may be -1 = the rest. The product is their number."""

    SIZES: ClassVar[tuple[str, ...]] = ("data", "fsdp", "tensor")

    data: Int = Field(default=1, description="copies of the model, each with its own rows")
    fsdp: Int = Field(default=-1, description="parts of weights and optimizer, gathered when used")
    tensor: Int = Field(
        default=1, description="parts of every matrix product (heads, MLP, vocabulary)"
    )
    cpu_devices: Int | None = Field(
        default=None,
        description="without accelerators: devices that the cores of this machine appear as",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _rest_once(cls, data):
        given = isinstance(data, dict) and "fsdp" not in data
        if given and -1 in [data.get(axis) for axis in cls.SIZES]:
            return {**data, "fsdp": 1}
        return data

    @property
    def sizes(self) -> dict[str, Any]:
        """Axis name to size."""
        return {axis: getattr(self, axis) for axis in self.SIZES}

    def contradictions(self) -> Iterator[str]:
        if self.cpu_devices is not None and self.cpu_devices < 1:
            yield f"cpu_devices = {self.cpu_devices}: a number of devices is positive"
        sizes = self.sizes
        for axis, n in sizes.items():
            if n < 1 and n != -1:
                yield f"{axis} = {n}: a size is positive, or -1 = the rest"
        free = [axis for axis, n in sizes.items() if n == -1]
        if len(free) > 1:
            yield f"{' and '.join(free)} are both -1: only one axis can take the rest"
