# SPDX-License-Identifier: Apache-2.0
"""Reward-model judgements against closed forms and a worked example."""

import math

import numpy as np
import pytest

from jaxrlhf.evaluation import calibration as cal


def logit(p):
    return np.log(np.asarray(p) / (1 - np.asarray(p)))


def test_a_tie_is_half_right():
    assert cal.correct([1.0, 0.0, -1.0]).tolist() == [1, 0.5, 0]
    assert cal.reliability(np.zeros(7)).accuracy == 0.5
    assert cal.reliability(np.zeros(7)).ece == 0.0  # says 0.5, is right half the time


def test_ece_by_hand():
    # Two at confidence 0.6 (one right), two at 0.9 (both right): 1/2*|0.5-0.6| + 1/2*|1-0.9|
    table = cal.reliability([logit(0.6), -logit(0.6), logit(0.9), logit(0.9)], bins=4)
    assert table.ece == pytest.approx(0.1)
    assert [b.count for b in table.bins] == [2, 0, 0, 2]
    assert table.bins[0].accuracy == 0.5
    assert table.bins[0].confidence == pytest.approx(0.6)
    assert math.isnan(table.bins[1].accuracy)
    assert (table.bins[0].low, table.bins[-1].high) == (0.5, 1.0)


def test_brier_score_by_hand():
    # The chosen one had 0.8, 0.3 and, undecided, 0.5; a tie is as far from the truth as it says.
    metrics, _, _ = cal.judge_pairs([logit(0.8), logit(0.3), 0.0], [0.0, 0.0, 0.0], samples=10)
    assert metrics["brier"] == pytest.approx((0.2**2 + 0.7**2 + 0.5**2) / 3)


def test_swapping_every_pair_mirrors_accuracy():
    margins = np.random.default_rng(0).normal(size=300)
    assert cal.reliability(-margins).accuracy == pytest.approx(
        1 - cal.reliability(margins).accuracy
    )


def test_labels_drawn_from_the_model_are_calibrated_and_doubled_margins_are_not():
    rng = np.random.default_rng(1)
    margins = rng.normal(0, 2, 40_000)
    margins = np.where(rng.random(40_000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert cal.reliability(margins).ece < 0.01
    assert cal.reliability(3 * margins).ece > 0.1


def test_huge_margins_do_not_overflow():
    table = cal.reliability([1e30, -1e30, np.inf])
    assert table.bins[-1].count == 3
    with pytest.raises(ValueError, match="pair 1 is NaN"):
        cal.reliability([1.0, np.nan])


def test_loss_of_an_undecided_model_is_ln_2():
    np.testing.assert_allclose(cal.pair_loss([0.0]), np.log(2))


def test_a_model_that_counts_words_is_seen_through():
    rng = np.random.default_rng(2)
    long_c, long_r = rng.integers(1, 50, (2, 500)).astype(float)
    got = cal.length_bias(2 * long_c, 2 * long_r, long_c, long_r)
    assert got["length_bias/correlation"] == pytest.approx(1)
    assert got["length_bias/margin_correlation"] == pytest.approx(1)
    assert got["length_bias/prefers_longer"] == 1 - 0.5 * np.mean(long_c == long_r)
    assert got["accuracy/when_longer"] == 1
    assert got["accuracy/when_shorter"] == 0
    assert got["accuracy/longer_wins"] == cal.longer_wins(long_c, long_r)
    same = cal.length_bias([1.0, 2.0], [0.0, 1.0], [5, 5], [5, 5])
    assert math.isnan(same["length_bias/correlation"])
    assert same["accuracy/longer_wins"] == 0.5


def test_judge_pairs_puts_values_inside_their_intervals():
    rng = np.random.default_rng(3)
    scores = rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)
    metrics, intervals, table = cal.judge_pairs(
        *scores, chosen_lengths=rng.integers(1, 9, 300), rejected_lengths=rng.integers(1, 9, 300)
    )
    for name in ("accuracy", "pair_loss"):
        assert intervals[name][0] < metrics[name] < intervals[name][1]
    assert metrics["ece"] == table.ece
    assert "accuracy/longer_wins" in metrics
    wide = cal.judge_pairs(*scores, clusters=np.arange(300) // 30)[1]["accuracy"]
    assert wide != intervals["accuracy"]


def test_bag_of_words_learns_a_word_and_is_blind_to_the_rest():
    pytest.importorskip("sklearn", reason="the bag-of-words floor is an optional extra")
    good = [f"thing {i} is good" for i in range(20)]
    bad = [f"thing {i} is bad" for i in range(20)]
    margins = cal.bag_of_words(
        good, bad, ["all good here", "unseen", "bad"], ["bad", "new", "good"]
    )
    assert margins[0] > 0
    assert margins[1] == 0
    assert margins[2] < 0


def test_bag_of_words_is_the_regularised_optimum_of_the_pair_loss():
    pytest.importorskip("sklearn", reason="the bag-of-words floor is an optional extra")
    import scipy.optimize

    chosen = ["aa"] * 7 + ["bb"] * 3
    rejected = ["bb"] * 7 + ["aa"] * 3

    def loss(w):  # two features, aa and bb, with opposite weights by symmetry: margin 2w
        return w**2 + 7 * np.log1p(np.exp(-2 * w)) + 3 * np.log1p(np.exp(2 * w))

    best = scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    margins = cal.bag_of_words(chosen, rejected, ["aa"], ["bb"])
    np.testing.assert_allclose(margins, [2 * best], atol=1e-3)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    margin = np.log(3.0)
    assert 1 / (1 + np.exp(-margin)) == 0.75
    assert [b.count for b in cal.reliability([margin], bins=2).bins] == [1, 0]
