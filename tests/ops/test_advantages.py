# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators against reverse loops in float64 and their papers' identities."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.ops.advantages import ESTIMATORS, gae, group, rloo, rloo_to_go

B, T, G = 6, 8, 3


def case(seed: int):
    """Rewards, values, and a mask of spans with holes in them."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(1, 4, B), rng.integers(1, 5, B)
    t = np.arange(T)
    mask = (t >= start[:, None]) & (t < (start + length)[:, None])
    mask &= rng.random((B, T)) < 0.8
    rewards, values = rng.normal(size=(2, B, T)).astype(np.float32)
    return rewards, values, mask


def gae_by_loop(rewards, values, mask, gamma, lam):
    advantages = np.zeros((B, T))
    for b in range(B):
        slots = [t for t in range(T) if mask[b, t]]
        after_value = after = 0.0
        for t in reversed(slots):
            delta = float(rewards[b, t]) + gamma * after_value - float(values[b, t])
            after = advantages[b, t] = delta + gamma * lam * after
            after_value = float(values[b, t])
    return advantages, np.where(mask, advantages + values, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_gae_is_the_reverse_loop(seed, gamma, lam):
    rewards, values, mask = case(seed)
    want = gae_by_loop(rewards, values, mask, gamma, lam)
    got = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, gae_lambda=lam)
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1], want[1], atol=2e-6)


def test_lambda_1_is_the_return_less_the_value_and_lambda_0_the_td_error():
    rewards, values, mask = case(3)
    args = tuple(map(jnp.asarray, (rewards, values, mask)))
    to_go = np.where(mask, rewards, 0).astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(
        gae(*args, gae_lambda=1.0)[0], np.where(mask, to_go - values, 0), atol=2e-6
    )
    contiguous = np.broadcast_to((np.arange(T) > 1) & (np.arange(T) < 6), (B, T))
    following = np.where(np.arange(T) < 5, np.roll(values, -1, 1), 0)
    got = gae(args[0], args[1], jnp.asarray(contiguous), gae_lambda=0.0)[0]
    want = np.where(contiguous, rewards + following - values, 0)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1.0])
def test_masked_garbage_is_nothing_bitwise(name, bad):
    rewards, values, mask = case(5)
    names = inspect.signature(ESTIMATORS[name]).parameters
    kwargs = {"samples_per_prompt": G} if "samples_per_prompt" in names else {}

    def run(fill):
        stats = {
            "rewards": jnp.asarray(np.where(mask, rewards, fill), jnp.float32),
            "values": jnp.asarray(np.where(mask, values, fill), jnp.float32),
            "completion_mask": jnp.asarray(mask),
        }
        return ESTIMATORS[name](*[stats[n] for n in names if n in stats], **kwargs)

    for clean, dirty in zip(run(0.0), run(bad), strict=True):
        np.testing.assert_array_equal(clean, dirty)
        assert (np.asarray(dirty)[~mask] == 0).all()


def test_group_is_the_standardised_return():
    rewards, _, mask = case(7)
    total = np.where(mask, rewards, 0).astype(np.float64).sum(1).reshape(-1, G)
    for scaled in (True, False):
        want = total - total.mean(1, keepdims=True)
        if scaled:
            want /= total.std(1, ddof=1, keepdims=True) + 1e-4
        got, returns = group(
            jnp.asarray(rewards), jnp.asarray(mask), samples_per_prompt=G, scale_by_std=scaled
        )
        np.testing.assert_allclose(got, np.where(mask, want.reshape(-1, 1), 0), atol=2e-6)
        np.testing.assert_allclose(returns, np.where(mask, total.reshape(-1, 1), 0), atol=2e-6)


def test_rloo_baseline_is_the_mean_of_the_others():
    rewards, _, mask = case(8)
    total = np.where(mask, rewards, 0).astype(np.float64).sum(1)
    want = np.zeros(B)
    for b in range(B):
        mates = [i for i in range(B) if i // G == b // G and i != b]
        want[b] = total[b] - np.mean(total[mates])
    got, _ = rloo(jnp.asarray(rewards), jnp.asarray(mask), samples_per_prompt=G)
    np.testing.assert_allclose(got, np.where(mask, want[:, None], 0), atol=2e-6)


def test_rloo_to_go_compares_what_is_still_to_come():
    rewards, _, mask = case(9)
    gamma = 0.9
    to_go = np.zeros((B, T))
    for b in range(B):
        after = 0.0
        for t in reversed(range(T)):
            after = rewards[b, t] + gamma * after if mask[b, t] else after
            to_go[b, t] = after
    want = np.zeros((B, T))
    for b in range(B):
        mates = [i for i in range(B) if i // G == b // G and i != b]
        want[b] = to_go[b] - to_go[mates].mean(0)
    got, returns = rloo_to_go(
        jnp.asarray(rewards), jnp.asarray(mask), samples_per_prompt=G, gamma=gamma
    )
    np.testing.assert_allclose(got, np.where(mask, want, 0), atol=2e-6)
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0), atol=2e-6)


@pytest.mark.parametrize("estimator", [group, rloo, rloo_to_go])
def test_groups_equal_rewards_order_and_offset(estimator):
    mask = jnp.ones((B, T), bool)
    equal = jnp.full((B, T), 0.1)
    assert (estimator(equal, mask, samples_per_prompt=G)[0] == 0).all()
    rewards = jax.random.normal(jax.random.key(0), (B, T))
    got = estimator(rewards, mask, samples_per_prompt=G)[0]
    np.testing.assert_allclose(got.reshape(2, G, T).sum(1), 0, atol=1e-5)
    swap = np.array([3, 4, 5, 0, 1, 2])
    np.testing.assert_allclose(
        estimator(rewards[swap], mask, samples_per_prompt=G)[0], got[swap], atol=1e-6
    )


@pytest.mark.parametrize("n", [1, 4])
def test_rows_that_are_no_whole_groups_are_refused(n):
    x = jnp.zeros((B, T))
    with pytest.raises(ValueError, match=f"samples_per_prompt = {n}"):
        rloo(x, x == 0, samples_per_prompt=n)


def test_a_transposed_or_unbroadcast_shape_is_refused():
    x = jnp.zeros((B, T))
    with pytest.raises(Exception, match=r"(?i)shape|type"):
        gae(x, x[:, :1], x == 0)
