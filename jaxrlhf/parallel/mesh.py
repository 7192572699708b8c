# SPDX-License-Identifier: Apache-2.0
"""Devices to a mesh. Models name their axes; `rules.py` says which mesh axis each lives on."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxrlhf.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "expert", "tensor")  # slowest to fastest interconnect


def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh that always has all of AXES; sizes default to 1, one of them may be -1 (the rest).

    Args:
        devices: what to build from; all devices of all processes by default. Devices of a TPU
            topology description work too, for compiling ahead of time.
        **sizes: axis name to size. With no size given at all, `data` takes every device.

    Raises:
        ConfigError: an unknown axis, a bad size, or a product other than the device count.
    """
    count = jax.device_count() if devices is None else len(devices)
    if wrong := [f"mesh.{k}={n}" for k, n in sizes.items() if k not in AXES or n == 0 or n < -1]:
        raise ConfigError(
            f"{', '.join(wrong)}: axes are {', '.join(AXES)}; "
            "a size is positive, or -1 for the rest"
        )
    full = dict.fromkeys(AXES, 1) | (sizes or {"data": -1})
    given = math.prod(n for n in full.values() if n != -1)
    free = [axis for axis, n in full.items() if n == -1]
    if len(free) > 1:
        raise ConfigError(
            f"mesh: {' and '.join(free)} are both -1; only one axis can take the rest"
        )
    if count % given or (not free and given != count):
        asked = ", ".join(f"{k}={n}" for k, n in full.items() if n != 1)
        fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ConfigError(
            f"mesh {asked or 'of one device'} (product {given}) does not cover {count} device(s): "
            f"the sizes must multiply to {count}, so each is one of {fits}; "
            "give one axis -1 to take the rest"
        )
    if free:
        full[free[0]] = count // given
    # jax.make_mesh defaults to Explicit axes, under which gathers and dots must be annotated.
    return jax.make_mesh(
        tuple(full.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into: data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
