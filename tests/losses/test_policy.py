# SPDX-License-Identifier: Apache-2.0
"""PPO's losses against float64 NumPy, and what their gradients must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.losses.policy import POLICY_LOSSES, clipped_value, entropy_bonus, ppo_clip

SHAPE = (4, 6)
MASK = jnp.asarray(np.random.default_rng(0).random(SHAPE) < 0.6)


def case(seed: int):
    k = jax.random.split(jax.random.key(seed), 3)
    new, advantages = jax.random.normal(k[0], SHAPE) - 3, jax.random.normal(k[1], SHAPE)
    return new, new + 0.4 * jax.random.normal(k[2], SHAPE), advantages


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.floats(0.05, 0.3), high=st.floats(0.05, 0.5))
def test_ppo_clip_matches_eq_7(seed, low, high):
    args = case(seed)
    new, old, a = np.asarray(args, np.float64)
    mask = np.asarray(MASK)
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - low, 1 + high)
    loss, metrics = ppo_clip(*args, MASK, clip_eps=low, clip_eps_high=high)
    want = np.where(mask, -np.minimum(ratio * a, clipped * a), 0)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio"], np.where(mask, ratio, 0), rtol=1e-5)
    want = np.where(mask, clipped * a < ratio * a, 0)
    np.testing.assert_allclose(metrics["clip_ratio"], want)
    want = np.where(mask, ratio - 1 - np.log(ratio), 0)
    np.testing.assert_allclose(metrics["approx_kl"], want, rtol=1e-3, atol=1e-6)


def test_the_default_band_is_symmetric():
    args = case(1)
    got = ppo_clip(*args, MASK, clip_eps=0.15)[0]
    np.testing.assert_array_equal(got, ppo_clip(*args, MASK, clip_eps=0.15, clip_eps_high=0.15)[0])


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_at_ratio_1_it_is_the_policy_gradient_and_the_metrics_say_so(name):
    new, _, a = case(2)
    loss = POLICY_LOSSES[name]
    grad = jax.grad(lambda x: loss(x, new, a, MASK)[0].sum())(new)
    np.testing.assert_allclose(grad, jnp.where(MASK, -a, 0), atol=1e-6)
    metrics = loss(new, new, a, MASK)[1]
    np.testing.assert_array_equal(metrics["ratio"], MASK.astype(jnp.float32))
    assert (metrics["clip_ratio"] == 0).all()
    assert (metrics["approx_kl"] == 0).all()


def test_the_gradient_vanishes_on_the_side_the_advantage_pushes_to_and_only_there():
    #                 above, A>0 | above, A<0 | below, A>0 | below, A<0 | inside
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]])
    a = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]])
    on = jnp.ones((1, 5), bool)
    grad = jax.grad(lambda x: ppo_clip(x, jnp.zeros((1, 5)), a, on)[0].sum())(jnp.log(ratio))
    want = jnp.array([[0.0, 1.5, -0.5, 0.0, -1.1]])
    np.testing.assert_allclose(grad, want, rtol=1e-6)
    assert grad[0, 0] == 0 == grad[0, 3]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), clip=st.sampled_from([0.05, 0.2, 1.0, float("inf")]))
def test_clipped_value_matches_the_formula(seed, clip):
    args = case(seed)
    v, old, ret = np.asarray(args, np.float64)
    near = old + np.clip(v - old, -clip, clip)
    free, clipped = (v - ret) ** 2, (near - ret) ** 2
    loss, metrics = clipped_value(*args, MASK, value_clip=clip)
    mask = np.asarray(MASK)
    want = np.where(mask, np.maximum(free, clipped) / 2, 0)
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        metrics["value/error"], np.where(mask, free, 0), rtol=1e-4, atol=1e-5
    )
    far = mask & (abs(clipped - free) > 1e-4)
    assert (np.asarray(metrics["value/clip_ratio"])[far] == (clipped > free)[far]).all()


def test_the_critic_gets_no_gradient_once_clipping_is_the_worse_branch():
    v, old, ret = jnp.array([[2.0, 0.1]]), jnp.zeros((1, 2)), jnp.array([[5.0, 5.0]])
    on = jnp.ones((1, 2), bool)
    grad = jax.grad(lambda v: clipped_value(v, old, ret, on)[0].sum())(v)
    np.testing.assert_allclose(grad, [[0.0, -4.9]], rtol=1e-6)


def test_entropy_bonus_rewards_entropy():
    entropies = jnp.full(SHAPE, 2.0)
    loss, metrics = entropy_bonus(entropies, MASK, entropy_coef=0.01)
    np.testing.assert_allclose(loss, jnp.where(MASK, -0.02, 0), rtol=1e-6)
    np.testing.assert_array_equal(metrics["entropy"], jnp.where(MASK, 2.0, 0))
