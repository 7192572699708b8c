# SPDX-License-Identifier: Apache-2.0
"""The metric record: exact after a resume, valid JSON always, untouched by trackers that fail."""

import json
import sys
import types

import jax.numpy as jnp
import pytest

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.train.metrics import MetricWriter, averages


def lines(folder, file="metrics.jsonl"):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / file).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_pairs_are_averaged_totals_added_and_empty_ones_left_out():
    got = averages(
        {
            "loss": (jnp.float32(3.0), 2.0),
            "tokens": (jnp.float32(30), jnp.float32(4)),
            "nothing": (jnp.float32(0), jnp.float32(0)),
            "plain": 7,
        }
    )
    assert got == {"loss": 1.5, "tokens": 30.0, "plain": 7.0}


def test_what_is_logged_comes_back_exactly(tmp_path):
    third = float(jnp.float32(1) / 3)
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": (jnp.float32(1) / 3, 1.0), "bad": float("nan"), "worse": -jnp.inf})
        writer.write(1, {"accuracy": 0.5}, "eval")
        writer.samples(1, [{"prompt": "ä\n", "completion": "…", "scores": {"r": float("nan")}}])
    assert lines(tmp_path) == [
        {"step": 1, "split": "train", "loss": third, "bad": None, "worse": None},
        {"step": 1, "split": "eval", "accuracy": 0.5},
    ]
    assert lines(tmp_path, "samples.jsonl") == [
        {"step": 1, "prompt": "ä\n", "completion": "…", "scores": {"r": None}}
    ]
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert events
    assert b"train/loss" in events[0].read_bytes()
    assert b"eval/accuracy" in events[0].read_bytes()


def test_resuming_cuts_the_record_back_to_the_restored_step(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
            writer.samples(step, [{"prompt": str(step)}])
    for file in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / file, "a") as f:
            f.write('{"step": 2, "sp')  # cut short by a kill
    with MetricWriter(tmp_path, start=3) as writer:
        writer.write(4, {"loss": 40})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [x["step"] for x in lines(tmp_path, "samples.jsonl")] == [1, 2, 3]
    MetricWriter(tmp_path, start=0).close()
    assert lines(tmp_path) == []


def test_a_missing_or_failing_tracker_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = []
    with MetricWriter(tmp_path / "a", track=["wandb"], announce=said.append) as writer:
        writer.write(1, {"loss": 1})
    assert len(said) == 1
    assert "jaxrlhf[track]" in said[0]

    class Run:
        calls = 0

        def log(self, values, step):
            Run.calls += 1
            raise ConnectionError("down")

    fake = types.SimpleNamespace(init=lambda **kwargs: Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said.clear()
    with MetricWriter(tmp_path / "b", track=["wandb"], announce=said.append) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": step})
    assert Run.calls == 1
    assert len(said) == 1
    assert "ConnectionError: down" in said[0]
    assert [x["step"] for x in lines(tmp_path / "b")] == [1, 2, 3, 4]


def test_a_tracker_gets_every_number_and_the_same_id_after_a_resume(tmp_path, monkeypatch):
    seen = []

    def init(**kwargs):
        seen.append(kwargs["id"])
        return types.SimpleNamespace(log=lambda values, step: seen.append(values), finish=int)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 1):
        with MetricWriter(tmp_path, track=["wandb"], start=start) as writer:
            writer.write(start + 1, {"loss": 2.0, "time/step_seconds": 1.0, "nan": float("nan")})
    assert seen[0] == seen[2]
    assert seen[1] == {"train/loss": 2.0, "time/step_seconds": 1.0, "step": 1}


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxrlhfError, match=r"cannot write .*file"):
        MetricWriter(tmp_path / "file")
