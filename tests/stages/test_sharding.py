# SPDX-License-Identifier: Apache-2.0
"""Every stage on meshes of 8 virtual devices, and on two processes, is the stage on one device."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import run_in_processes, run_on_devices
from safetensors.numpy import load_file
from tiny import metrics, run

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sharded

SLOW = pytest.mark.slow
MIXED = "data 2, fsdp 2, tensor 2"
OTHERS = ["fsdp 8", "tensor 4, data 2"]


def compare(stage, meshes, model="divides", whole=True, adapter=None):
    return sharded.compare(stage, meshes, model, whole=whole, adapter=adapter)


def check(stage, found):
    """The bounds that hold on every mesh."""
    for mesh, got in found.items():
        assert got["zero"] == [], (mesh, "gradients that are analytically zero: none here")
        worst = max(got["gradients"], key=got["gradients"].get)
        assert got["gradients"][worst] < 1e-5, (mesh, worst, got["gradients"][worst])
        assert got["said"] < 1e-4, mesh
        assert got["moved"] > 100 * got["said"], mesh  # it says something
        assert got["whole leaves"] == [], mesh
        assert got["placed"], mesh  # a step leaves the state where it found it
        assert got["constraints"] > 20, mesh
        for program, ratio in got["flops"].items():
            assert ratio < 1.1, (mesh, program, ratio)
        assert got.get("greedy", True), mesh
        if stage == "ppo":
            rollout = got["rollout"]
            assert rollout["tokens"] == rollout["lengths"] == 0, mesh
            assert rollout["devices"] == 8, mesh
            for name in ("old_logprobs", "values", "advantages"):
                assert rollout[name] < 1e-4, (mesh, name)


@SLOW
def test_a_train_step_on_all_three_axes_is_the_step_of_one_device():
    check("sft", run_on_devices(8, compare, stage="sft", meshes=[MIXED], whole=False, timeout=900))


@SLOW
def test_a_step_of_an_adapter_too():
    adapter = {"kind": "dora", "rank": 4}
    keys = {"stage": "sft", "meshes": [MIXED], "whole": False, "adapter": adapter}
    check("sft", run_on_devices(8, compare, **keys, timeout=900))


@SLOW
@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "soft_prompt", "virtual_tokens": 4},
        {"kind": "prefix", "virtual_tokens": 4},
        {"kind": "bottleneck", "width": 4},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_a_step_of_what_is_no_part_of_a_projection_too(adapter):
    keys = {"stage": "sft", "meshes": [MIXED], "whole": False, "adapter": adapter}
    check("sft", run_on_devices(8, compare, **keys, timeout=900))


@SLOW
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_everything_else_of_a_stage_too(stage):
    """The sampler (greedy, too), and what scores."""
    check(stage, run_on_devices(8, compare, stage=stage, meshes=[MIXED], timeout=1800))


@SLOW
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_preference_stages_on_all_three_axes(stage):
    check(stage, run_on_devices(8, compare, stage=stage, meshes=[MIXED, *OTHERS], timeout=1800))


@SLOW
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_on_the_other_meshes_too(stage):
    check(stage, run_on_devices(8, compare, stage=stage, meshes=OTHERS, timeout=1800))


@SLOW
def test_what_does_not_divide_is_whole_on_each_device_and_computes_the_same():
    name = "tensor 4, data 2"
    got = run_on_devices(8, compare, stage="sft", meshes=[name], model="ragged", timeout=900)[name]
    assert max(got["gradients"].values()) < 1e-5
    assert got["said"] < 1e-4
    assert got["greedy"]
    # 61 tokens and 42 features of the MLP do not divide by 4, nor do 30 and 10 of the heads.
    assert any("lm_head/kernel" in name for name in got["whole leaves"])


def stage_on_mesh(folder, stage, keys):
    """A whole stage in a process with several devices."""
    return run(stage, Path(folder), **keys).metrics


def settings(stage, tiny, models):
    keys = {
        "sft": lambda: tiny.sft(models.base) | {"train.microbatch_size": 1},
        "reward": lambda: tiny.comparisons(models.base),
        "dpo": lambda: tiny.comparisons(models.base),
        "ppo": lambda: (
            tiny.ppo(models.base, models.judge)
            | {"train.microbatch_size": 1, "train.batch_size": 16}
        ),
    }[stage]()
    return keys | {"train.save_every": 100}


def same_figures(ours, theirs, *, close):
    """Two records, line by line; what counts in whole tokens or rows exactly."""
    assert [(x["step"], x["split"], sorted(x)) for x in ours] == [
        (x["step"], x["split"], sorted(x)) for x in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            if isinstance(value, float) and name != "ratio/off":  # rounding, by its nature
                assert value == pytest.approx(b[name], rel=close, abs=close), (a["step"], name)


@SLOW
@pytest.mark.parametrize("adapter", [{}, {"model.lora.rank": 4}], ids=["all", "lora"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_whole_stage_on_eight_devices_is_the_stage_on_one(stage, adapter, tiny, models, tmp_path):
    keys = settings(stage, tiny, models) | adapter
    assert run(stage, tmp_path / "one", **keys).exit_code == 0
    run_on_devices(
        8,
        stage_on_mesh,
        folder=str(tmp_path / "mesh"),
        stage=stage,
        keys=keys | {"mesh.fsdp": 4, "mesh.tensor": 2},
        timeout=900,
    )
    for split in ("train", "eval"):
        same_figures(
            metrics(tmp_path / "mesh", split), metrics(tmp_path / "one", split), close=2e-3
        )


def exported(folder):
    return load_file(folder / "export" / "model.safetensors")


@SLOW
def test_two_processes_train_like_one(tiny, models, tmp_path):
    keys = tiny.sft(models.base) | {"train.save_every": 3, "optim.learning_rate": 1e-3}
    assert run("sft", tmp_path / "one", **keys).exit_code == 0
    two = run_in_processes(
        2,
        stage_on_mesh,
        folder=str(tmp_path / "two"),
        stage="sft",
        keys=keys | {"mesh.fsdp": 2, "train.microbatch_size": 2},
        timeout=900,
    )
    assert two[0] == two[1]
    a, b = exported(tmp_path / "one"), exported(tmp_path / "two")
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_allclose(b[name], value, atol=1e-6, rtol=1e-6, err_msg=name)
    for split in ("train", "eval"):  # and each line was written once
        same_figures(metrics(tmp_path / "two", split), metrics(tmp_path / "one", split), close=1e-5)
    steps = [x["step"] for x in metrics(tmp_path / "two")]
    assert steps == sorted(set(steps))
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["steps_done"] == summary["steps_planned"]
