# SPDX-License-Identifier: Apache-2.0
"""How programs of models are compiled.

XLA:CPU hands groups of operations to a library when they are large enough to pay. What ends up in
such a group depends on what else the program needs, so that the same forward pass added up in
another order once a gradient followed: log-probs off by 5e-6 in most tokens, and a first policy
ratio that is not 1. Only single matrix products go to the library here; their order of addition
is a function of their shapes. It costs nothing that could be measured.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@functools.cache
def _understood() -> bool:
    """Whether this jaxlib has the option: one that has not has no such groups either."""
    try:
        jax.jit(lambda: 0, compiler_options=LIBRARY).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(function: Callable[..., Any], mesh: Mesh | None = None, **settings: Any) -> Any:
    """`jax.jit` of a program that runs a model on a mesh (None = jax's own devices).

    On the CPU a forward pass gives the same bits in every program compiled by this function, with
    or without a gradient, if its rows have the same shape.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options = LIBRARY if platform == "cpu" and _understood() else None
    return jax.jit(function, compiler_options=options, **settings)
