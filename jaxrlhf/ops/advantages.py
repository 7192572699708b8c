# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators: from rewards (and values) per token to advantages and returns per token.

Each is a function and a line in ESTIMATORS. Positional parameters name the statistics it needs (a
critic is trained only if `values` is one of them); keyword-only ones are settings under `rl.` in
the configuration. All give 0 outside the completion mask and ignore what stands there.

Groups: rows come in runs of `samples_per_prompt` completions of one prompt, next to each other.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from jaxtyping import Array, Bool, Float

from jaxrlhf.ops.masking import keep

PerToken = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]


def gae(
    rewards: PerToken,
    values: PerToken,
    completion_mask: TokenMask,
    *,
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0,
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95,
) -> tuple[PerToken, PerToken]:
    """Generalised advantage estimation; a hole in the mask is stepped over, not a boundary.

        delta[t]     = rewards[t] + gamma * values[next(t)] - values[t]
        advantage[t] = delta[t] + gamma * gae_lambda * advantage[next(t)]
        return[t]    = advantage[t] + values[t]

    where next(t) is the row's next masked-in token; after the last one value and advantage are 0
    (the episode ends there, also when it was cut at the length limit: the score was given to what
    there is). Tokens in holes (tool output, a user's turn) are no actions: they are not discounted.

    Source: Schulman et al. 2016, arXiv:1506.02438, eqs. 11-16.

    Args:
        rewards, values: [B, T]; values[:, t] is the value of the state before token t.
        gamma: discount per completion token, in [0, 1].
        gae_lambda: in [0, 1]; 1 is the whole return less the value, 0 the one-step error.

    Returns:
        (advantages, returns), both [B, T].
    """
    rewards, values = keep(rewards, completion_mask), keep(values, completion_mask)

    def back(carry, slot):
        next_value, next_advantage = carry
        reward, value, is_action = slot
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        carry = (
            jnp.where(is_action, value, next_value),
            jnp.where(is_action, advantage, next_advantage),
        )
        return carry, jnp.where(is_action, advantage, 0)

    end = jnp.zeros(rewards.shape[0], rewards.dtype)
    slots = (rewards.T, values.T, completion_mask.T)
    _, advantages = jax.lax.scan(back, (end, end), slots, reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def _groups(x: Float[Array, "B ..."], samples_per_prompt: int, least: int) -> Float[Array, "..."]:
    """[B, ...] to [prompts, samples_per_prompt, ...]; raises ValueError where that cannot be."""
    if samples_per_prompt < least:
        raise ValueError(
            f"rl.samples_per_prompt = {samples_per_prompt}: this advantage compares the completions"
            f" of one prompt and needs at least {least}"
        )
    if x.shape[0] % samples_per_prompt:
        raise ValueError(
            f"{x.shape[0]} rows are no whole number of groups of"
            f" rl.samples_per_prompt = {samples_per_prompt}"
        )
    return x.reshape(-1, samples_per_prompt, *x.shape[1:])


def _per_token(x: Float[Array, "B"], completion_mask: TokenMask) -> PerToken:
    return keep(jnp.broadcast_to(x[:, None], completion_mask.shape), completion_mask)


def group(
    rewards: PerToken,
    completion_mask: TokenMask,
    *,
    samples_per_prompt: int = 8,
    scale_by_std: bool = True,
    std_epsilon: float = 1e-4,
) -> tuple[PerToken, PerToken]:
    """Group-relative advantage: the completion's return against the others of its prompt.

        advantage = (R - mean of the group) / (std of the group + std_epsilon)

    R is the sum of a row's rewards; each of its tokens gets the same advantage. Equal returns give
    0. `scale_by_std=False` leaves out the division, which otherwise favours prompts whose returns
    hardly differ (Liu et al. 2025, arXiv:2503.20783).

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (the standard deviation divides by
    n - 1, as in the published implementations).
    """
    total = keep(rewards, completion_mask).sum(axis=1)
    grouped = _groups(total, samples_per_prompt, least=2)
    # From the first member's own value: equal returns then differ by exactly 0, not by rounding.
    offset = grouped - grouped[:, :1]
    advantages = offset - offset.mean(axis=1, keepdims=True)
    if scale_by_std:
        variance = (advantages**2).sum(axis=1, keepdims=True) / (samples_per_prompt - 1)
        advantages = advantages / (jnp.sqrt(variance) + std_epsilon)
    return (
        _per_token(advantages.reshape(-1), completion_mask),
        _per_token(total, completion_mask),
    )


def rloo(
    rewards: PerToken, completion_mask: TokenMask, *, samples_per_prompt: int = 4
) -> tuple[PerToken, PerToken]:
    """REINFORCE with a leave-one-out baseline: R less the mean R of the prompt's *other* rows.

    Unbiased, since the baseline does not depend on the completion it judges. Each token of a row
    gets the row's advantage. Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 6.
    """
    total = keep(rewards, completion_mask).sum(axis=1)
    grouped = _groups(total, samples_per_prompt, least=2)
    offset = grouped - grouped[:, :1]
    n = samples_per_prompt
    advantages = (offset - offset.mean(axis=1, keepdims=True)) * (n / (n - 1))
    return (
        _per_token(advantages.reshape(-1), completion_mask),
        _per_token(total, completion_mask),
    )


def rloo_to_go(
    rewards: PerToken,
    completion_mask: TokenMask,
    *,
    samples_per_prompt: int = 4,
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0,
) -> tuple[PerToken, PerToken]:
    """Leave-one-out per token: the return *from t on* less the others' mean return from t on.

        G[t] = rewards[t] + gamma * G[next(t)]
        advantage[t] = G[t] - mean over the prompt's other rows of their G[t]

    Unbiased like `rloo`, with less noise where rewards are spread over the tokens (a KL penalty):
    what was paid before t is not held against token t. A row that ended before t has G = 0 there.
    Slots are compared by position, so the prompt must be the same length in a group, as it is.
    Source: the policy gradient theorem with a baseline, Sutton et al. 2000; the baseline of
    Kool et al. 2019 (Buy 4 REINFORCE samples) taken per step.
    """

    def back(after, slot):
        reward, is_action = slot
        after = jnp.where(is_action, reward + gamma * after, after)
        return after, after

    rewards = keep(rewards, completion_mask)
    end = jnp.zeros(rewards.shape[0], rewards.dtype)
    _, to_go = jax.lax.scan(back, end, (rewards.T, completion_mask.T), reverse=True)
    grouped = _groups(to_go.T, samples_per_prompt, least=2)
    offset = grouped - grouped[:, :1]
    n = samples_per_prompt
    advantages = (offset - offset.mean(axis=1, keepdims=True)) * (n / (n - 1))
    return (
        keep(advantages.reshape(rewards.shape), completion_mask),
        keep(to_go.T, completion_mask),
    )


ESTIMATORS = {"gae": gae, "group": group, "rloo": rloo, "rloo_to_go": rloo_to_go}
