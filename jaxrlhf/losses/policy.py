# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses on per-token arrays [B, T]: the policy, its critic, its entropy.

Every function takes the completion mask and selects with it on its *inputs*: a NaN in a masked
slot would otherwise come back through the gradient of exp as 0 * NaN. Losses and metrics are 0
there.
"""

from typing import Annotated

import jax.numpy as jnp
from annotated_types import Gt
from jaxtyping import Array, Bool, Float

from jaxrlhf.ops.masking import keep

PerToken = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]


def ppo_clip(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    completion_mask: TokenMask,
    *,
    clip_eps: Annotated[float, Gt(0)] = 0.2,
    clip_eps_high: Annotated[float, Gt(0)] | None = None,
) -> tuple[PerToken, dict[str, PerToken]]:
    """The clipped surrogate objective, negated.

        ratio = exp(logprobs - old_logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) * A)

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; a separate upper bound: Yu et al. 2025
    (DAPO), arXiv:2503.14476, section 3.1. At ratio 1 its gradient is the policy gradient
    -A * grad logprobs; it is 0 where the ratio has left the band on the side the advantage pushes
    to, and only there.

    Args:
        logprobs: [B, T] under the current parameters, at the temperature sampled with.
        old_logprobs: [B, T] under the parameters that sampled, from the same function in the same
            shape: equal parameters must give a ratio of exactly 1.
        advantages: [B, T], constants.
        clip_eps: half-width of the band below 1, and above it unless `clip_eps_high` is given.

    Metrics: `ratio`; `clip_ratio`, 1 where the clipped branch is the smaller one (no gradient);
    `approx_kl` = k3 of old against new, nats per token.
    """
    high = clip_eps if clip_eps_high is None else clip_eps_high
    # Mask the input of exp, not only its output.
    log_ratio = keep(logprobs - old_logprobs, completion_mask)
    advantages = keep(advantages, completion_mask)
    ratio = jnp.exp(log_ratio)
    free, clipped = ratio * advantages, jnp.clip(ratio, 1 - clip_eps, 1 + high) * advantages
    metrics = {
        "ratio": keep(ratio, completion_mask),
        "clip_ratio": (clipped < free).astype(ratio.dtype),
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    return -jnp.minimum(free, clipped), metrics


def clipped_value(
    values: PerToken,
    old_values: PerToken,
    returns: PerToken,
    completion_mask: TokenMask,
    *,
    value_clip: Annotated[float, Gt(0)] = 0.2,
) -> tuple[PerToken, dict[str, PerToken]]:
    """Squared error of the critic, which may move only `value_clip` away from its old value.

        loss = max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2) / 2

    Source: the implementation of PPO, Schulman et al. 2017 (openai/baselines, ppo2); for language
    models Ouyang et al. 2022, arXiv:2203.02155, appendix C.

    Args:
        values: [B, T] under the current parameters; old_values: those the returns were made from.
        returns: [B, T], constants.
        value_clip: in units of the value; `inf` turns clipping off.

    Metrics: `value/clip_ratio`, 1 where the clipped branch is the larger one; `value/error`, the
    plain squared error; `value/mean` and `value/return`.
    """
    values = keep(values, completion_mask)
    old_values = keep(old_values, completion_mask)
    returns = keep(returns, completion_mask)
    near = jnp.clip(values, old_values - value_clip, old_values + value_clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    metrics = {
        "value/clip_ratio": (clipped > free).astype(values.dtype),
        "value/error": free,
        "value/mean": values,
        "value/return": returns,
    }
    return jnp.maximum(free, clipped) / 2, metrics


def entropy_bonus(
    entropies: PerToken, completion_mask: TokenMask, *, entropy_coef: float = 0.0
) -> tuple[PerToken, dict[str, PerToken]]:
    """-entropy_coef * entropy of the distribution each token came from, nats. Adding it keeps the
    policy random; source: Williams & Peng 1991; Schulman et al. 2017, arXiv:1707.06347, eq. 9."""
    entropies = keep(entropies, completion_mask)
    return -entropy_coef * entropies, {"entropy": entropies}


POLICY_LOSSES = {"ppo_clip": ppo_clip}
