# SPDX-License-Identifier: Apache-2.0
"""Intervals against closed forms, published tables, and how often they hold."""

import math

import numpy as np
import pytest

from jaxrlhf.evaluation.intervals import (
    bootstrap,
    bootstrap_mean,
    mean_interval,
    normal_interval,
    paired_difference,
    wilson_interval,
)


def test_bootstrap_of_a_normal_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    got = bootstrap_mean(values, samples=4000)
    want = normal_interval(values.mean(), values.std() / math.sqrt(400))
    np.testing.assert_allclose(got, want, atol=0.02)


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    values = np.arange(30.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_chunking_changes_nothing_that_matters(monkeypatch):
    values = np.random.default_rng(1).normal(size=200)
    whole = bootstrap_mean(values)
    monkeypatch.setattr("jaxrlhf.evaluation.intervals.ROWS_AT_ONCE", 1)
    np.testing.assert_allclose(bootstrap_mean(values), whole, rtol=1e-12)


def test_clusters_widen_the_interval_of_rows_that_move_together():
    rng = np.random.default_rng(2)
    prompt = np.repeat(np.arange(20), 10)
    values = rng.normal(size=20)[prompt] + 0.1 * rng.normal(size=200)
    naive, honest, fixed = (
        np.diff(bootstrap_mean(values, **{kind: prompt} if kind else {}))[0]
        for kind in ("", "clusters", "strata")
    )
    assert honest > 2.5 * naive  # sqrt(10) in the limit
    assert fixed < 0.2 * naive  # only the noise within a prompt is left


def test_cluster_intervals_hold_as_often_as_they_say():
    rng = np.random.default_rng(3)
    prompt = np.repeat(np.arange(40), 4)
    hits = 0
    for trial in range(200):
        values = rng.normal(size=40)[prompt] + rng.normal(size=160)
        low, high = bootstrap_mean(values, clusters=prompt, samples=300, seed=trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_weights_make_a_ratio_of_sums():
    low, high = bootstrap_mean([1.0, 3.0], [3.0, 1.0], samples=5000)
    assert (low, high) == (1.0, 3.0)  # all draws are 1, 1.5 or 3
    assert bootstrap_mean([2.0] * 5, [0, 1, 2, 0, 1]) == (2.0, 2.0)


def test_generic_bootstrap_agrees_with_the_fast_one():
    values = np.random.default_rng(4).normal(size=100)
    slow = bootstrap(lambda rows: values[rows].mean(), 100, samples=3000)
    np.testing.assert_allclose(slow, bootstrap_mean(values), atol=0.03)


def test_paired_difference_forgets_what_both_share():
    shared = np.random.default_rng(5).normal(0, 100, 50)
    delta, (low, high) = paired_difference(shared, shared + 1)
    assert delta == pytest.approx(1)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_t_interval_of_three_seeds():
    # t(0.975, 2) = 4.30265 from the tables; mean 2, standard error 1/sqrt(3)
    low, high = mean_interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose((low, high), (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rtol=1e-5)
    assert mean_interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("successes", "count", "want"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
     (1, 29, (0.0061, 0.1718))],
)  # fmt: skip
def test_wilson_matches_newcombes_table(successes, count, want):
    np.testing.assert_allclose(wilson_interval(successes, count), want, atol=5e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, math.nan]),
        lambda: bootstrap_mean([1.0, 2.0], [0.0, 0.0]),
        lambda: bootstrap_mean([1.0, 2.0], clusters=[1]),
        lambda: bootstrap_mean([1.0], clusters=[1], strata=[1]),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: bootstrap_mean([1.0, 2.0], level=95),
        lambda: wilson_interval(3, 2),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):  # noqa: PT011
        call()
