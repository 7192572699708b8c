# SPDX-License-Identifier: Apache-2.0
"""A against B on the same prompts, by any scorer: win rate and paired difference."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrlhf.evaluation.intervals import bootstrap_mean, paired_difference
from jaxrlhf.evaluation.results import Comparison

# TRL's reward signature: scorer(prompts, completions, **columns) -> list[float]
Scorer = Callable[..., Sequence[float]]


def wins(before, after, *, tie_within: float = 0.0) -> np.ndarray:
    """[N] 1 where after > before, 0.5 where they differ by at most `tie_within`, else 0."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    tie = np.abs(difference) <= tie_within
    return np.where(tie, 0.5, (difference > 0).astype(np.float64))


def compare(
    metric: str,
    baseline: str,
    before,
    after,
    *,
    tie_within: float = 0.0,
    clusters: Sequence | np.ndarray | None = None,
    strata: Sequence | np.ndarray | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """One metric of a model against a baseline, row by row.

    Args:
        metric: its name, as in `results.METRICS`.
        baseline: label of the model `before` comes from.
        before, after: [N] scores on the same prompts, in the same order.
        tie_within: scores this close count as half a win.
        clusters, strata: see `intervals`: several completions of one prompt are not independent.
    """
    options = {
        "clusters": clusters,
        "strata": strata,
        "samples": samples,
        "level": level,
        "seed": seed,
    }
    delta, interval = paired_difference(before, after, **options)
    won = wins(before, after, tie_within=tie_within)
    return Comparison(
        metric=metric,
        baseline=baseline,
        before=float(np.mean(before)),
        after=float(np.mean(after)),
        delta=delta,
        interval=interval,
        win_rate=float(won.mean()),
        win_rate_interval=bootstrap_mean(won, **options),
        count=len(won),
    )


def win_rate(
    scorer: Scorer,
    prompts: Sequence[str],
    completions: Sequence[str],
    baseline_completions: Sequence[str],
    *,
    metric: str = "gold",
    baseline: str = "baseline",
    columns: dict[str, Sequence] | None = None,
    **options,
) -> Comparison:
    """`compare` with the scores asked from `scorer`; `options` as of `compare`.

    Raises ValueError where the scorer does not return one finite number a completion: a missing
    score must never count as a loss.
    """
    if not len(prompts) == len(completions) == len(baseline_completions):
        raise ValueError("prompts and both sets of completions must have the same length")
    scores = []
    for texts in (baseline_completions, completions):
        values = np.asarray(scorer(list(prompts), list(texts), **(columns or {})), np.float64)
        if values.shape != (len(prompts),) or not np.isfinite(values).all():
            raise ValueError(
                f"the scorer returned {values.shape} for {len(prompts)} completions, "
                f"{int((~np.isfinite(values)).sum())} of them not finite"
            )
        scores.append(values)
    return compare(metric, baseline, scores[0], scores[1], **options)
