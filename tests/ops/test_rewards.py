# SPDX-License-Identifier: Apache-2.0
"""The score lands on the last completion token and nothing else is lost or gained."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.rewards import last_token, token_rewards

MASK = np.array(
    [
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],  # a hole
        [0, 0, 0, 0, 0, 1],  # ends in the last slot
        [0, 0, 0, 0, 0, 0],  # a filler row
    ],
    bool,
)


def test_the_score_is_on_the_last_completion_token():
    assert last_token(jnp.asarray(MASK)).argmax(1).tolist() == [3, 4, 5, 0]
    assert last_token(jnp.asarray(MASK)).sum(1).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e30])
def test_rewards_sum_to_score_less_the_penalty(bad):
    rng = np.random.default_rng(0)
    scores, kl = rng.normal(size=4).astype(np.float32), rng.normal(size=MASK.shape)
    dirty = jnp.asarray(np.where(MASK, kl, bad), jnp.float32)
    scores_in = jnp.asarray(scores).at[3].set(bad)  # a row without a completion drops its score
    got = np.asarray(token_rewards(scores_in, dirty, jnp.asarray(MASK), kl_coef=0.3))
    want = np.where(MASK, -0.3 * kl, 0)
    for b, t in enumerate([3, 4, 5]):
        want[b, t] += scores[b]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got[~MASK] == 0).all()
    total = scores[:3] - 0.3 * np.where(MASK, kl, 0).sum(1)[:3]
    np.testing.assert_allclose(got.sum(1)[:3], total, atol=1e-6)


def test_float_scores_stay_floats():
    got = token_rewards(jnp.full(4, 0.25), jnp.zeros(MASK.shape), jnp.asarray(MASK), kl_coef=0.0)
    assert got.sum() == 0.75
