# SPDX-License-Identifier: Apache-2.0
"""Filters against a sorting transcription and transformers; draws against the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.sampling.filters import _pick, candidates, draw

V = 19


def dense(logits, **kwargs):
    """The sampled distribution as probabilities [B, V] in vocabulary order."""
    logprobs, ids = candidates(logits, **kwargs)
    rows = jnp.arange(logits.shape[0])[:, None]
    return np.asarray(jnp.zeros(logits.shape).at[rows, ids].set(jnp.exp(logprobs)), np.float64)


def by_sorting(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    out = np.zeros(logits.shape)
    for b, row in enumerate(np.asarray(logits, np.float64) / temperature):
        order = np.argsort(-row, kind="stable")[: top_k or None]
        p = np.exp(row[order] - row[order].max())
        p /= p.sum()
        kept = (np.cumsum(p) - p < top_p) & (p >= min_p * p.max())
        out[b, order[kept]] = p[kept] / p[kept].sum()
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, V, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_every_combination_is_the_sorted_definition_and_sums_to_1(seed, **settings_):
    seed, kwargs = seed, settings_
    logits = jax.random.normal(jax.random.key(seed), (3, V)) * 2
    got = dense(logits, **kwargs)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(got, by_sorting(logits, **kwargs), atol=2e-6)


def test_extreme_logits_keep_at_least_the_likeliest():
    logits = jnp.array([[1e4, 0, -1e4, 5.0], [-1e30, -1e30, 0, -1e30]])
    for kwargs in ({"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 1}, {"top_p": 0.1, "top_k": 3}):
        got = dense(logits, **kwargs)
        np.testing.assert_array_equal(got.argmax(-1), [0, 2])
        np.testing.assert_allclose(got.max(-1), 1)


def test_greedy_is_the_likeliest_token_with_certainty():
    logits = jax.random.normal(jax.random.key(0), (4, V))
    logprobs, ids = candidates(logits, temperature=0.0, top_p=0.5)
    np.testing.assert_array_equal(ids[:, 0], logits.argmax(-1))
    assert (logprobs == 0).all()


@pytest.mark.torch
@pytest.mark.parametrize(
    "kwargs",
    [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.7, "min_p": 0.2}],
)
def test_filters_are_those_of_transformers(kwargs):
    import torch
    import transformers as hf

    logits = jax.random.normal(jax.random.key(1), (6, V)) * 2
    want = torch.tensor(np.asarray(logits))
    want = hf.TemperatureLogitsWarper(0.7)(None, want)
    warpers = {
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    for name, value in kwargs.items():
        want = warpers[name](value)(None, want)
    got = dense(logits, temperature=0.7, **kwargs)
    np.testing.assert_allclose(got, torch.softmax(want, -1).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_p": 0.7, "top_k": 6},
        {"min_p": 0.2},
    ],
)
def test_draws_follow_the_distribution(kwargs):
    n = 20_000
    logits = jax.random.normal(jax.random.key(2), (1, V))
    logprobs, ids = candidates(logits, **kwargs)
    keys = jax.random.split(jax.random.key(3), n)
    picked = draw(keys, jnp.broadcast_to(logprobs, (n, logprobs.shape[1])))
    counts = np.bincount(np.asarray(ids)[0][np.asarray(picked)], minlength=V)
    assert chi_square_p(counts, dense(logits, **kwargs)[0]) > 1e-4


def chi_square_p(counts, probs):
    """p-value of the counts; a token of probability 0 that was drawn is no chance at all."""
    from scipy.stats import chisquare

    assert counts[probs == 0].sum() == 0
    used = probs > 0
    if used.sum() == 1:
        return 1.0
    return chisquare(counts[used], probs[used] / probs[used].sum() * counts.sum()).pvalue


def test_two_level_draws_of_a_large_vocabulary_follow_the_distribution():
    n, wide = 20_000, 1000
    logits = jax.random.normal(jax.random.key(4), (wide,)) * 2
    logprobs = jax.nn.log_softmax(jnp.where(jnp.arange(wide) % 7 == 0, -jnp.inf, logits))
    keys = jax.random.split(jax.random.key(5), n)
    picked = np.asarray(jax.jit(draw)(keys, jnp.broadcast_to(logprobs, (n, wide))))
    assert not (picked % 7 == 0).any()
    assert picked.max() < wide
    # Pool the tail so that every cell expects enough.
    order = np.argsort(-np.asarray(logprobs))
    cells = np.full(wide, 60)
    cells[order[:60]] = np.arange(60)
    probs = np.bincount(cells, np.exp(np.asarray(logprobs, np.float64)), 61)
    assert chi_square_p(np.bincount(cells[picked], minlength=61), probs) > 1e-4


def test_a_pick_never_lands_on_weight_0():
    weights = jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0]])
    below_one = np.nextafter(np.float32(1), np.float32(0))
    for uniform, want in [(0.0, 1), (0.29, 1), (0.31, 3), (below_one, 3)]:
        assert _pick(weights, jnp.array([uniform], jnp.float32))[0] == want


@pytest.mark.parametrize(
    "kwargs", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}]
)
def test_a_setting_without_a_meaning_is_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        candidates(jnp.zeros((1, V)), **kwargs)
