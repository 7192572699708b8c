# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals: seeded bootstraps, Student's t for a few seeds, Wilson for shares.

Dimension key: N rows. Rows that share a cause (completions of one prompt, pairs of one
conversation) are not independent. Say which: `clusters` when the prompts are themselves a sample
of the prompts one cares about (whole prompts are drawn), `strata` when the prompts are fixed and
only the completions are random (rows are drawn within each prompt).
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

from jaxrlhf.evaluation.results import Interval

ROWS_AT_ONCE = 1 << 22  # resampling counts held in memory at a time


def bootstrap_mean(
    values,
    weights=None,
    *,
    clusters: Sequence | np.ndarray | None = None,
    strata: Sequence | np.ndarray | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of sum(values * weights) / sum(weights).

    A plain mean, a paired difference, a win rate (values 1, 0.5, 0) and a loss per token (values =
    loss per token of a document, weights = its tokens) are all of this form.

    Args:
        values: [N] finite numbers.
        weights: [N] non-negative; None = 1 each.
        clusters, strata: [N] labels, see the module's docstring; at most one of them.
        samples: resamples drawn.
        level: probability mass of the interval.
        seed: the same seed gives the same interval.

    Source: Efron and Tibshirani 1993, chapters 13 (percentile) and 8 (clusters as units).
    """
    values = _finite(values)
    weights = np.ones_like(values) if weights is None else _finite(weights)
    if weights.shape != values.shape or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"weights must be {values.shape}, non-negative, not all 0")
    if clusters is not None and strata is not None:
        raise ValueError("give clusters or strata, not both")
    total, mass = values * weights, weights
    if clusters is not None:
        _, group = np.unique(_labels(clusters, len(values)), return_inverse=True)
        total, mass = np.bincount(group, total), np.bincount(group, mass)
    groups = [np.arange(len(total))]
    if strata is not None:
        names, group = np.unique(_labels(strata, len(values)), return_inverse=True)
        groups = [np.flatnonzero(group == i) for i in range(len(names))]

    rng = np.random.default_rng(seed)
    draws = np.empty(samples)
    step = max(1, ROWS_AT_ONCE // len(total))
    for start in range(0, samples, step):
        size = min(step, samples - start)
        above, below = np.zeros(size), np.zeros(size)
        for rows in groups:
            counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size)
            above += counts @ total[rows]
            below += counts @ mass[rows]
        with np.errstate(invalid="ignore"):  # all drawn rows may weigh 0
            draws[start : start + size] = above / below
    return _percentiles(draws[np.isfinite(draws)], level)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    samples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of any statistic of `count` independent rows.

    `statistic` receives the drawn row numbers, int [count], and returns a float.
    """
    if count < 1:
        raise ValueError("a bootstrap needs at least one row")
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(count, size=count)) for _ in range(samples)])
    return _percentiles(draws[np.isfinite(draws)], level)


def paired_difference(before, after, **options) -> tuple[float, Interval]:
    """Mean of after - before over the same rows, and its bootstrap interval.

    `before`, `after`: [N]; `options` as of `bootstrap_mean`.
    """
    before, after = _finite(before), _finite(after)
    if before.shape != after.shape:
        raise ValueError(f"paired rows: {before.shape} before, {after.shape} after")
    return float((after - before).mean()), bootstrap_mean(after - before, **options)


def mean_interval(values, *, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of a few independent numbers: seeds, folds.

    A bootstrap of three seeds is far too narrow; t with two degrees of freedom is honest. One
    value gives (-inf, inf).
    """
    values = _finite(values)
    mean = float(values.mean())
    if len(values) < 2:
        return -math.inf, math.inf
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(scipy.special.stdtrit(len(values) - 1, 0.5 + level / 2)) * error
    return mean - half, mean + half


def normal_interval(mean: float, error: float, *, level: float = 0.95) -> Interval:
    """mean -+ z * error, for an estimate with a known standard error."""
    half = statistics.NormalDist().inv_cdf(0.5 + level / 2) * error
    return mean - half, mean + half


def wilson_interval(successes: float, count: int, *, level: float = 0.95) -> Interval:
    """Score interval of a share; stays inside [0, 1] and is honest at 0 of n and n of n.

    Source: Wilson 1927. `successes` may be fractional (ties counted half).
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count} is not a share")
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def _finite(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a non-empty row of numbers, found shape {values.shape}")
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"row {where} is {values[where]}; drop or mend it before averaging")
    return values


def _labels(labels, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"{labels.shape} labels for {count} rows")
    return labels


def _percentiles(draws: np.ndarray, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level = {level} must lie between 0 and 1")
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
