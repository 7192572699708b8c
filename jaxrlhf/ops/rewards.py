# SPDX-License-Identifier: Apache-2.0
"""From one score a completion and a KL a token to rewards [B, T]."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.ops.masking import keep


def last_token(completion_mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at each row's last masked-in token only; nowhere in a row without one."""
    from_the_right = jnp.cumsum(completion_mask[:, ::-1], axis=1)[:, ::-1]
    return completion_mask & (from_the_right == 1)


def token_rewards(
    scores: Float[Array, "B"],
    kl: Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """The score on the last completion token, less kl_coef * kl on every completion token.

        rewards[b, t] = scores[b] * [t is the last completion token of b] - kl_coef * kl[b, t]

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Stiennon et al. 2020, arXiv:2009.01325.
    Each row sums to score - kl_coef * (its total KL). `kl` is in nats and may hold anything outside
    the mask; a row without completion tokens is all zeros (its score is dropped).
    """
    rewards = keep(-kl_coef * keep(kl, completion_mask), completion_mask)
    return rewards + keep(jnp.broadcast_to(scores[:, None], kl.shape), last_token(completion_mask))
