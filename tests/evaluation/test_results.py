# SPDX-License-Identifier: Apache-2.0
"""eval.json: what is written is what is read, and a bad file is named, not guessed at."""

import json
import math

import numpy as np
import pytest

from jaxrlhf.errors import DataError
from jaxrlhf.evaluation.results import (
    Alarm,
    Bin,
    Calibration,
    Comparison,
    CurvePoint,
    EvalResult,
    Sample,
    read_results,
    write_results,
)


def full(label: str = "ppo") -> EvalResult:
    return EvalResult(
        model="runs/ppo",
        label=label,
        baseline="sft",
        count=512,
        names={"proxy": "reward model"},
        metrics={"gold": 0.5, "proxy": 2.0, "kl": 1.5},
        intervals={"gold": (0.4, 0.6)},
        comparisons=(Comparison("gold", "sft", 0.3, 0.5, 0.2, (0.1, 0.3), 0.7, (0.6, 0.8), 512),),
        calibration=Calibration((Bin(0.5, 0.6, 3, 0.55, 0.66),), 0.1, 0.66, 3),
        curve=(
            CurvePoint("best_of_n", "n=4", 0.64, 0.2, 0.1, n=4, intervals={"gold": (0.0, 0.2)}),
        ),
        alarms=(Alarm("length", "warning", "twice as long", 10.0, 20.0),),
        samples=(Sample("p", "c", {"gold": 1.0}, 3, "stop", "b", {"gold": 0.0}),),
        notes=("a note",),
    )


def test_written_and_read_back_is_the_same(tmp_path):
    write_results(tmp_path, [full()])
    assert read_results(tmp_path) == [full()]
    write_results(tmp_path, [full("a"), full("b")])
    assert read_results(tmp_path / "eval.json") == [full("a"), full("b")]


def test_numpy_and_non_finite_numbers_survive_strict_json(tmp_path):
    metrics = {"a": np.float32(0.5), "b": math.nan, "c": math.inf, "d": -math.inf, "e": np.int64(3)}
    path = write_results(tmp_path, [EvalResult("m", metrics=metrics)])

    def refuse(name):
        raise AssertionError(f"not JSON: {name}")

    json.loads(path.read_text(), parse_constant=refuse)
    got = read_results(path)[0].metrics
    assert math.isnan(got.pop("b"))
    assert got == {"a": 0.5, "c": math.inf, "d": -math.inf, "e": 3.0}


def test_half_a_surrogate_pair_does_not_break_the_file(tmp_path):
    path = write_results(tmp_path, [EvalResult("m", samples=(Sample("\ud83d", "x"),))])
    assert read_results(path)[0].samples[0].completion == "x"


def test_unknown_keys_are_ignored():
    data = full().to_json() | {"of_the_future": 1}
    assert EvalResult.from_json(data) == full()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model": 3}, "model"),
        ({"metrics": {"gold": "high"}}, "metrics.gold"),
        ({"metrics": {"gold": True}}, "metrics.gold"),
        ({"intervals": {"gold": [1]}}, "intervals.gold"),
        ({"samples": [1]}, "samples"),
        ({"samples": [{"prompt": 1}]}, "prompt"),
        ({"curve": {}, "alarms": "x"}, "alarms"),
    ],
)
def test_a_wrong_type_names_file_and_field(change, name):
    with pytest.raises(DataError, match=f"some/eval.json.*{name}"):
        EvalResult.from_json(full().to_json() | change, place="some/eval.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"results": 3}', "[" * 100_000])
def test_a_damaged_file_is_a_data_error(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError, match=r"eval\.json"):
        read_results(tmp_path)


def test_a_missing_file_says_who_writes_it(tmp_path):
    with pytest.raises(DataError, match="jaxrlhf eval"):
        read_results(tmp_path)
