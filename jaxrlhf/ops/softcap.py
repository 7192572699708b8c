# SPDX-License-Identifier: Apache-2.0
"""Values kept within a bound, smoothly."""

import jax.numpy as jnp

from jaxrlhf.types import Array


def softcap(x: Array, cap: float | None) -> Array:
    """c tanh(x / c), which never leaves [-c, c]; `cap` None leaves x as it is.

    Source: Gemma 2, arXiv:2408.00118, section 2 (attention scores and logits).
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
