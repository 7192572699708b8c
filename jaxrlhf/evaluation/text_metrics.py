# SPDX-License-Identifier: Apache-2.0
"""What completions look like: length, endings, variety, repetition.

All functions take sequences of hashable units: `words(text)`, or the token ids themselves.
N-grams never cross from one completion into the next.
"""

import math
import string
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Units = Sequence[Hashable]


def words(text: str) -> list[str]:
    """Split on white space, strip ASCII punctuation at both ends, lower-case, drop empties."""
    stripped = (word.strip(string.punctuation).lower() for word in text.split())
    return [word for word in stripped if word]


def ngrams(units: Units, n: int) -> list[tuple]:
    """All runs of n consecutive units, in order; none where the sequence is shorter."""
    return list(zip(*(units[i:] for i in range(n)), strict=False))


def distinct_n(sequences: Sequence[Units], n: int) -> float:
    """Different n-grams / all n-grams over all sequences together; NaN where there are none.

    Falls with the amount of text: compare only equal numbers of completions of equal length.
    Source: Li et al. 2016, arXiv:1510.03055, section 5.3.
    """
    grams = [gram for units in sequences for gram in ngrams(units, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_rate(sequences: Sequence[Units], n: int = 4) -> float:
    """Mean over sequences of the share of n-grams that repeat an earlier one of the same sequence.

    0 = never says the same thing twice, near 1 = a loop. Sequences shorter than n do not count; NaN
    if none is long enough. Source: "seq-rep-n" of Welleck et al. 2019, arXiv:1908.04319.
    """
    rates = []
    for units in sequences:
        if grams := ngrams(units, n):
            rates.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(rates)) if rates else math.nan


def length_stats(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, median, spread and extremes of completion lengths, in the unit they are given in."""
    values = np.asarray(lengths, np.float64)
    if not values.size:
        return {}
    return {
        "completions/mean_length": float(values.mean()),
        "completions/median_length": float(np.median(values)),
        "completions/std_length": float(values.std()),
        "completions/min_length": float(values.min()),
        "completions/max_length": float(values.max()),
    }


def eos_rate(finish_reasons: Sequence) -> float:
    """Share of completions that ended by themselves: finish reason "stop" or 1; NaN if none."""
    ended = [reason == "stop" or reason == 1 for reason in finish_reasons]
    return sum(ended) / len(ended) if ended else math.nan


def self_bleu(sequences: Sequence[Units], n: int = 4, *, limit: int = 200) -> float:
    """Mean BLEU of each sequence against all others: 1 = all alike, 0 = nothing shared.

    Uniform weights over 1..n-grams, clipped counts, the brevity penalty against the closest length,
    no smoothing (an order without a match makes that sequence's BLEU 0). Quadratic, so only the
    first `limit` sequences are used. Source: Zhu et al. 2018, arXiv:1802.01886, section 3.3.
    """
    sequences = [units for units in sequences[:limit] if len(units)]
    if len(sequences) < 2:
        return math.nan
    counts = [[Counter(ngrams(units, k)) for k in range(1, n + 1)] for units in sequences]
    scores = []
    for i, units in enumerate(sequences):
        others = [j for j in range(len(sequences)) if j != i]
        log_precision = 0.0
        for k in range(n):
            total = sum(counts[i][k].values())
            matched = sum(
                min(count, max(counts[j][k][gram] for j in others))
                for gram, count in counts[i][k].items()
            )
            log_precision += (math.log(matched / total) if matched else -math.inf) / n
        closest = min((abs(len(sequences[j]) - len(units)), len(sequences[j])) for j in others)[1]
        brevity = min(0.0, 1 - closest / len(units))
        scores.append(math.exp(log_precision + brevity))
    return float(np.mean(scores))


def describe_completions(
    completions: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    finish_reasons: Sequence | None = None,
    variety: Sequence[int] | None = None,
) -> dict[str, float]:
    """The text metrics of a set of completions under the names of `results.METRICS`.

    Args:
        completions: [N] texts, counted in `words`.
        lengths: [N] in tokens; words are counted where it is None.
        finish_reasons: [N] "stop"/"length" or 1/0; no EOS rate where it is None.
        variety: which completions distinct-n is counted over (None = all): it falls with the
            amount of text, so models are compared on as many of each.
    """
    units = [words(text) for text in completions]
    counted = units if variety is None else [units[i] for i in variety]
    metrics = {
        **length_stats([len(u) for u in units] if lengths is None else lengths),
        "distinct_1": distinct_n(counted, 1),
        "distinct_2": distinct_n(counted, 2),
        "repetition": repetition_rate(units),
    }
    if finish_reasons is not None:
        metrics["completions/eos_rate"] = eos_rate(finish_reasons)
    return metrics
