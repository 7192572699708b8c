# SPDX-License-Identifier: Apache-2.0
"""The one log-probability function: for old, reference and new log-probs, training and scoring.

Logits are computed a chunk of positions at a time, in at least float32, and recomputed in the
backward pass, so that [B, T, V] never exists. The vocabulary axis is only ever reduced over (the
target is picked by comparing with an iota, not by a gather), so it may stay sharded.

**Why the policy ratio is exactly 1 before the first update.** PPO divides the probability under
the current parameters by that under the parameters that sampled. Both come from this function, and
in float32 on the CPU they are equal to the last bit if both programs run it on rows of the same
shape: what XLA makes of the forward pass of a chunk must not depend on whether a gradient follows.
Two things see to that, and
tests/rl/test_ratio.py holds them to it:

- each chunk is a `jax.checkpoint`: the forward pass leaves no residual behind, so it is compiled
  alike whether a backward pass follows or not (also with the entropy beside it, at any
  temperature, under accumulation and with the layers rematerialised);
- the old log-probs are scored in the shape of the update's microbatch (`rl.score.in_minibatches`),
  since a matmul of another shape may add up in another order.
"""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.ops.placement import place
from jaxrlhf.ops.softcap import softcap

Hidden = Float[Array, "B T D"]
Kernel = Float[Array, "D V"]
PerToken = Float[Array, "B T"]

CHUNK = 128  # positions whose logits exist at the same time


def _check(temperature: float, chunk: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be positive: greedy has no log-probs")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1 position")


def _log_softmax(hidden: Array, kernel: Array, temperature: float, cap: float | None) -> Array:
    """[B, C, D] and [D, V] to log-probs [B, C, V] in at least float32."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    hidden = place(hidden, "visit_batch", "length", None)
    logits = jnp.einsum(
        "bcd,dv->bcv", hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype
    )
    logits = place(logits, "visit_batch", "length", "visit_vocab")
    return jax.nn.log_softmax(softcap(logits, cap) / temperature, axis=-1)


def _over_positions(one_chunk, chunk: int, shared, *per_position):
    """Runs `one_chunk(shared, *slices)` over chunks of axis 1; results [B, C] joined to [B, T]."""
    B, T = per_position[0].shape[:2]
    # The matrix [D, V] is the largest there is: on a mesh each device holds a part of V, to which
    # the chunks come one after the other, and neither it nor its gradient is ever in one place.
    shared = jax.tree.map(lambda kernel: place(kernel, None, "visit_vocab"), shared)
    chunks = -(-T // chunk)
    size = -(-T // chunks)  # as even as can be: fewer padded positions
    body = jax.checkpoint(one_chunk)
    if chunks == 1:
        return body(shared, *per_position)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * size - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    _, out = jax.lax.scan(
        lambda _, xs: (None, body(shared, *xs)), None, tuple(map(split, per_position))
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, chunks * size)[:, :T], out)


def _of_own_slot(x: Array) -> Array:
    """What hidden state t - 1 says about token t moves to slot t; slot 0 becomes 0."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


@overload
def token_logprobs(
    hidden: Hidden,
    kernel: Kernel,
    tokens: Int[Array, "B T"],
    *,
    temperature: float = ...,
    cap: float | None = ...,
    chunk: int = ...,
    entropy: Literal[False] = ...,
) -> PerToken: ...
@overload
def token_logprobs(
    hidden: Hidden,
    kernel: Kernel,
    tokens: Int[Array, "B T"],
    *,
    temperature: float = ...,
    cap: float | None = ...,
    chunk: int = ...,
    entropy: Literal[True],
) -> tuple[PerToken, PerToken]: ...
def token_logprobs(
    hidden: Hidden,
    kernel: Kernel,
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    chunk: int = CHUNK,
    entropy: bool = False,
) -> PerToken | tuple[PerToken, PerToken]:
    """log p(token t | tokens before t) in slot t, from the hidden state in slot t - 1; slot 0 is 0.

    Args:
        hidden: [B, T, D] after the final norm, in the compute dtype.
        kernel: [D, V] head; cast to the dtype of `hidden`, products added up in float32.
        tokens: [B, T] ids. An id outside [0, V) (garbage in a masked slot) gives a finite number.
        temperature: logits are divided by it; the log-probs of a policy that samples at
            temperature T are those at T, not at 1.
        cap: the model's soft cap of its logits (`ops.softcap`), applied before the temperature.
        chunk: positions whose logits exist at the same time.
        entropy: also return the entropy (nats) of the distribution that token t came from.

    Returns:
        log-probs [B, T] in at least float32, or (log-probs, entropies).
    """
    _check(temperature, chunk)

    def one_chunk(kernel, hidden, target):
        logp = _log_softmax(hidden, kernel, temperature, cap)
        # Neither an iota of [B, C, V] nor a where, whose zeros are as large: the same in every
        # chunk, they would be computed before the loop over chunks, and kept.
        hit = jnp.arange(logp.shape[-1], dtype=target.dtype) == target[..., None]
        picked = (logp * hit).sum(-1)
        return (picked, -(jnp.exp(logp) * logp).sum(-1)) if entropy else picked

    following = jnp.roll(tokens, -1, axis=1)  # the last column's answer is dropped
    out = _over_positions(one_chunk, chunk, kernel, hidden, following)
    return jax.tree.map(_of_own_slot, out)


def exact_kl(
    hidden: Hidden,
    kernel: Kernel,
    ref_hidden: Float[Array, "B T E"],
    ref_kernel: Float[Array, "E V"],
    *,
    temperature: float = 1.0,
    caps: tuple[float | None, float | None] = (None, None),
    chunk: int = CHUNK,
) -> PerToken:
    """KL(p || q), nats, between the two models' distributions of token t, in slot t; slot 0 is 0.

        kl[b, t] = sum over v of p(v) * (log p(v) - log q(v)),   p, q given the tokens before t

    The expectation of `ops.kl.k1` given the tokens before t, without its sampling noise. Both
    models are read at the same temperature; their widths may differ, their vocabulary may not.
    `caps` are the soft caps of their logits.
    """
    _check(temperature, chunk)

    def one_chunk(kernels, hidden, ref_hidden):
        logp = _log_softmax(hidden, kernels[0], temperature, caps[0])
        logq = _log_softmax(ref_hidden, kernels[1], temperature, caps[1])
        # Never negative but for rounding, which is taken off.
        return jnp.maximum((jnp.exp(logp) * (logp - logq)).sum(-1), 0)

    return _of_own_slot(_over_positions(one_chunk, chunk, (kernel, ref_kernel), hidden, ref_hidden))
