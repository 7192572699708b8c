# SPDX-License-Identifier: Apache-2.0
"""The one matrix product of projections and of what is added to them."""

import jax
import jax.numpy as jnp


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times kernel [in, out] in x's dtype, accumulated in float32 at least."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=accumulate,
    )
    return y.astype(x.dtype)
