# SPDX-License-Identifier: Apache-2.0
"""Scores and log-probs to an Experience: rewards, advantages, returns, weights; then minibatches.

**The KL penalty and its gradient.** The objective is E[score] - kl_coef * E[KL], where the KL of a
completion is the sum over its tokens of KL_t(s) = KL(policy(. | s) || reference(. | s)), s the
tokens before t. Its gradient has two parts:

    grad E[sum_t KL_t] = E[sum_t grad KL_t(s_t)]                                     (own)
                       + E[sum_t grad log p(a_t | s_t) * sum over u > t of KL_u(s_u)]  (later)

`kl_in_reward` says what stands in the reward, a constant there, for the policy gradient to act on:

    "k1"     log p(a_t | s_t) - log q(a_t | s_t) at t. Its policy gradient is both parts, unbiased
             (the own part since E[grad log p * k1] = grad KL_t); noisy in every term.
    "exact"  KL_t(s_t), summed over the vocabulary: the expectation of k1 given s_t (Rao-Blackwell),
             so what a token is charged for the *later* ones has no sampling noise. But KL_t(s_t)
             does not depend on a_t, so its policy gradient leaves out the own part. That part comes
             back as a term -kl_coef * (k1_t - KL_t) on the advantage of token t alone, of mean zero
             given s_t: the choice made against the average choice. The sum is unbiased again.

Both are checked by enumerating every sequence of a toy in tests/rl/test_experience.py. "exact"
needs both models' hidden states at the same time while scoring, and nothing in the update.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.ops import kl as kl_estimators
from jaxrlhf.ops.advantages import ESTIMATORS
from jaxrlhf.ops.masking import WEIGHTS, keep, whiten
from jaxrlhf.ops.rewards import token_rewards
from jaxrlhf.types import Experience, Rollout

KLInReward = Literal["k1", "exact"]


def statistics_of(function: Callable) -> tuple[str, ...]:
    """The positional parameters of an algorithm: the statistics that it needs, by name."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def settings_of(function: Callable) -> tuple[str, ...]:
    """The keyword-only parameters of an algorithm: its keys in the configuration."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def needs_values(estimator: str) -> bool:
    """Whether a critic is trained for this key of ESTIMATORS."""
    return "values" in statistics_of(ESTIMATORS[estimator])


def loss_weights(
    completion_mask: jax.Array, weighting: str = "token_mean", *, length: int | None = None
) -> jax.Array:
    """[B, T] weights of a global minibatch, by a key of WEIGHTS; `length` for fixed_length only."""
    if weighting == "fixed_length":
        if length is None:
            raise ValueError("weights fixed_length need a length: the largest completion's")
        return WEIGHTS[weighting](completion_mask, length=length)
    return WEIGHTS[weighting](completion_mask)


def build_experience(
    rollout: Rollout,
    scores: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    values: jax.Array | None = None,
    *,
    kl_coef: float | jax.Array = 0.05,
    kl_in_reward: KLInReward = "k1",
    exact_kl: jax.Array | None = None,
    estimator: str = "gae",
    estimator_kwargs: Mapping[str, Any] | None = None,
    whiten_advantages: bool = True,
    weighting: str = "token_mean",
) -> Experience:
    """Everything the updates of one iteration need, on the *global* batch.

    Args:
        rollout: B rows.
        scores: [B] the completions' scores, already combined.
        old_logprobs, ref_logprobs: [B, T] of the policy that sampled and of the reference, both at
            the sampling temperature.
        values: [B, T] of the critic; None for an estimator without one.
        kl_coef: of the penalty in the reward, per nat.
        kl_in_reward: see the head of this file; "exact" needs `exact_kl` [B, T].
        estimator, estimator_kwargs: a key of ESTIMATORS and its keyword-only settings.
        whiten_advantages: to mean 0 and variance 1 over all completion tokens of the batch (as
            published PPO implementations do; it rescales the objective by a number the batch sets).
        weighting: a key of WEIGHTS; `weights` of the whole batch (a minibatch has its own:
            `minibatches`).

    Returns:
        Experience with 0 in every slot outside the completion mask.

    Raises:
        ValueError: a statistic is missing, or "exact" meets an estimator that rescales by the
            group's own spread, where the own part of the gradient could not be added back.
    """
    mask = rollout.completion_mask
    function, kwargs = ESTIMATORS[estimator], dict(estimator_kwargs or {})
    old_logprobs, ref_logprobs = keep(old_logprobs, mask), keep(ref_logprobs, mask)
    k1 = kl_estimators.k1(old_logprobs, ref_logprobs)
    if kl_in_reward == "exact":
        if exact_kl is None:
            raise ValueError('rl.kl_in_reward = "exact" needs the exact KL of each token')
        if kwargs.get("scale_by_std", estimator == "group"):
            raise ValueError(
                f'rl.kl_in_reward = "exact" with rl.advantage = "{estimator}" needs'
                " rl.scale_by_std = false: advantages must be linear in the rewards"
            )
        penalty = keep(exact_kl, mask)
    elif kl_in_reward == "k1":
        penalty = k1
    else:
        raise ValueError(f'rl.kl_in_reward = "{kl_in_reward}": "k1" or "exact"')
    rewards = token_rewards(scores, penalty, mask, kl_coef=kl_coef)
    statistics = {"rewards": rewards, "values": values, "completion_mask": mask}
    needed = statistics_of(function)
    if missing := [name for name in needed if statistics[name] is None]:
        raise ValueError(f'rl.advantage = "{estimator}" needs {", ".join(missing)}')
    advantages, returns = function(*[statistics[name] for name in needed], **kwargs)
    advantages += keep(-kl_coef * (k1 - penalty), mask)  # nothing for "k1"
    if whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(
        tokens=rollout.tokens,
        positions=rollout.positions,
        segment_ids=rollout.segment_ids,
        completion_mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=jnp.zeros_like(rewards) if values is None else keep(values, mask),
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        weights=loss_weights(mask, weighting, length=mask.shape[1]),
    )


def minibatches(
    experience: Experience,
    key: jax.Array,
    n: int,
    *,
    weighting: str = "token_mean",
    length: int | None = None,
) -> Iterator[Experience]:
    """The rows in a random order by `key`, in n minibatches of equal size.

    Each carries weights normalised over its own rows: that is the global batch of one optimizer
    step. Works on traced arrays too. Raises ValueError unless n divides the rows.
    """
    rows = experience.tokens.shape[0]
    if n < 1 or rows % n:
        raise ValueError(f"rl.minibatches = {n} does not divide the {rows} episodes")
    order = jax.random.permutation(key, rows)
    for part in range(n):
        chosen = order[part * (rows // n) : (part + 1) * (rows // n)]
        batch = jax.tree.map(lambda x: x[chosen], experience)  # noqa: B023
        weights = loss_weights(
            batch.completion_mask, weighting, length=length or experience.tokens.shape[1]
        )
        yield batch.replace(weights=weights)
