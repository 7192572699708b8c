# SPDX-License-Identifier: Apache-2.0
"""Preference losses against closed forms and the papers' stated properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.losses.preference import PREFERENCE_LOSSES, dpo


def pairs(seed: int, n: int = 5):
    return jax.random.normal(jax.random.key(seed), (4, n)) * 3 - 20


def test_dpo_is_log2_where_policy_equals_reference():
    chosen, rejected, _, _ = pairs(0)
    loss, metrics = dpo(chosen, rejected, chosen, rejected)
    np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-6)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        np.testing.assert_array_equal(metrics[name], 0.0)
    grads = jax.grad(lambda c, r: dpo(c, r, chosen, rejected)[0].sum(), (0, 1))(chosen, rejected)
    np.testing.assert_allclose(grads[0], -0.05, rtol=1e-6)  # -beta * sigmoid(0)
    np.testing.assert_allclose(grads[1], 0.05, rtol=1e-6)


def test_dpo_matches_a_float64_transcription_of_eq_7():
    args = pairs(1)
    c, r, rc, rr = np.asarray(args, np.float64)
    want = np.log1p(np.exp(-0.3 * ((c - rc) - (r - rr))))
    np.testing.assert_allclose(dpo(*args, beta=0.3)[0], want, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_gradient_raises_chosen_and_lowers_rejected(name):
    def loss(*args):
        return PREFERENCE_LOSSES[name](*args)[0].sum()

    d_chosen, d_rejected = jax.grad(loss, argnums=(0, 1))(*pairs(2))
    assert (d_chosen < 0).all()
    assert (d_rejected > 0).all()


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_a_constant_on_both_reference_logprobs_changes_nothing(name):
    c, r, rc, rr = pairs(3)
    loss = PREFERENCE_LOSSES[name]
    np.testing.assert_allclose(loss(c, r, rc + 4, rr + 4)[0], loss(c, r, rc, rr)[0], atol=1e-6)


def test_smoothing_is_the_expected_loss_under_flipped_labels():
    c, r, rc, rr = pairs(4)
    want = 0.8 * dpo(c, r, rc, rr)[0] + 0.2 * dpo(r, c, rr, rc)[0]
    np.testing.assert_allclose(dpo(c, r, rc, rr, label_smoothing=0.2)[0], want, rtol=1e-5)


def test_beta_to_0_is_log2_with_a_gradient_proportional_to_beta():
    c, r, rc, rr = pairs(5)
    np.testing.assert_allclose(dpo(c, r, rc, rr, beta=1e-7)[0], np.log(2), rtol=1e-6)
    grad = jax.grad(lambda c: dpo(c, r, rc, rr, beta=1e-4)[0].sum())(c)
    np.testing.assert_allclose(grad / 1e-4, -0.5, rtol=1e-2)


def test_far_margins_stay_finite():
    big = jnp.array([1e5, -1e5])
    zero = jnp.zeros(2)
    loss, grad = jax.value_and_grad(lambda x: dpo(x, zero, zero, zero)[0].sum())(big)
    np.testing.assert_allclose(loss, 1e4, rtol=1e-6)
    np.testing.assert_allclose(grad, [0, -0.1], atol=1e-7)


def test_a_tie_counts_half_in_accuracy():
    c, r, _, _ = pairs(5)
    assert (dpo(c, r, c, r)[1]["rewards/accuracies"] == 0.5).all()


def test_a_wrong_shape_is_refused_not_broadcast():
    chosen, rejected, ref_c, ref_r = pairs(3)
    with pytest.raises(Exception, match=r"(?i)shape|type"):
        dpo(chosen[:, None], rejected, ref_c, ref_r)
