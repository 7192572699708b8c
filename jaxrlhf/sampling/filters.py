# SPDX-License-Identifier: Apache-2.0
"""From logits to the distribution that is really sampled from, and a draw from it.

Filters apply in the order temperature, top-k, top-p, min-p, each on what the one before has left,
as in transformers. Log-probs are renormalised over what is left at the end: they sum to 1 over the
candidates. All settings are Python numbers, so an unused filter costs nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 128  # candidates per block of a draw


def check_settings(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises ValueError naming every setting that has no meaning, its value and its range."""
    problems = [
        text
        for wrong, text in (
            (not temperature >= 0, f"temperature = {temperature}: 0 (greedy) or more"),
            (top_k < 0, f"top_k = {top_k}: 0 (off) or the number of tokens kept"),
            (not 0 < top_p <= 1, f"top_p = {top_p}: above 0, at most 1 (off)"),
            (not 0 <= min_p <= 1, f"min_p = {min_p}: from 0 (off) to 1"),
        )
        if wrong
    ]
    if problems:
        raise ValueError("sampling: " + "; ".join(problems))


def _nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """bool [B, V]: the likeliest tokens whose mass first reaches top_p; ties at the edge all stay.

    Without sorting: non-negative floats are ordered like their bits, so the smallest probability
    that is kept is found by bisection over its 31 bits. Only compares and sums over V, which a
    sharded vocabulary allows (a full sort of [64, 8192] costs several times more on a CPU).
    """
    bits = jax.lax.bitcast_convert_type(probs.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # mass of bits >= low reaches top_p, mass of bits >= high does not
        middle = low + (high - low) // 2
        mass = jnp.where(bits >= middle[:, None], probs, 0).sum(-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.zeros(probs.shape[0], jnp.int32), bits.max(-1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, start)
    return bits >= low[:, None]


def candidates(
    logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The distribution sampled from: (logprobs [B, K], token ids [B, K]); K = V without top-k.

    Args:
        logits: [B, V], float32.
        temperature: divides the logits; 0 is greedy, one candidate of probability 1 (log-prob 0).
        top_k: keep the k likeliest; 0 keeps all. They come out sorted, so top-p needs no sort.
        top_p: keep the likeliest tokens until their mass reaches top_p (Holtzman et al. 2020,
            arXiv:1904.09751); the likeliest always stays.
        min_p: drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082).

    A dropped candidate has log-prob -inf.
    """
    check_settings(temperature, top_k, top_p, min_p)
    B, V = logits.shape
    if temperature == 0:
        return jnp.zeros((B, 1), logits.dtype), logits.argmax(-1, keepdims=True).astype(jnp.int32)
    logits = logits / temperature
    sort = 0 < top_k < V
    if sort:
        logits, ids = jax.lax.top_k(logits, top_k)
    else:
        ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V))
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    if top_p == 1 and min_p == 0:
        return logprobs, ids
    probs = jnp.exp(logprobs)
    kept = jnp.ones(probs.shape, bool)
    if top_p < 1:
        kept = jnp.cumsum(probs, -1) - probs < top_p if sort else _nucleus(probs, top_p)
    # In probabilities, where a difference of logits would underflow alike.
    kept &= probs >= min_p * probs.max(-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(kept, logprobs, -jnp.inf), axis=-1), ids


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [B] with probability weights / sum, by inversion; never one of weight 0."""
    reached = jnp.cumsum(weights, -1)
    # A parallel prefix sum may round non-monotonically: bound by what a positive weight reaches.
    total = jnp.where(weights > 0, reached, 0).max(-1, keepdims=True)
    return ((reached > uniform[:, None] * total) & (weights > 0)).argmax(-1)


def draw(keys: jax.Array, logprobs: jax.Array) -> jax.Array:
    """One index [B] a row from log-probs [B, K], the row's own key deciding.

    Two uniforms a row (a block of candidates, then one of it) instead of a Gumbel variate for each
    of the V tokens: random bits are most of the cost of a draw on a CPU. Two levels also keep the
    resolution of float32: each picks among hundreds, not among a whole vocabulary.
    """
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    probs = jnp.exp(logprobs)
    B, K = probs.shape
    if K <= 2 * _BLOCK:
        return _pick(probs, uniforms[:, 0]).astype(jnp.int32)
    blocks = int(np.ceil(K / _BLOCK))
    probs = jnp.pad(probs, ((0, 0), (0, blocks * _BLOCK - K))).reshape(B, blocks, _BLOCK)
    block = _pick(probs.sum(-1), uniforms[:, 0])
    inside = jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + _pick(inside, uniforms[:, 1])).astype(jnp.int32)
