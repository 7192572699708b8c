# SPDX-License-Identifier: Apache-2.0
"""Reward against KL: what training bought, what best-of-n buys, and what is possible at all.

Dimension key: P prompts, N samples of the base policy for each. KL is in nats per completion and
means KL(policy || base) averaged over prompts. When the thing optimised (`proxy`) is not the thing
wanted (`gold`), gold first rises with KL and then falls: Gao et al. 2022, arXiv:2210.10760.

The prompts are taken as given; intervals speak of the sampling of completions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.evaluation.intervals import normal_interval
from jaxrlhf.evaluation.results import CurvePoint, Interval


def best_of_n_kl(n: int) -> float:
    """KL(best of n || base) = log n - (n - 1)/n nats, for scores without ties.

    With ties, or for a base that repeats itself, it is an upper bound (Beirami et al. 2024,
    arXiv:2401.01879). Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3.
    """
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_curve(
    proxy,
    gold=None,
    *,
    ns: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    level: float = 0.95,
) -> list[CurvePoint]:
    """Expected proxy (and gold) of the sample with the best proxy among n, from N >= n samples.

    Unbiased: the mean over all subsets of n of the N samples, which is a fixed weight for each
    rank, C(i-1, n-1) / C(N, n) for the i-th smallest of N. Among equal proxies each is as likely
    to be taken. Intervals: normal with the jackknife's standard error (absent for n = N).

    Args:
        proxy: [P, N] the score the best is chosen by.
        gold: [P, N] another score of the same samples.
        ns: sizes; those above N are left out.
    """
    proxy = _scores("proxy", proxy)
    gold = None if gold is None else _scores("gold", gold)
    if gold is not None and gold.shape != proxy.shape:
        raise ValueError(f"proxy {proxy.shape} and gold {gold.shape} must be the same samples")
    points = []
    for n in sorted({n for n in ns if 1 <= n <= proxy.shape[1]}):
        intervals: dict[str, Interval] = {}
        means: dict[str, float] = {}
        for name, values in (("proxy", proxy), ("gold", gold)):
            if values is None:
                continue
            rows = [_best_of_n(p, v, n) for p, v in zip(proxy, values, strict=True)]
            means[name] = float(np.mean([mean for mean, _ in rows]))
            error = math.sqrt(sum(variance for _, variance in rows)) / len(rows)
            if math.isfinite(error):
                intervals[name] = normal_interval(means[name], error, level=level)
        points.append(
            CurvePoint(
                "best_of_n", f"best of {n}", best_of_n_kl(n), n=n, intervals=intervals, **means
            )
        )
    return points


def _best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> tuple[float, float]:
    """Estimate for one prompt, [N] each, and its jackknife variance (inf where n = N)."""
    count = len(proxy)
    order = np.argsort(proxy, kind="stable")
    proxy, values = proxy[order], values[order].astype(np.float64)
    # Equal proxies: whichever is taken, its value is their mean.
    _, group = np.unique(proxy, return_inverse=True)
    values = (np.bincount(group, values) / np.bincount(group))[group]
    mean = float(_rank_weights(count, n) @ values)
    if n >= count:
        return mean, math.inf
    # Leaving out rank i: lower ranks keep their weight among N - 1, higher ones move down by one.
    # (Ties keep their group's mean, a difference of order 1/N within a group.)
    weights = _rank_weights(count - 1, n)
    below = np.concatenate([[0.0], np.cumsum(weights * values[:-1])])
    above = np.concatenate([np.cumsum((weights * values[1:])[::-1])[::-1], [0.0]])
    left_out = below + above
    return mean, float((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())


def _rank_weights(count: int, n: int) -> np.ndarray:
    """[count] probability that the i-th smallest is the largest of a random subset of n."""
    weights = np.zeros(count)
    weights[-1] = n / count
    for i in range(count - 1, n - 1, -1):  # rank i+1 to rank i, ranks from 1
        weights[i - 1] = weights[i] * (i + 1 - n) / i
    return weights


@dataclass(frozen=True)
class Optimum:
    """The largest objective any policy can reach, and the policy that reaches it.

    `objective` = `proxy` - coef * `kl`. `interval` is None where one sample a prompt leaves nothing
    to estimate it from. `effective_samples` is the mean over prompts of (sum w)^2 / sum w^2 for the
    importance weights w: below about 20 the figures rest on a handful of samples.
    """

    coef: float
    objective: float
    interval: Interval | None
    proxy: float
    kl: float
    gold: float | None
    effective_samples: float


def optimum(proxy, coef: float, gold=None, *, level: float = 0.95) -> Optimum:
    """J* = max over policies of E[reward] - coef * KL, estimated from samples of the base.

        J* = mean over prompts of coef * log E_base[exp(reward / coef)]
        pi* proportional to base * exp(reward / coef),  KL = mean (E*[reward] - J*) / coef

    Source: the Gibbs variational principle; e.g. Rafailov et al. 2023, eq. 4.

    Args:
        proxy: [P, N] rewards of N base samples for each of P prompts.
        coef: the KL coefficient, > 0.
        gold: [P, N] another score of the same samples, averaged under pi*.

    Put in as they are, N samples underestimate J* (Jensen), by more than its interval is wide when
    few of them carry the weight. The jackknife takes the bias of order 1/N off every figure and
    gives the standard error behind the interval: N times the estimate less N - 1 times the mean of
    those that leave one sample out (Quenouille 1956; Efron and Tibshirani 1993, chapter 11). No
    estimate exceeds the largest reward seen.
    """
    proxy = _scores("proxy", proxy)
    if not (coef > 0 and math.isfinite(coef)):
        raise ValueError(f"coef = {coef} must be positive")
    top = proxy.max(axis=1)  # [P]
    weights = np.exp((proxy - top[:, None]) / coef)  # the largest is 1: never all underflow

    def log_mean(total: np.ndarray, count: int) -> np.ndarray:
        # Without its largest sample a row may weigh nothing that a float can hold.
        return coef * np.log(np.maximum(total / count, np.finfo(np.float64).tiny))

    count = proxy.shape[1]
    total, others = weights.sum(axis=1), _without_each(weights)
    low = log_mean(total, count)
    left_out = log_mean(others, max(count - 1, 1))  # [P, N]
    value = top + np.minimum(_jackknife(low, left_out), 0)

    def under_optimum(scores: np.ndarray) -> np.ndarray:
        """[P] the mean of scores [P, N] under pi*."""
        above = weights * scores
        plain = above.sum(axis=1) / total
        return _jackknife(plain, _without_each(above) / np.maximum(others, 1e-300))

    reward = np.minimum(under_optimum(proxy), top)
    interval = None
    if count > 1:
        spread = ((left_out - left_out.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        error = math.sqrt(float(spread.sum()) * (count - 1) / count) / len(proxy)
        interval = normal_interval(float(value.mean()), error, level=level)
    return Optimum(
        coef=coef,
        objective=float(value.mean()),
        interval=interval,
        proxy=float(reward.mean()),
        kl=float(max(0.0, ((reward - value) / coef).mean())),
        gold=None if gold is None else float(under_optimum(_scores("gold", gold)).mean()),
        effective_samples=float((total**2 / (weights**2).sum(axis=1)).mean()),
    )


def share_of_gain(objective: float, base: float, largest: float) -> float:
    """How much of what any policy could gain over the base this one has: 1 = all; NaN where there
    is nothing to gain. All three are objectives at one KL coefficient."""
    return (objective - base) / (largest - base) if largest > base else math.nan


def _without_each(x: np.ndarray) -> np.ndarray:
    """[P, N] sums over axis 1 that leave one entry out; no difference, so nothing cancels."""
    nothing = np.zeros((len(x), 1))
    below = np.concatenate([nothing, np.cumsum(x[:, :-1], axis=1)], axis=1)
    above = np.concatenate([nothing, np.cumsum(x[:, :0:-1], axis=1)], axis=1)[:, ::-1]
    return below + above


def _jackknife(estimate: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """[P] estimates without their bias of order 1/N, from [P, N] estimates without one sample."""
    count = left_out.shape[1]
    if count == 1:
        return estimate
    return count * estimate - (count - 1) * left_out.mean(axis=1)


def optimum_curve(
    proxy,
    gold=None,
    *,
    coefs: Sequence[float] | None = None,
    effective_samples: float = 20.0,
) -> list[CurvePoint]:
    """The frontier: the highest proxy any policy reaches at each KL, over a grid of coefficients.

    Points whose estimate rests on fewer than `effective_samples` samples a prompt are left out, so
    the curve ends where the samples end. `coefs` None: 24 values spaced evenly in the logarithm,
    from 30 standard deviations of the reward down to 1/30.
    """
    proxy = _scores("proxy", proxy)
    if coefs is None:
        spread = float(proxy.std(axis=1).mean()) or 1.0
        coefs = list(np.geomspace(30 * spread, spread / 30, 24))
    points = []
    for coef in sorted(coefs, reverse=True):
        best = optimum(proxy, float(coef), gold)
        if best.effective_samples >= effective_samples:
            points.append(
                CurvePoint(
                    "optimum",
                    f"coef {coef:.3g}",
                    best.kl,
                    proxy=best.proxy,
                    gold=best.gold,
                    objective=best.objective,
                    coef=float(coef),
                )
            )
    return points


def overoptimised(points: Sequence[CurvePoint]) -> list[tuple[CurvePoint, CurvePoint]]:
    """Pairs (modest, greedy): greedy's proxy is higher and its gold lower, both beyond intervals.

    Two values differ beyond their intervals when the intervals do not overlap; points without an
    interval for proxy and gold are ignored.
    """
    known = [p for p in points if {"proxy", "gold"} <= p.intervals.keys()]
    found = []
    for modest in known:
        for greedy in known:
            higher = greedy.intervals["proxy"][0] > modest.intervals["proxy"][1]
            lower = greedy.intervals["gold"][1] < modest.intervals["gold"][0]
            if higher and lower:
                found.append((modest, greedy))
    return found


def _scores(name: str, values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} must be [prompts, samples], found shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(values)).sum())} values not finite")
    return values
