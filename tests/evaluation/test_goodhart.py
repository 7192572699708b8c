# SPDX-License-Identifier: Apache-2.0
"""Reward-against-KL curves against enumeration, closed forms, and a bandit solved exactly."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.evaluation.goodhart import (
    best_of_n_curve,
    best_of_n_kl,
    optimum,
    optimum_curve,
    overoptimised,
    share_of_gain,
)
from jaxrlhf.evaluation.results import CurvePoint


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0), (2, 0.19), (4, 0.64), (8, 1.20), (16, 1.84), (64, 3.17)]
)
def test_best_of_n_kl(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=0.006)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(2, 7))
    proxy[0, 3] = proxy[0, 5]  # a tie: either may be taken
    gold = rng.normal(size=(2, 7))
    got = {p.n: p for p in best_of_n_curve(proxy, gold, ns=(1, 2, 3, 7, 8))}
    assert sorted(got) == [1, 2, 3, 7]
    for n, point in got.items():
        best, gold_of_best = [], []
        for p, g in zip(proxy, gold, strict=True):
            for rows in itertools.combinations(range(7), n):
                rows = np.array(rows)
                winners = rows[p[rows] == p[rows].max()]
                best.append(p[winners[0]])
                gold_of_best.append(g[winners].mean())
        np.testing.assert_allclose(point.proxy, np.mean(best))
        np.testing.assert_allclose(point.gold, np.mean(gold_of_best))
    assert "proxy" not in got[7].intervals
    assert "proxy" in got[3].intervals


def test_gold_of_the_best_without_ties_is_the_mean_over_subsets():
    rng = np.random.default_rng(1)
    proxy, gold = rng.normal(size=(2, 1, 8))
    want = np.mean(
        [
            gold[0][max(rows, key=lambda i: proxy[0][i])]
            for rows in itertools.combinations(range(8), 3)
        ]
    )
    np.testing.assert_allclose(best_of_n_curve(proxy, gold, ns=[3])[0].gold, want)


def test_best_of_n_intervals_hold_for_the_expected_maximum():
    # E[max of 4 uniform] = 4/5
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        low, high = best_of_n_curve(rng.random((3, 40)), ns=[4])[0].intervals["proxy"]
        hits += low <= 0.8 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_jackknife_is_leaving_one_out_by_hand():
    from jaxrlhf.evaluation.goodhart import _best_of_n

    values = np.random.default_rng(3).normal(size=9)
    mean, variance = _best_of_n(values, values, 3)
    left_out = [_best_of_n(np.delete(values, i), np.delete(values, i), 3)[0] for i in range(9)]
    np.testing.assert_allclose(variance, 8 / 9 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert mean == pytest.approx(np.mean(left_out))


# The bandit with a known answer: pi_ref = softmax(logits), r, and J* for three coefficients.
LOGITS = np.array([0.2, -0.1, 0.4, 0.0, -0.5])
REWARD = np.array([1.0, 0.0, 0.5, -1.0, 2.0])
KNOWN = {0.1: 1.78467148, 0.5: 1.10088775, 1.0: 0.79193273}


def bandit(count: int = 200_000) -> np.ndarray:
    """[1, N] rewards in exact proportion to pi_ref, as near as N allows."""
    p = np.exp(LOGITS) / np.exp(LOGITS).sum()
    return np.repeat(REWARD, np.round(p * count).astype(int))[None]


@pytest.mark.parametrize("coef", sorted(KNOWN))
def test_optimum_of_the_bandit(coef):
    got = optimum(bandit(), coef, gold=-bandit())
    assert got.objective == pytest.approx(KNOWN[coef], abs=2e-5)
    # and the policy that reaches it, enumerated
    ref = np.exp(LOGITS) / np.exp(LOGITS).sum()
    best = ref * np.exp(REWARD / coef)
    best /= best.sum()
    assert got.proxy == pytest.approx(best @ REWARD, abs=2e-4)
    assert got.kl == pytest.approx(best @ np.log(best / ref), abs=2e-4)
    assert got.gold == pytest.approx(-got.proxy)
    assert got.objective == pytest.approx(got.proxy - coef * got.kl)
    assert got.interval[0] <= got.objective <= got.interval[1]


def test_optimum_of_normal_rewards_is_mean_plus_half_variance_over_coef():
    rewards = np.random.default_rng(4).normal(1.0, 0.5, (8, 3000))
    got = optimum(rewards, 0.5)
    assert got.interval[0] < 1 + 0.25 / (2 * 0.5) < got.interval[1]
    assert got.kl == pytest.approx(0.5, abs=0.05)  # sigma^2 / (2 coef^2)


@pytest.mark.parametrize("count", [8, 32])
def test_optimum_of_few_samples_is_not_too_low_and_lies_in_its_interval(count):
    # Put in as they are, 8 samples would say 0.40 of 0.5, and 32 0.48 (Jensen).
    rewards = np.random.default_rng(6).normal(size=(4000, count))
    got = optimum(rewards, 1.0)
    assert got.objective == pytest.approx(0.5, abs=0.025)
    assert got.kl == pytest.approx(0.5, abs=0.06)
    hits = 0
    for part in rewards.reshape(100, 40, count):
        low, high = optimum(part, 1.0).interval
        assert low < optimum(part, 1.0).objective < high
        hits += low <= 0.5 <= high
    assert hits >= 88


def test_optimum_is_the_jackknife_by_hand():
    rewards = np.random.default_rng(7).normal(size=(3, 6))
    gold = np.random.default_rng(8).normal(size=(3, 6))

    def plain(r, g):
        w = np.exp(r / 0.7)
        return np.array([0.7 * np.log(w.mean()), (w @ r) / w.sum(), (w @ g) / w.sum()])

    whole = np.array([plain(r, g) for r, g in zip(rewards, gold, strict=True)])
    left_out = np.array(
        [
            [plain(np.delete(r, i), np.delete(g, i)) for i in range(6)]
            for r, g in zip(rewards, gold, strict=True)
        ]
    )
    want = (6 * whole - 5 * left_out.mean(1)).mean(0)
    got = optimum(rewards, 0.7, gold)
    np.testing.assert_allclose([got.objective, got.proxy, got.gold], want, rtol=1e-10)
    error = np.sqrt((5 / 6 * ((left_out - left_out.mean(1)[:, None]) ** 2).sum(1)).sum(0))[0] / 3
    np.testing.assert_allclose(np.diff(got.interval), 2 * 1.959964 * error, rtol=1e-6)


def test_one_sample_a_prompt_has_no_interval_and_no_better_policy():
    got = optimum([[1.0], [3.0]], 0.5)
    assert got.objective == got.proxy == 2.0
    assert got.kl == 0
    assert got.interval is None


def test_share_of_gain():
    assert share_of_gain(0.2, base=0.1, largest=0.3) == pytest.approx(0.5)
    assert math.isnan(share_of_gain(0.2, base=0.3, largest=0.3))


def test_optimum_survives_rewards_that_underflow():
    got = optimum(np.array([[1e4, 0.0, -1e4]]), 0.01)
    assert math.isfinite(got.objective)
    assert got.effective_samples == pytest.approx(1)


def test_frontier_rises_with_kl_stops_with_the_samples_and_beats_best_of_n():
    rewards = np.random.default_rng(5).normal(size=(4, 2000))
    curve = optimum_curve(rewards)
    kl, proxy = np.array([(p.kl, p.proxy) for p in curve]).T
    assert (np.diff(kl) > 0).all()
    assert (np.diff(proxy) > 0).all()
    assert kl[0] < 0.01
    assert 1 < kl[-1] < math.log(2000)
    for point in best_of_n_curve(rewards, ns=(2, 4, 8)):
        assert np.interp(point.kl, kl, proxy) >= point.proxy - 0.01


def test_overoptimisation_is_found_only_beyond_the_intervals():
    def point(label, proxy, gold, half):
        around = {"proxy": (proxy - half, proxy + half), "gold": (gold - half, gold + half)}
        return CurvePoint("run", label, 1.0, proxy, gold, intervals=around)

    modest, greedy = point("modest", 1, 1, 0.1), point("greedy", 2, 0, 0.1)
    assert overoptimised([modest, greedy]) == [(modest, greedy)]
    assert overoptimised([point("modest", 1, 1, 0.6), point("greedy", 2, 0, 0.6)]) == []
    assert overoptimised([modest, CurvePoint("run", "unknown", 1.0, 2, 0)]) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: optimum([1.0], 1.0),
        lambda: optimum([[1.0, math.nan]], 1.0),
        lambda: optimum([[1.0]], 0.0),
        lambda: best_of_n_curve([[1.0]], [[1.0, 2.0]]),
        lambda: best_of_n_kl(0),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):  # noqa: PT011
        call()
