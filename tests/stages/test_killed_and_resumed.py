# SPDX-License-Identifier: Apache-2.0
"""Killed with -9 anywhere and called again: the run that was never interrupted, to the bit."""

import pytest
from tiny import metrics, record, run, words

pytestmark = pytest.mark.slow  # in the quick suite: train/test_loop.py, test_pipeline_runs.py


def kill_then_finish(commands, stage, folder, keys, points):
    """Killed at each of the points in turn, then left alone."""
    for point in points:
        code, text = commands(words(stage, folder, keys), crash=point)
        assert code == -9, f"not killed at {point}:\n{text}"
    code, text = commands(words(stage, folder, keys))
    assert code == 0, text
    assert "resuming at step" in text
    return record(folder)


def test_ppo_killed_between_minibatches_ends_the_same(tiny, models, finished, commands, tmp_path):
    keys = tiny.settings("ppo", models)
    # In the second epoch of the last of three iterations.
    found = kill_then_finish(commands, "ppo", tmp_path, keys, ["minibatch:10"])
    assert found == record(finished("ppo"))
    assert [line["step"] for line in found["metrics"]] == [1, 2, 3]


def test_dpo_killed_while_it_saves_ends_the_same(tiny, models, finished, commands, tmp_path):
    keys = tiny.settings("dpo", models)
    found = kill_then_finish(commands, "dpo", tmp_path, keys, ["written:4"])
    assert found == record(finished("dpo"))
    assert [line["step"] for line in found["metrics"]] == [1, 2, 3, 4, 5, 6, 0, 3, 6]
    assert sorted(found["checkpoints"]) == ["4", "6"]


def test_a_run_whose_steps_grew_is_the_longer_run(tiny, models, tmp_path):
    keys = tiny.settings("sft", models) | {"optim.schedule": "constant", "train.eval_every": 100}
    assert run("sft", tmp_path / "long", **keys | {"train.steps": 4}).exit_code == 0
    assert run("sft", tmp_path / "grown", **keys | {"train.steps": 2}).exit_code == 0
    assert run("sft", tmp_path / "grown", **keys | {"train.steps": 4}).exit_code == 0
    long, grown = record(tmp_path / "long"), record(tmp_path / "grown")
    assert grown["summary"]["content"] == long["summary"]["content"]
    assert metrics(tmp_path / "grown") == metrics(tmp_path / "long")
    assert grown["checkpoints"]["4"] == long["checkpoints"]["4"]


DEEP = {
    "pretrain": ["step:5", "saving:8", "evaluated:12", "manifest:12"],
    "sft": ["evaluated:3", "manifest:4", "retained:6"],
    "reward": ["committed:2", "step:5", "written:6"],
    "ppo": ["manifest:2", "rollout:2", "scores:2", "minibatch:8", "evaluated:3", "written:3"],
}


@pytest.mark.parametrize("stage", DEEP)
def test_killed_again_and_again_it_ends_the_same(stage, tiny, models, finished, commands, tmp_path):
    keys = tiny.settings(stage, models)
    if stage == "ppo":  # evaluations and their samples too
        keys |= {"data.eval": str(tiny.held_out), "train.eval_every": 2}
        assert run("ppo", tmp_path / "whole", **keys).exit_code == 0
        whole = record(tmp_path / "whole")
        assert whole["samples"].count("\n") == 3 * 8
    else:
        whole = record(finished(stage))
    assert kill_then_finish(commands, stage, tmp_path / "run", keys, DEEP[stage]) == whole
