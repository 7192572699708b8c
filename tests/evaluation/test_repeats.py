# SPDX-License-Identifier: Apache-2.0
"""Means over seeds and folds."""

import math

import pytest

from jaxrlhf.evaluation.repeats import repeated


def test_runs_that_differ_in_seed_are_one_experiment():
    runs = [
        ({"optim.learning_rate": rate, "seed": seed}, {"accuracy": rate + seed, "odd": math.nan})
        for rate in (0.1, 0.5)
        for seed in (1, 2, 3)
    ]
    first, second = repeated([*runs, ({"optim.learning_rate": 0.7, "seed": 1}, {"accuracy": 1.0})])
    assert (first.values, first.over, first.count) == ({"optim.learning_rate": 0.1}, ("seed",), 3)
    mean, (low, high) = second.metrics["accuracy"]
    assert mean == pytest.approx(2.5)
    # t with two degrees of freedom, 97.5 %: 4.302653; the deviation of 1, 2, 3 is 1
    assert (low, high) == pytest.approx((2.5 - 2.484138, 2.5 + 2.484138), abs=1e-6)
    assert set(first.metrics) == {"accuracy"}, "a mean with NaN in it would say nothing"


def test_nothing_is_averaged_over_what_makes_experiments_differ():
    runs = [({"rl.kl_coef": coef}, {"kl": coef}) for coef in (0.1, 0.2, 0.3)]
    assert repeated(runs) == []
    assert repeated([]) == []


def test_a_metric_that_some_runs_lack_is_left_out():
    both = repeated([({"seed": 0}, {"a": 1.0, "b": 2.0}), ({"seed": 1}, {"a": 3.0})])
    assert {name: mean for name, (mean, _) in both[0].metrics.items()} == {"a": 2.0}
