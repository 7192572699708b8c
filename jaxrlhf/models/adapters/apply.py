# SPDX-License-Identifier: Apache-2.0
"""What the extra leaves beside a `kernel` do to its product. Imported by the one `Dense`.

    lora_a [in,r], lora_b [r,out], lora_scale []   y += scale (x A) B
    dora_m [out]                                   LoRA's sum renormalised, column by column
    ia3_in [in], ia3_out [out]                     the input, or the output, times a vector
    dropout_key [2], dropout_keep []               only while training: dropout on LoRA's input

Projections that a family stores as one matrix (q, k, v of gpt2) have one A, kept with the first of
them; the others have no `lora_a` of their own. W + AB never exists here (`merge` makes it).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrlhf.models.products import multiply
from jaxrlhf.models.quantization import dense_kernel

Leaves = dict[str, jax.Array]

TRAINED = ("lora_a", "lora_b", "dora_m", "ia3_in", "ia3_out")
CONSTANT = ("lora_scale",)
TRANSIENT = ("dropout_key", "dropout_keep")
NAMES = (*TRAINED, *CONSTANT, *TRANSIENT)
# Whose A a projection without one uses; also the name under which the two are one module.
SHARES = {"k": "q", "v": "q", "up": "gate"}
SHARED = ("lora_a", *TRANSIENT)


def borrow(leaves: Leaves, first: Leaves) -> Leaves:
    """The leaves with the A (and its dropout) of the projection it shares them with."""
    if "lora_b" not in leaves or "lora_a" in leaves:
        return leaves
    return leaves | {name: first[name] for name in SHARED if name in first}


def dropped(x: jax.Array, leaves: Leaves) -> jax.Array:
    """x with each feature kept with the probability `dropout_keep`, and scaled up to match."""
    if "dropout_key" not in leaves:
        return x
    keep = leaves["dropout_keep"]
    kept = jax.random.bernoulli(jax.random.wrap_key_data(leaves["dropout_key"]), keep, x.shape)
    return jnp.where(kept, x / keep.astype(x.dtype), 0)


def low_rank(x: jax.Array, leaves: Leaves) -> jax.Array:
    """scale (x A) B of x [..., in].

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; the scale is alpha / r, or alpha / sqrt(r)
    (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    """
    y = multiply(multiply(dropped(x, leaves), leaves["lora_a"]), leaves["lora_b"])
    return y * leaves["lora_scale"].astype(y.dtype)


def column_norms(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Norms of the columns of W + scale A B, float32 [..., out], without making that matrix.

    |w + s A b|^2 = |w|^2 + 2 s (w A) b + s^2 b (A^T A) b
    """
    w = dense_kernel(leaves, jnp.float32)
    a, b = (leaves[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    s = leaves["lora_scale"].astype(jnp.float32)[..., None]
    square = jnp.sum(w * w, axis=-2)
    cross = jnp.sum((a.swapaxes(-1, -2) @ w) * b, axis=-2)
    own = jnp.sum(((a.swapaxes(-1, -2) @ a) @ b) * b, axis=-2)
    return jnp.sqrt(jnp.maximum(square + 2 * s * cross + s * s * own, 0))


def renormalised(x: jax.Array, y: jax.Array, leaves: Leaves) -> jax.Array:
    """DoRA: m (W + s A B) / |W + s A B|, column by column, plus the bias that y has already.

    The norm is a constant to the gradient. Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and
    section 4.3. Dropout, which the paper leaves open, is on the input of A alone.
    """
    gain = leaves["dora_m"].astype(jnp.float32) / jax.lax.stop_gradient(column_norms(leaves))
    gain = gain.astype(y.dtype)
    bias = leaves["bias"].astype(y.dtype) if "bias" in leaves else jnp.zeros((), y.dtype)
    return gain * (y - bias + low_rank(x, leaves)) + bias


def adapt(x: jax.Array, y: jax.Array, leaves: Leaves) -> jax.Array:
    """y [..., out], what the base makes of x [..., in], as its adapters would have it."""
    if "dora_m" in leaves:
        y = renormalised(x, y, leaves)
    elif "lora_b" in leaves:
        y += low_rank(x, leaves)
    if "ia3_out" in leaves:
        # Liu et al. 2022, arXiv:2205.05638, section 3.3; the bias is scaled with the rest.
        y *= leaves["ia3_out"].astype(y.dtype)
    return y


def adapt_input(x: jax.Array, leaves: Leaves) -> jax.Array:
    """x [..., in] as the projection reads it."""
    return x * leaves["ia3_in"].astype(x.dtype) if "ia3_in" in leaves else x
