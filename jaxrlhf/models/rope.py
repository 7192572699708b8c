# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: how fast each pair of a head's numbers turns, and turning them.

Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2: pair i of R/2 turns by theta^(-2i/R) a
position. Scaling stretches that over longer texts; each kind is one function of SCALINGS.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import ModelConfig

Frequencies = Any  # float [R/2], numpy where nothing depends on the length of the row


def base_frequencies(theta: Any, size: int) -> Any:
    """theta^(-2i/R), i = 0 .. R/2 - 1."""
    return theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)


def _default(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    return base_frequencies(config.rope_theta, config.rotary_dim), 1.0


def _linear(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    """All of them slower by `factor`: Chen et al. 2023, arXiv:2306.15595."""
    return base_frequencies(config.rope_theta, config.rotary_dim) / rope["factor"], 1.0


def _llama3(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    """Slow pairs (fewer than low_freq_factor turns over the original length) are slowed down, fast
    ones (more than high_freq_factor) are not, between the two it blends: Llama 3.1's own code."""
    frequencies = base_frequencies(config.rope_theta, config.rotary_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * keep + frequencies / rope["factor"] * (1 - keep), 1.0


def _dynamic(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    """theta grows with the text once it is longer than max_positions ("dynamic NTK", as
    transformers computes it)."""
    size, limit, factor = config.rotary_dim, config.max_positions, rope["factor"]
    length = jnp.maximum(jnp.asarray(length), limit).astype(jnp.float32)
    growth = (factor * length / limit - (factor - 1)) ** (size / (size - 2))
    return base_frequencies(config.rope_theta * growth, size), 1.0


def _yarn(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    """A ramp from kept to slowed pairs, and warmer attention: Peng et al. 2023, arXiv:2309.00071,
    section 3.2 and equation 22."""
    theta, size, factor = config.rope_theta, config.rotary_dim, rope["factor"]
    original = rope["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:  # which pair turns so often over the original length
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2) - low) / (high - low if high != low else 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    frequencies = base_frequencies(theta, size)

    def warmth(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = warmth(one) / warmth(all_dims) if one and all_dims else warmth()
    return frequencies * keep + frequencies / factor * (1 - keep), attention


def _longrope(config: ModelConfig, rope: Mapping[str, Any], length: Any):
    """Every pair slowed by a factor of its own, one set for texts up to the original length and one
    beyond: Ding et al. 2024, arXiv:2402.13753."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_positions / original
    attention = rope.get("attention_factor")
    if attention is None:
        more = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention = math.sqrt(1 + more)
    factors = jnp.where(
        jnp.asarray(length) > original,
        np.asarray(rope["long_factor"], np.float32),
        np.asarray(rope["short_factor"], np.float32),
    )
    return base_frequencies(config.rope_theta, config.rotary_dim) / factors, attention


Scaling = Callable[[ModelConfig, Mapping[str, Any], Any], tuple[Frequencies, float]]
SCALINGS: dict[str, Scaling] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def rope_frequencies(config: ModelConfig, lengths: Any = 0) -> tuple[Frequencies, float]:
    """Radians per position of each rotary pair, float32 [R/2], and what cos and sin are scaled by.

    Args:
        lengths: tokens of a row, [..., 1] (the result is [..., R/2] where it depends on them).
    """
    rope = dict(config.rope_scaling)
    frequencies, attention = SCALINGS[rope.get("rope_type", "default")](config, rope, lengths)
    return frequencies.astype(np.float32), attention


def _cos_and_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both of them, once.

    XLA holds cosines to be cheap and, on the CPU, computes them anew in every head of every
    unrolled layer (a fifth of a small model's forward pass). A remainder it repeats nowhere, and
    that of the division by 2 changes no bit of them.
    """
    return jax.lax.rem(jnp.cos(angles), np.float32(2)), jax.lax.rem(jnp.sin(angles), np.float32(2))


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[Any, Any]:
    """Cosines and sines for `positions`, [B, T] or (one token a row) [B]: float32 [..., R/2] twice.

    "dynamic" and "longrope" turn slower in rows whose last position is beyond the original length
    (config.rope_limit), so such a row cannot be read with a cache from before it was: every layer
    above the first would see other states.

    Where layers differ, [3, ..., R/2]: of full layers, of those with a window (their own theta, if
    the model has one), and of layers that do not rotate; `rope_choice` says which a layer takes.
    """
    at = positions.astype(jnp.float32)[..., None]
    lengths = positions.max(-1) + 1 if positions.ndim > 1 else positions + 1
    lengths = lengths.reshape(-1, *(1,) * positions.ndim)
    frequencies, attention = rope_frequencies(config, lengths)
    cos, sin = _cos_and_sin(at * frequencies)
    if attention != 1.0:
        cos, sin = cos * attention, sin * attention
    if config.uniform:
        return cos, sin
    near = (cos, sin)
    if config.window_rope_theta is not None:
        own = base_frequencies(config.window_rope_theta, config.rotary_dim).astype(np.float32)
        near = _cos_and_sin(at * own)
    return jnp.stack([cos, near[0], jnp.ones_like(cos)]), jnp.stack(
        [sin, near[1], jnp.zeros_like(sin)]
    )


def rope_choice(config: ModelConfig, layer: int) -> int:
    """Which of the angles of `rope_angles` a layer of a model with different layers takes."""
    if config.rope_layers and not config.rope_layers[layer]:
        return 2
    return int(config.has_window(layer))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + R/2) of the first R numbers of x [..., heads, H] by the angles
    [..., R/2] of its position; the rest stays."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if size < x.shape[-1]:
        parts.append(x[..., size:])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
