# SPDX-License-Identifier: Apache-2.0
"""A Rollout to what models say of it, a fixed number of rows at a time.

Old log-probs come from a scoring pass of the one log-prob function over the parameters that
sampled: neither the sampler's (another program, rounding otherwise) nor a stop_gradient of the new
ones (which would hide every fault). For a first ratio of exactly 1 they are scored in the shape of
the update's microbatches: `in_minibatches` around the functions of models/rows.py does that.
"""

from collections.abc import Callable
from typing import Any

import jax


def in_minibatches(score: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`score(rows)` computed `size` rows at a time, in order, as one loop in one program.

    Args:
        score: a function of a pytree of arrays [B, ...] with results [B, ...].
        size: rows at a time; the update's rows per microbatch. It must divide B (ValueError).
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if total % size:
        raise ValueError(f"{total} rows cannot be scored {size} at a time: not a whole number")
    # [B, ...] to [B / size, size, ...] so that each device of a mesh keeps its own rows.
    split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), rows)
    out = jax.lax.map(score, split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(total, *x.shape[2:]), out)
