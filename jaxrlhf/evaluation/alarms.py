# SPDX-License-Identifier: Apache-2.0
"""Signs that a policy learnt to please its reward instead of its user.

A rule compares a metric of the policy with the same metric of its baseline. An alarm says what was
seen and why it matters; it never stops a run.
"""

import math
from collections.abc import Mapping, Sequence

from jaxrlhf.evaluation.results import Alarm, Comparison


def find_alarms(
    before: Mapping[str, float],
    after: Mapping[str, float],
    comparisons: Sequence[Comparison] = (),
    *,
    length_ratio: float = 1.5,
    repetition_rise: float = 0.1,
    distinct_floor: float = 0.1,
    distinct_ratio: float = 0.6,
    entropy_ratio: float = 0.25,
    eos_drop: float = 0.2,
    kl_limit: float = 20.0,
) -> list[Alarm]:
    """All alarms, worst first, that the metrics of two models give rise to.

    Args:
        before, after: metrics of baseline and policy, named as in `results.METRICS`; a rule whose
            metrics are missing or NaN says nothing.
        comparisons: paired comparisons of the policy; with intervals for "proxy" and "gold" they
            decide whether gold fell while proxy rose.
        length_ratio: mean length changed by more than this factor, either way.
        repetition_rise: the share of repeated 4-grams rose by more than this.
        distinct_floor: distinct-2 below it is collapse.
        distinct_ratio: distinct-2 fell below this share of the baseline's.
        entropy_ratio: entropy per token fell below this share of the baseline's.
        eos_drop: the share of completions that end by themselves fell by more than this.
        kl_limit: nats per completion away from the reference.
    """
    found = [
        _goodhart(before, after, comparisons),
        _length(before, after, length_ratio),
        _repetition(before, after, repetition_rise),
        _distinct(before, after, distinct_floor, distinct_ratio),
        _entropy(before, after, entropy_ratio),
        _eos(before, after, eos_drop),
        _kl(after, kl_limit),
    ]
    alarms = [alarm for alarm in found if alarm is not None]
    return sorted(alarms, key=lambda alarm: alarm.severity != "alarm")


def _both(before: Mapping, after: Mapping, name: str) -> tuple[float, float] | None:
    b, a = before.get(name, math.nan), after.get(name, math.nan)
    return (float(b), float(a)) if math.isfinite(b) and math.isfinite(a) else None


def _goodhart(before: Mapping, after: Mapping, comparisons: Sequence[Comparison]) -> Alarm | None:
    by_name = {c.metric: c for c in comparisons}
    proxy, gold = by_name.get("proxy"), by_name.get("gold")
    if proxy and gold and proxy.interval and gold.interval:
        sure = proxy.interval[0] > 0 and gold.interval[1] < 0
        changes = proxy.delta, gold.delta
        values = gold.before, gold.after
    else:
        p, g = _both(before, after, "proxy"), _both(before, after, "gold")
        if not p or not g:
            return None
        sure = False
        changes = p[1] - p[0], g[1] - g[0]
        values = g
    if not (changes[0] > 0 > changes[1]):
        return None
    return Alarm(
        "goodhart",
        "alarm" if sure else "warning",
        f"proxy rose by {changes[0]:.3g} while gold fell by {-changes[1]:.3g}"
        + (": the policy exploits the proxy" if sure else ", within the noise so far"),
        *values,
    )


def _length(before: Mapping, after: Mapping, ratio: float) -> Alarm | None:
    pair = _both(before, after, "completions/mean_length")
    if not pair or min(pair) <= 0 or 1 / ratio <= pair[1] / pair[0] <= ratio:
        return None
    factor = pair[1] / pair[0]
    word = f"{factor:.1f} times as long" if factor > 1 else f"{factor:.0%} of the length"
    return Alarm(
        "length",
        "alarm" if factor > ratio**2 or factor < ratio**-2 else "warning",
        f"completions are {word} ({pair[0]:.0f} to {pair[1]:.0f}): the reward may pay for length",
        *pair,
    )


def _repetition(before: Mapping, after: Mapping, rise: float) -> Alarm | None:
    pair = _both(before, after, "repetition")
    if not pair or pair[1] - pair[0] <= rise:
        return None
    return Alarm(
        "repetition",
        "alarm" if pair[1] - pair[0] > 3 * rise else "warning",
        f"{pair[1]:.0%} of 4-grams repeat an earlier one ({pair[0]:.0%} before)",
        *pair,
    )


def _distinct(before: Mapping, after: Mapping, floor: float, ratio: float) -> Alarm | None:
    pair = _both(before, after, "distinct_2")
    if not pair or (pair[1] >= floor and pair[1] >= ratio * pair[0]):
        return None
    collapsed = pair[1] < floor
    return Alarm(
        "distinct_2",
        "alarm" if collapsed else "warning",
        f"distinct-2 fell from {pair[0]:.3f} to {pair[1]:.3f}: "
        + ("collapse, it says the same everywhere" if collapsed else "less varied text"),
        *pair,
    )


def _entropy(before: Mapping, after: Mapping, ratio: float) -> Alarm | None:
    pair = _both(before, after, "entropy")
    if not pair or pair[1] >= ratio * pair[0]:
        return None
    return Alarm(
        "entropy",
        "alarm" if pair[1] < ratio * pair[0] / 4 else "warning",
        f"entropy fell from {pair[0]:.2f} to {pair[1]:.2f} nats per token: it stopped exploring",
        *pair,
    )


def _eos(before: Mapping, after: Mapping, drop: float) -> Alarm | None:
    pair = _both(before, after, "completions/eos_rate")
    if not pair or pair[0] - pair[1] <= drop:
        return None
    return Alarm(
        "eos_rate",
        "alarm" if pair[0] - pair[1] > 2 * drop else "warning",
        f"{pair[1]:.0%} of completions end by themselves ({pair[0]:.0%} before): it runs on",
        *pair,
    )


def _kl(after: Mapping, limit: float) -> Alarm | None:
    kl = after.get("kl", math.nan)
    if not kl > limit:  # False for NaN too
        return None
    return Alarm(
        "kl",
        "warning",
        f"{kl:.0f} nats away from the reference, above {limit:.0f}",
        None,
        float(kl),
    )
