# SPDX-License-Identifier: Apache-2.0
"""KL estimators: their values by sampling, their gradients by exact enumeration of a toy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.kl import KL_ESTIMATORS, k1, k2, k3

LOGITS = jnp.array([[0.2, -0.1, 0.4, 0.0, -0.5]])
REF = jax.nn.log_softmax(jnp.array([[1.0, 0.3, -0.4, 0.2, -1.5]]))[0]


def logp(logits):
    return jax.nn.log_softmax(logits)[0]


def kl(a, b):
    return (jnp.exp(a) * (a - b)).sum()


def test_values_match_numpy():
    p, q = np.random.default_rng(0).normal(-3, 2, (2, 4, 5))
    r = np.exp(q - p)
    p32, q32 = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    np.testing.assert_allclose(k1(p32, q32), -np.log(r), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(k2(p32, q32), np.log(r) ** 2 / 2, rtol=1e-5)
    np.testing.assert_allclose(k3(p32, q32), r - 1 - np.log(r), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_equal_models_give_exactly_0(name):
    x = jax.random.normal(jax.random.key(0), (3, 4)) * 5 - 9
    assert (KL_ESTIMATORS[name](x, x) == 0).all()


def test_k3_is_never_negative_however_close_the_models():
    x = jax.random.normal(jax.random.key(0), (10_000,)) * 5 - 9
    y = x + jax.random.normal(jax.random.key(1), x.shape) * jnp.logspace(-7, 0, x.size)
    assert k3(x, y).min() >= 0
    assert k2(x, y).min() >= 0


def test_means_over_samples_reach_the_exact_kl():
    p = logp(LOGITS)
    ids = jax.random.categorical(jax.random.key(1), p, shape=(100_000,))
    for estimate in (k1, k3):
        drawn = estimate(p[ids], REF[ids])
        sigma = drawn.std() / np.sqrt(drawn.size)
        assert abs(drawn.mean() - kl(p, REF)) < 3 * sigma


def expected(f):
    """Gradient of E_p[f(log p, log q)], the sampling distribution held still, as training does."""

    def objective(logits):
        p = logp(logits)
        return (jax.lax.stop_gradient(jnp.exp(p)) * f(p, REF)).sum()

    return jax.grad(objective)(LOGITS)


def reinforce(reward):
    """Policy gradient of E_p[-reward]: the reward is a constant, grad log p carries it."""
    return expected(lambda p, q: -jax.lax.stop_gradient(reward(p, q)) * p)


def test_which_gradient_each_estimator_has():
    forward = jax.grad(lambda x: kl(logp(x), REF))(LOGITS)  # KL(p || q)
    backward = jax.grad(lambda x: kl(REF, logp(x)))(LOGITS)  # KL(q || p)
    np.testing.assert_allclose(reinforce(lambda p, q: -k1(p, q)), forward, atol=1e-6)
    np.testing.assert_allclose(expected(k2), forward, atol=1e-6)
    np.testing.assert_allclose(expected(k3), backward, atol=1e-6)
    np.testing.assert_allclose(expected(k1), jnp.zeros_like(forward), atol=1e-6)
    assert abs(forward - backward).max() > 0.03  # the toy tells them apart
