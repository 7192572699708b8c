# SPDX-License-Identifier: Apache-2.0
"""What must hold for every loss in every table: garbage, finite differences, accumulation."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.losses.lm import LM_LOSSES
from jaxrlhf.losses.policy import POLICY_LOSSES, clipped_value, entropy_bonus
from jaxrlhf.losses.preference import PREFERENCE_LOSSES
from jaxrlhf.losses.reward import REWARD_LOSSES
from jaxrlhf.ops.masking import token_weights, weighted_sum

PER_TOKEN = {
    **LM_LOSSES,
    **POLICY_LOSSES,
    "clipped_value": clipped_value,
    "entropy_bonus": lambda entropies, completion_mask: entropy_bonus(
        entropies, completion_mask, entropy_coef=0.1
    ),
}
PER_PAIR = {**REWARD_LOSSES, **PREFERENCE_LOSSES}
SHAPE = (4, 6)
MASK = jnp.asarray(np.random.default_rng(1).random(SHAPE) < 0.6).at[2].set(False)


def statistics(loss, shape, dtype="float32"):
    """One random array for each positional parameter but the mask, by name."""
    names = [
        p.name
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "completion_mask"
    ]
    draws = jax.random.normal(jax.random.key(3), (len(names), *shape), dtype)
    return dict(zip(names, draws * 0.3 - 1, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1.0])
@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_masked_garbage_changes_no_bit_of_loss_gradients_or_metrics(name, bad):
    loss = PER_TOKEN[name]
    stats = statistics(loss, SHAPE)
    weights = token_weights(MASK)

    def total(stats):
        value, metrics = loss(**stats, completion_mask=MASK)
        sums = {k: weighted_sum(v, weights) for k, v in metrics.items()}
        return weighted_sum(value, weights), (value, metrics, sums)

    def run(fill):
        dirty = {k: jnp.where(MASK, v, fill) for k, v in stats.items()}
        return jax.value_and_grad(total, has_aux=True)(dirty)

    for clean, dirty in zip(jax.tree.leaves(run(0.0)), jax.tree.leaves(run(bad)), strict=True):
        np.testing.assert_array_equal(clean, dirty)
        assert np.isfinite(dirty).all()
        if dirty.shape == SHAPE:
            assert (np.asarray(dirty)[~np.asarray(MASK)] == 0).all()


@pytest.mark.parametrize("name", sorted({**PER_TOKEN, **PER_PAIR}))
def test_gradients_equal_central_differences(name):
    with jax.enable_x64(True):
        loss = {**PER_TOKEN, **PER_PAIR}[name]
        stats = statistics(loss, SHAPE if name in PER_TOKEN else SHAPE[:1], "float64")
        mask = {"completion_mask": MASK} if name in PER_TOKEN else {}

        def total(stats):
            return loss(**stats, **mask)[0].sum()

        grads = jax.grad(total)(stats)
        moved = jax.jit(
            lambda which, i, h: total(
                {
                    k: v.ravel().at[i].add(h * (k == which)).reshape(v.shape)
                    for k, v in stats.items()
                }
            ),
            static_argnums=0,
        )
        for which, x in stats.items():
            for i in range(x.size):
                numeric = (moved(which, i, 1e-6) - moved(which, i, -1e-6)) / 2e-6
                np.testing.assert_allclose(
                    grads[which].ravel()[i], numeric, rtol=1e-5, atol=1e-8, err_msg=which
                )


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_parts_add_up_to_the_whole_batch_also_wholly_masked_ones(name):
    loss = PER_TOKEN[name]
    stats, weights = statistics(loss, SHAPE), token_weights(MASK)

    def total(stats, mask, weights):
        return weighted_sum(loss(**stats, completion_mask=mask)[0], weights)

    whole = jax.grad(total)(stats, MASK, weights)
    parts = [
        jax.grad(total)({k: v[i : i + 1] for k, v in stats.items()}, MASK[i : i + 1], w)
        for i, w in enumerate(jnp.split(weights, 4))
    ]
    for k, want in whole.items():
        got = jnp.concatenate([part[k] for part in parts])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_next_token_is_the_mean_negative_log_probability():
    logprobs = -jnp.arange(24.0).reshape(SHAPE) / 7
    loss, metrics = LM_LOSSES["next_token"](logprobs, MASK)
    want = -np.asarray(logprobs, np.float64)[np.asarray(MASK)].mean()
    np.testing.assert_allclose(weighted_sum(loss, token_weights(MASK)), want, rtol=1e-6)
    np.testing.assert_array_equal(metrics["nll"], loss)
