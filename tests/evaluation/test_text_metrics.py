# SPDX-License-Identifier: Apache-2.0
"""Text metrics against values counted by hand."""

import math

import pytest

from jaxrlhf.evaluation import text_metrics as tm


def test_words_are_stripped_lower_cased_and_never_empty():
    assert tm.words('  "Hello," she said -- and (again) don\'t!\n') == [
        "hello", "she", "said", "and", "again", "don't",
    ]  # fmt: skip
    assert tm.words("") == tm.words(" ... !") == []


def test_distinct_counts_over_all_and_never_across_completions():
    texts = [["a", "b", "a", "b"], ["b", "a"]]
    assert tm.distinct_n(texts, 1) == 2 / 6
    assert tm.distinct_n(texts, 2) == 2 / 4  # ab ba ab | ba
    assert math.isnan(tm.distinct_n([["a"]], 2))
    assert tm.distinct_n([[1, 2], [2, 1]], 2) == 1.0  # token ids do as well


def test_repetition_of_a_loop_and_of_a_sentence():
    assert tm.repetition_rate([list("abcdef")]) == 0
    assert tm.repetition_rate([["best"] * 12]) == pytest.approx(8 / 9)  # 9 grams, 1 kind
    assert tm.repetition_rate([["best"] * 12, list("abcdef"), ["short"]]) == pytest.approx(4 / 9)
    assert math.isnan(tm.repetition_rate([["short"]]))


def test_eos_rate_understands_both_spellings():
    assert tm.eos_rate(["stop", "length", "stop", "length"]) == tm.eos_rate([1, 0, 1, 0]) == 0.5
    assert math.isnan(tm.eos_rate([]))


def test_self_bleu_of_copies_of_strangers_and_by_hand():
    assert tm.self_bleu([list("abcde")] * 3) == pytest.approx(1)
    assert tm.self_bleu([list("abcde"), list("vwxyz")]) == 0
    # n=2, [a b c] against [a b c d]: precisions 1 and 1, brevity exp(1 - 4/3);
    # [a b c d] against [a b c]: 3/4 and 2/3, no penalty.
    want = (math.exp(1 - 4 / 3) + math.sqrt(3 / 4 * 2 / 3)) / 2
    assert tm.self_bleu([list("abc"), list("abcd")], 2) == pytest.approx(want)
    assert math.isnan(tm.self_bleu([list("abc")]))


def test_description_has_the_names_the_report_knows():
    from jaxrlhf.evaluation.results import METRICS

    got = tm.describe_completions(["a b a b", "b a"], finish_reasons=[1, 0])
    assert got["completions/mean_length"] == 3
    assert got["completions/max_length"] == 4
    assert got["distinct_2"] == 0.5
    assert got["completions/eos_rate"] == 0.5
    assert got.keys() <= METRICS.keys()
    assert tm.describe_completions(["a b"], lengths=[7])["completions/mean_length"] == 7


def test_variety_is_counted_over_as_many_completions_as_asked():
    texts = ["a b", "a b", "c d", "c d"]  # two of each prompt
    assert tm.describe_completions(texts)["distinct_2"] == 0.5
    first = tm.describe_completions(texts, variety=[0, 2])
    assert first["distinct_2"] == 1.0
    assert first["completions/mean_length"] == 2
