# SPDX-License-Identifier: Apache-2.0
"""Each alarm rings for its own sign, and a healthy model is silent."""

import math

import pytest

from jaxrlhf.evaluation.alarms import find_alarms
from jaxrlhf.evaluation.results import Comparison

HEALTHY = {
    "proxy": 1.0,
    "gold": 0.5,
    "kl": 2.0,
    "entropy": 1.0,
    "distinct_2": 0.5,
    "repetition": 0.02,
    "completions/mean_length": 20.0,
    "completions/eos_rate": 0.95,
}


def test_a_healthy_model_and_an_unmeasured_one_are_silent():
    better = HEALTHY | {"proxy": 2.0, "gold": 0.8, "entropy": 0.8}
    assert find_alarms(HEALTHY, better) == []
    assert find_alarms({}, {}) == []
    assert find_alarms(HEALTHY, dict.fromkeys(HEALTHY, math.nan)) == []


@pytest.mark.parametrize(
    ("change", "name", "severity"),
    [
        ({"completions/mean_length": 31.0}, "length", "warning"),
        ({"completions/mean_length": 13.0}, "length", "warning"),
        ({"completions/mean_length": 60.0}, "length", "alarm"),
        ({"repetition": 0.2}, "repetition", "warning"),
        ({"repetition": 0.9}, "repetition", "alarm"),
        ({"distinct_2": 0.25}, "distinct_2", "warning"),
        ({"distinct_2": 0.05}, "distinct_2", "alarm"),
        ({"entropy": 0.2}, "entropy", "warning"),
        ({"entropy": 0.01}, "entropy", "alarm"),
        ({"completions/eos_rate": 0.7}, "eos_rate", "warning"),
        ({"completions/eos_rate": 0.1}, "eos_rate", "alarm"),
        ({"kl": 50.0}, "kl", "warning"),
        ({"proxy": 2.0, "gold": 0.3}, "goodhart", "warning"),
    ],
)
def test_one_sign_rings_one_alarm(change, name, severity):
    alarms = find_alarms(HEALTHY, HEALTHY | change)
    assert [(a.name, a.severity) for a in alarms] == [(name, severity)]


@pytest.mark.parametrize(("half", "severity"), [(0.05, "alarm"), (0.5, "warning")])
def test_goodhart_is_certain_only_beyond_the_intervals(half, severity):
    comparisons = [
        Comparison("proxy", "sft", 1.0, 1.3, 0.3, (0.3 - half, 0.3 + half)),
        Comparison("gold", "sft", 0.5, 0.3, -0.2, (-0.2 - half, -0.2 + half)),
    ]
    (alarm,) = find_alarms(HEALTHY, HEALTHY, comparisons)
    assert (alarm.name, alarm.severity) == ("goodhart", severity)


def test_the_worst_comes_first():
    alarms = find_alarms(HEALTHY, HEALTHY | {"kl": 50.0, "distinct_2": 0.01})
    assert [a.severity for a in alarms] == ["alarm", "warning"]
