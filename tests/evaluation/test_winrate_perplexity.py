# SPDX-License-Identifier: Apache-2.0
"""Win rates and perplexity against counts by hand."""

import math

import numpy as np
import pytest

from jaxrlhf.evaluation.perplexity import perplexity
from jaxrlhf.evaluation.winrate import compare, win_rate, wins


def test_ties_are_half_wins():
    assert wins([0, 0, 0], [1, 0, -1]).tolist() == [1, 0.5, 0]
    assert wins([0, 0, 0], [1, 0.2, -0.2], tie_within=0.2).tolist() == [1, 0.5, 0.5]


def test_comparison_adds_up_and_mirrors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 200), rng.normal(0.5, 1, 200)
    there, back = compare("gold", "a", a, b), compare("gold", "b", b, a)
    assert there.delta == pytest.approx(there.after - there.before) == pytest.approx(-back.delta)
    assert there.win_rate == pytest.approx(1 - back.win_rate)
    assert there.interval[0] < there.delta < there.interval[1]
    assert there.win_rate_interval[0] < there.win_rate < there.win_rate_interval[1]
    assert there.count == 200


def test_a_model_against_itself_wins_half():
    same = compare("gold", "a", [1.0, 2.0], [1.0, 2.0])
    assert same.win_rate == 0.5
    assert same.win_rate_interval == (0.5, 0.5)
    assert same.delta == 0


def test_any_scorer_with_columns():
    def scorer(prompts, completions, *, wanted):
        return [float(w in c) for c, w in zip(completions, wanted, strict=True)]

    got = win_rate(scorer, ["p", "q"], ["x y", "z"], ["y", "z"], columns={"wanted": ["x", "z"]})
    assert got.win_rate == 0.75
    assert got.after == 1.0
    assert got.before == 0.5


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [[1.0, 2.0]], [None, 1.0]])
def test_a_missing_score_never_counts_as_a_loss(scores):
    with pytest.raises(ValueError, match="not finite"):
        win_rate(lambda prompts, completions: scores, ["p", "q"], ["a", "b"], ["c", "d"])


def test_perplexity_is_per_token_of_the_corpus_not_per_document():
    metrics, intervals = perplexity([-10.0, -2.0, 0.0], [5, 4, 0], byte_counts=[20, 16, 0])
    assert metrics["nats_per_token"] == pytest.approx(12 / 9)
    assert metrics["perplexity"] == pytest.approx(math.exp(12 / 9))
    assert metrics["bits_per_byte"] == pytest.approx(12 / 36 / math.log(2))
    np.testing.assert_allclose(intervals["nats_per_token"], (0.5, 2.0))  # both or either document


def test_a_uniform_model_has_the_vocabularys_perplexity():
    metrics, intervals = perplexity([-3 * math.log(50)] * 4, [3] * 4)
    assert metrics["perplexity"] == pytest.approx(50)
    assert intervals["perplexity"] == pytest.approx((50, 50))


def test_a_ruined_model_is_infinite_not_an_error():
    assert perplexity([-1e6], [1])[0]["perplexity"] == math.inf
    with pytest.raises(ValueError, match=r"0\.0 tokens"):
        perplexity([0.0], [0])
