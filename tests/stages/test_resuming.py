# SPDX-License-Identifier: Apache-2.0
"""Where a run goes on from: what is refused touches nothing, what is continued is the same run."""

import shutil

import jax
import numpy as np
import pytest
from tiny import metrics, record, run

from jaxrlhf.config.load import load
from jaxrlhf.config.model import ModelSection
from jaxrlhf.errors import CheckpointError, ConfigError
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.stages import lineage, run_stage
from jaxrlhf.stages.models import open_model
from jaxrlhf.stages.rundir import read_summary
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.train.digest import content_digest


@pytest.fixture
def whole(models, tmp_path):
    """A finished run of 12 steps with checkpoints of 8 and 12."""
    return shutil.copytree(models.base, tmp_path / "whole")


@pytest.fixture
def half(models, tmp_path):
    """The same, as if it had been killed at step 8."""
    folder = shutil.copytree(models.base, tmp_path / "half")
    shutil.rmtree(folder / "checkpoints" / "12")
    shutil.rmtree(folder / "export")
    (folder / "summary.json").unlink()
    return folder


def held(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_never_overwrites_nothing(tiny, whole):
    before = held(whole)
    with pytest.raises(CheckpointError, match=r"holds checkpoints of steps 8, 12.*--output"):
        run("pretrain", whole, resume="never", **tiny.base | {"seed": 5})
    assert held(whole) == before


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        ("pretrain", {"train.steps": 6}, r"train\.steps: 12 -> 6"),
        ("pretrain", {"seed": 1}, "seed: 0 -> 1"),
        ("sft", {}, "holds checkpoints of pretrain, which sft cannot go on from"),
    ],
)
@pytest.mark.parametrize("elsewhere", [True, False])
def test_another_stage_or_other_settings_are_refused(
    elsewhere, stage, changed, message, tiny, models, whole, tmp_path
):
    keys = tiny.settings(stage, models) | changed
    before = held(whole)
    output, resume = (tmp_path / "new", str(whole)) if elsewhere else (whole, "auto")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        run(stage, output, resume=resume, **keys)
    assert held(whole) == before
    assert not (tmp_path / "new").exists()


def test_a_step_beyond_the_planned_ones_is_refused_whatever_is_allowed(tiny, whole, tmp_path):
    config = load("pretrain", keywords=tiny.base | {"train.steps": 6})
    for output, resume in ((whole, "auto"), (tmp_path / "new", str(whole))):
        before = held(whole)
        with pytest.raises(CheckpointError, match="is at step 12 already, 6 are planned"):
            run_stage("pretrain", config, output, resume=resume, allow_change=["train.steps"])
        assert held(whole) == before


def test_a_word_that_is_no_run_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume nevr: .*auto, never or a run directory"):
        run("pretrain", tmp_path / "new", resume="nevr", **tiny.base)
    assert not (tmp_path / "new").exists()


def test_going_on_from_another_run_can_be_called_again(tiny, models, whole, half, tmp_path):
    new, keys = tmp_path / "new", tiny.base | {"train.save_every": 1}
    before = held(half)
    assert run("pretrain", new, resume=str(half), **keys).exit_code == 0
    assert [line["step"] for line in metrics(new)] == [9, 10, 11, 12]
    # As if it had been killed after its save at 11.
    shutil.rmtree(new / "checkpoints" / "12")
    assert run("pretrain", new, resume=str(half), **keys).exit_code == 0
    assert held(half) == before
    summary, wanted = read_summary(new), read_summary(models.base)
    assert summary is not None
    assert wanted is not None
    assert (summary["content"], summary["tokens"]) == (wanted["content"], wanted["tokens"])
    assert metrics(new) == metrics(models.base)[8:]
    # Another run's checkpoints are not taken for its own.
    with pytest.raises(CheckpointError, match="which did not go on from"):
        run("pretrain", whole, resume=str(half), **keys)


def test_tokens_are_those_of_the_whole_run(tiny, models, half):
    assert run("pretrain", half, **tiny.base).exit_code == 0
    assert record(half) == record(models.base)
    tokens = sum(line["tokens"] for line in metrics(models.base))
    for folder in (half, models.base):
        summary = read_summary(folder)
        assert summary is not None
        assert summary["tokens"] == tokens > 0


def test_a_grown_run_that_was_stopped_is_read_from_its_newest_checkpoint(tiny, whole):
    def opened():
        return jax.device_get(open_model(ModelSection(path=str(whole)), make_mesh()).params)

    summary = (whole / "summary.json").read_bytes()
    shorter = opened()
    config = load("pretrain", keywords=tiny.base | {"train.steps": 20, "train.save_every": 20})
    assert run_stage("pretrain", config, whole, stop_requested=lambda: True).exit_code == 143
    params, step = Checkpoints(whole).restore_params()
    assert step == 13
    for _ in ("stopped", "killed"):
        found = opened()
        assert content_digest(found) == content_digest(params)
        assert not np.array_equal(found["embed"]["embedding"], shorter["embed"]["embedding"])
        (whole / "summary.json").write_bytes(summary)  # a killed run leaves the shorter one's


def live():
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_state_is_never_there_twice(tiny, half, monkeypatch):
    """Neither a fresh one beside the restored, nor the last beside the best."""
    restore, seen = Checkpoints.restore, []

    def watched(self, *args, **kwargs):
        seen.append(live() - began)
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "restore", watched)
    best = {"train.keep_best": "nats_per_token", "train.best_is": "max", "train.save_every": 1}
    began = live()
    assert run("pretrain", half, **tiny.base | best | {"train.eval_every": 1}).exit_code == 0
    size = sum(8 * np.prod(shape) for _, shape in Checkpoints(half).manifest(12)["leaves"].values())
    assert len(seen) == 2
    assert max(seen) < size / 8  # of params and two moments


@pytest.mark.parametrize("place", ["mine.py", "pkg.inner.mine"])
def test_an_edited_reward_function_is_another_input(place, tmp_path, monkeypatch):
    """Of a file or a module, found without importing it or the packages that it is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / (place if place.endswith(".py") else place.replace(".", "/") + ".py")
    code.parent.mkdir(parents=True, exist_ok=True)
    if code.parent != tmp_path:
        (tmp_path / "pkg/__init__.py").write_text("raise AssertionError('imported')\n")

    def ppo(function):
        keys = {"model": "none", "data": "none.jsonl", "reward": f"{place}:{function}"}
        return load("ppo", keywords=keys | {"train.steps": 1})

    found = []
    for score in ("0.0", "1.0", "0.0"):
        code.write_text(f"def f(prompts, completions):\n    return [{score}] * len(prompts)\n")
        found.append(lineage.identity("ppo", ppo("f")))
        if score == "0.0":
            lineage.record(tmp_path, ppo("f"))
            lineage.check_inputs(tmp_path, ppo("f"))
        else:
            with pytest.raises(ConfigError, match=r"the content of reward\.0\.source changed"):
                lineage.check_inputs(tmp_path, ppo("f"))
    assert found[0] == found[2] != found[1]
    assert lineage.identity("ppo", ppo("g")) != found[0]  # another function of the same file


def test_a_missing_reward_function_is_named(tmp_path):
    keys = {"model": "none", "data": "none", "reward": f"{tmp_path}/no.py:f", "train.steps": 1}
    lines = lineage.absent(load("ppo", keywords=keys))
    assert f"reward.0.source: there is no {tmp_path}/no.py" in lines
