# SPDX-License-Identifier: Apache-2.0
"""Pairwise reward losses against the papers' formulas."""

import jax
import numpy as np
import pytest

from jaxrlhf.losses.reward import REWARD_LOSSES, pairwise


def scores(seed: int, n: int = 6):
    return jax.random.normal(jax.random.key(seed), (3, n)) * 2


def test_matches_a_float64_transcription():
    args = scores(0)
    c, r, m = np.asarray(args, np.float64)
    for scale, center in [(1.0, 0.0), (0.5, 0.01), (0.0, 0.0)]:
        want = np.log1p(np.exp(-(c - r - scale * m))) + center * (c + r) ** 2
        got, metrics = pairwise(*args, margin_scale=scale, center_coef=center)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(metrics["rewards/accuracies"], c > r)
        np.testing.assert_allclose(metrics["rewards/margins"], c - r, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(REWARD_LOSSES))
def test_offset_swap_and_ties(name):
    c, r, m = scores(1)
    loss = REWARD_LOSSES[name]
    shifted, swapped = loss(c + 3, r + 3, m), loss(r, c, -m)
    np.testing.assert_allclose(shifted[0], loss(c, r, m)[0], atol=1e-6)
    np.testing.assert_allclose(
        swapped[1]["rewards/margins"], -loss(c, r, m)[1]["rewards/margins"], atol=1e-6
    )
    tie, metrics = loss(c, c, 0 * m)
    np.testing.assert_allclose(tie, np.log(2), rtol=1e-6)
    assert (metrics["rewards/accuracies"] == 0.5).all()


def test_equal_texts_give_the_weights_no_gradient():
    features, weights = jax.random.normal(jax.random.key(2), (5, 4)), jax.numpy.ones(4)

    def loss(w):
        return pairwise(features @ w, features @ w, jax.numpy.zeros(5))[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(weights), 0, atol=1e-7)


def test_a_larger_margin_pushes_harder():
    c, r, _ = scores(3)

    def push(margin):
        return jax.grad(lambda c: pairwise(c, r, 0 * r + margin)[0].sum())(c)

    assert (push(2.0) < push(0.0)).all()
    assert (push(0.0) < 0).all()
