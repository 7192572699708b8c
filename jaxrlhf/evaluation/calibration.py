# SPDX-License-Identifier: Apache-2.0
"""Is a reward model right, does it know how sure it is, and does it only count words?

Dimension key: N pairs. `margins` = score of the chosen - score of the rejected completion; under
Bradley-Terry the model says "chosen is better" with probability sigmoid(margin).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.evaluation.intervals import bootstrap, bootstrap_mean
from jaxrlhf.evaluation.results import Bin, Calibration, Interval


def correct(margins) -> np.ndarray:
    """[N] 1 where chosen is preferred, 0.5 for an exact tie, 0 otherwise; its mean is accuracy."""
    margins = _margins(margins)
    return (margins > 0) + 0.5 * (margins == 0)


def reliability(margins, *, bins: int = 10) -> Calibration:
    """Reliability table and expected calibration error (ECE) of pairwise preferences.

        confidence = sigmoid(|margin|) in [0.5, 1], correct = 1, 0.5 for a tie, 0
        ECE = sum over bins of (count / N) * |mean correct - mean confidence|

    The bins are `bins` intervals (low, high] of equal width over [0.5, 1], the first one closed: a
    pair has no natural order, so the model's bet is on whichever side it prefers.
    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3 (binary, confidence of the predicted side).
    """
    margins = _margins(margins)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hits = correct(margins)
    edges = np.linspace(0.5, 1.0, bins + 1)
    group = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    table, ece = [], 0.0
    for i in range(bins):
        rows = group == i
        count = int(rows.sum())
        sure = float(confidence[rows].mean()) if count else math.nan
        right = float(hits[rows].mean()) if count else math.nan
        ece += count / len(margins) * abs(right - sure) if count else 0.0
        table.append(Bin(float(edges[i]), float(edges[i + 1]), count, sure, right))
    return Calibration(tuple(table), float(ece), float(hits.mean()), len(margins))


def pair_loss(margins) -> np.ndarray:
    """[N] -log sigmoid(margin), the reward model's loss in nats per pair."""
    return np.logaddexp(0.0, -_margins(margins))


def longer_wins(chosen_lengths, rejected_lengths) -> float:
    """Accuracy of the rule "the longer one is better", equal lengths counted half."""
    difference = np.asarray(chosen_lengths, np.float64) - np.asarray(rejected_lengths, np.float64)
    return float(correct(difference).mean())


def length_bias(chosen, rejected, chosen_lengths, rejected_lengths) -> dict[str, float]:
    """How much of what a reward model says is length.

    Returns the Pearson correlation of score and length over the 2N completions, the correlation of
    margin and length difference over the N pairs, the share of pairs in which the model prefers the
    longer one (ties of either kind half), the accuracy of the longer-wins rule, and the model's own
    accuracy where the chosen one is longer and where it is shorter: far apart = it counts words.
    NaN where a correlation or a subset does not exist.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    long_c = np.asarray(chosen_lengths, np.float64)
    long_r = np.asarray(rejected_lengths, np.float64)
    margins, difference = chosen - rejected, long_c - long_r
    hits = correct(margins)
    return {
        "length_bias/correlation": _correlation(
            np.concatenate([chosen, rejected]), np.concatenate([long_c, long_r])
        ),
        "length_bias/margin_correlation": _correlation(margins, difference),
        "length_bias/prefers_longer": float(correct(margins * difference).mean()),
        "accuracy/longer_wins": longer_wins(long_c, long_r),
        "accuracy/when_longer": _mean(hits[difference > 0]),
        "accuracy/when_shorter": _mean(hits[difference < 0]),
    }


def judge_pairs(
    chosen,
    rejected,
    *,
    chosen_lengths=None,
    rejected_lengths=None,
    clusters: Sequence | np.ndarray | None = None,
    bins: int = 10,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, Interval], Calibration]:
    """Everything an evaluation says about a reward model on N held-out pairs.

    Args:
        chosen, rejected: [N] scores (or implicit rewards beta * log pi/pi_ref).
        chosen_lengths, rejected_lengths: [N] completion lengths in tokens; no length bias without.
        clusters: [N] prompt of each pair, where several pairs share one.

    Returns:
        metrics, intervals (of this `level`), calibration: the fields of `results.EvalResult`.
    """
    margins = _margins(np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64))
    table = reliability(margins, bins=bins)
    hits, losses = correct(margins), pair_loss(margins)
    surprise = (1 - np.tanh(margins / 2)) / 2  # 1 - the probability that the chosen one is chosen
    metrics = {
        "accuracy": table.accuracy,
        "ece": table.ece,
        "pair_loss": float(losses.mean()),
        "brier": float((surprise**2).mean()),
        "margin/mean": float(margins.mean()),
        "margin/std": float(margins.std()),
    }
    options: dict[str, Any] = {"samples": samples, "level": level, "seed": seed}
    intervals = {
        "accuracy": bootstrap_mean(hits, clusters=clusters, **options),
        "pair_loss": bootstrap_mean(losses, clusters=clusters, **options),
    }
    if clusters is None:
        intervals["ece"] = bootstrap(
            lambda rows: reliability(margins[rows], bins=bins).ece,
            len(margins),
            level=level,
            seed=seed,
        )
    if chosen_lengths is not None and rejected_lengths is not None:
        metrics |= length_bias(chosen, rejected, chosen_lengths, rejected_lengths)
    return metrics, intervals, table


def bag_of_words(
    train_chosen: Sequence[str],
    train_rejected: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    min_df: int = 2,
    c: float = 1.0,
) -> np.ndarray:
    """Held-out margins [N] of the floor every reward model has to beat: word presence alone.

    Logistic regression without intercept on x(chosen) - x(rejected), x = binary presence of the
    lower-cased uni- and bigrams that occur in at least `min_df` training texts. Pass the margins to
    `reliability`. Needs scikit-learn.
    """
    try:
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise JaxrlhfError(
            "the bag-of-words floor needs scikit-learn: pip install scikit-learn"
        ) from None
    if len(train_chosen) != len(train_rejected) or len(chosen) != len(rejected):
        raise ValueError("chosen and rejected texts must come in pairs")
    vectorizer = CountVectorizer(binary=True, ngram_range=(1, 2), min_df=min_df)
    # Floats: 0 - 1 must be -1 whatever integer type the vectorizer chose.
    features = csr_matrix(
        vectorizer.fit_transform([*train_chosen, *train_rejected]), dtype=np.float64
    )
    differences = features[: len(train_chosen)] - features[len(train_chosen) :]
    # The solver wants both classes. Without an intercept a pair and its mirror image have the same
    # loss, so turning every second pair round changes nothing (adding mirrors would double C).
    signs = np.where(np.arange(len(train_chosen)) % 2, -1.0, 1.0)
    flipped = differences.multiply(signs[:, None]).tocsr()
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=2000)
    model.fit(flipped, signs)
    held_out = csr_matrix(vectorizer.transform(chosen), dtype=np.float64)
    held_out -= csr_matrix(vectorizer.transform(rejected), dtype=np.float64)
    return np.asarray(model.decision_function(held_out))


def _margins(margins) -> np.ndarray:
    margins = np.asarray(margins, np.float64)
    if margins.ndim != 1 or not len(margins):
        raise ValueError(f"expected one margin a pair, found shape {margins.shape}")
    if np.isnan(margins).any():
        raise ValueError(f"the margin of pair {int(np.flatnonzero(np.isnan(margins))[0])} is NaN")
    return margins


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
