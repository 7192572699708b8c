# SPDX-License-Identifier: Apache-2.0
"""Statistics over masked arrays, and the weights that make losses add up.

A masked slot may hold anything, NaN and infinity too: every function selects with `where` on its
*input*, so that neither values nor gradients can leak (0 * NaN is NaN, `where` is not). Weights are
computed from the masks of the *global* batch, before it is split over microbatches; afterwards
there are only sums, which is exact whatever the masks of the parts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

Mask = Bool[Array, "*shape"]
PerToken = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]


def keep(x: Num[Array, "*shape"], mask: Mask, fill: float | int = 0) -> Num[Array, "*shape"]:
    """x where the mask is True, `fill` elsewhere: use it on the inputs of anything nonlinear."""
    return jnp.where(mask, x, jnp.asarray(fill, x.dtype))


def masked_sum(
    x: Num[Array, "*shape"], mask: Mask, axis: int | tuple[int, ...] | None = None
) -> Num[Array, "..."]:
    """Sum of x where the mask is True, over `axis` (default: all); 0 where nothing is."""
    return keep(x, mask).sum(axis)


def masked_mean(
    x: Float[Array, "*shape"], mask: Mask, axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Mean of x where the mask is True, over `axis` (default: all); 0 where nothing is."""
    return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1).astype(x.dtype)


def _center(
    x: Float[Array, "*shape"], mask: Mask
) -> tuple[Float[Array, ""], Float[Array, "*shape"]]:
    """(mean, x - mean with 0 where masked), the mean refined once.

    The second pass makes the mean of equal numbers that very number, so that a constant input has
    a variance of exactly 0 and whitening does not blow up its rounding error.
    """
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)
    return mean, keep(x - mean, mask)


def masked_var(x: Float[Array, "*shape"], mask: Mask) -> Float[Array, ""]:
    """Population variance (divides by n) of x where the mask is True; 0 where nothing is."""
    return masked_mean(_center(x, mask)[1] ** 2, mask)


def whiten(
    x: Float[Array, "*shape"], mask: Mask, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """x scaled to variance 1 and, with `shift_mean`, mean 0 over the masked-in slots; 0 elsewhere.

    The statistics are those of the whole array given: call it on the global batch, not inside the
    loop over microbatches. On arrays sharded over a mesh the sums run over all shards. A constant
    input gives 0, not NaN (without `shift_mean`, the constant over sqrt(epsilon) is avoided too: it
    is returned as it is, since it has no scale to divide by).
    """
    mean, centered = _center(x, mask)
    variance = masked_mean(centered**2, mask)
    scale = jnp.where(variance > 0, 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1) + epsilon), 1)
    whitened = centered * scale
    return whitened if shift_mean else keep(whitened + mean, mask)


def weighted_sum(x: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Float[Array, ""]:
    """sum(weights * x); a slot of weight 0 may hold anything. The only reduction of losses."""
    used = weights != 0
    return (keep(x, used) * weights).sum()


def token_weights(mask: TokenMask) -> PerToken:
    """Each masked-in token of the global batch counts the same: mask / number of tokens.

    Longer rows count for more. Sums to 1; all zeros if nothing is masked in.
    """
    return mask / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def sequence_weights(mask: TokenMask) -> PerToken:
    """Each row with at least one masked-in token counts the same, its tokens sharing evenly.

    The mean over rows of the mean over tokens. Sums to 1; all zeros if nothing is masked in.
    """
    lengths = mask.sum(axis=1, keepdims=True)
    rows = (lengths > 0).sum()
    return mask / jnp.maximum(lengths * rows, 1).astype(jnp.float32)


def fixed_length_weights(mask: TokenMask, *, length: int) -> PerToken:
    """Each token counts 1 / (rows * length): no row's own length enters.

    For policy gradients this takes away the pull of the two other means towards short good and long
    bad completions (Liu et al. 2025, arXiv:2503.20783, section 3.1). `length` is the largest number
    of completion tokens, so the weights sum to at most 1. Rows without a token are not counted.
    """
    if length < 1:
        raise ValueError(f"fixed_length_weights: length = {length} must be at least 1")
    rows = mask.any(axis=1).sum()
    return mask / (jnp.maximum(rows, 1) * length).astype(jnp.float32)


WEIGHTS = {
    "token_mean": token_weights,
    "sequence_mean": sequence_weights,
    "fixed_length": fixed_length_weights,
}
