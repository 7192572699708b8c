# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs from end to end and counts what it says it counts; never how fast."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def workloads():
    spec = importlib.util.spec_from_file_location("workloads", FOLDER / "workloads.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_loading_is_measured_beside_what_must_be_held(tmp_path):
    out = tmp_path / "results.json"
    cases = ["1 device, bfloat16", "8 devices, float32"]
    command = [sys.executable, str(FOLDER / "loading.py"), "--models", "smoke", "--cases", *cases]
    command += ["--repetitions", "1", "--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["models"]["smoke"]
    numbers = 64 * 64 + 2 * (4 * 64 * 64 + 64 * 64 + 2 * 64) + 64  # k and v are half as wide
    assert found[cases[0]]["held_mb"] == round(2 * numbers / 1e6, 1)
    assert found[cases[1]]["held_mb"] == round(4 * numbers / 1e6, 1)
    assert found[cases[1]]["bound_mb"] == round(1.1 * 4 * 64 * 64 / 1e6, 1)
    assert found[cases[0]]["wall_s"] > 0
    assert found["other"]["digest_s"] >= 0


@pytest.mark.slow
def test_every_figure_is_there(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--sizes", "smoke", "--repetitions", "1"]
    command += ["--workloads", "sft", "decode", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["sizes"]["smoke"]
    step = found["sft"]
    assert step["cpu_ms_min"] <= step["cpu_ms"] <= step["cpu_ms_max"]
    assert step["gflop"] > 0
    assert 0 < step["share"] <= step["share_best_step"]
    assert step["peak_gflops"]["worst"] <= step["peak_gflops"]["best"]
    assert step["peak_mb"] > 100
    assert set(found["decode"]["batches"]) == {"1", "2"}
    assert found["decode"]["batch_1_step"]["weight_mb"] > 0
    assert all(rate["tokens_per_second_best"] > 0 for rate in found["decode"]["batches"].values())
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("name", ["dpo", "reward", "ppo"])
@pytest.mark.slow
def test_every_workload_runs(workloads, name):
    work = workloads.WORKLOADS[name]("smoke")
    work.run()
    work.run()  # on the state that the first one left
    assert work.flops > 0


def test_flops_are_those_of_the_published_sizes(workloads):
    """4.2 M and 31.5 M multiply-adds a token and pass, apart from attention."""
    for name, millions in (("tiny", 4.325), ("small", 31.457)):
        one = workloads.forward_flops(workloads.MODELS[name], 1, 1)
        attention = 4 * workloads.MODELS[name].hidden_size * workloads.MODELS[name].num_layers
        assert one - attention == pytest.approx(2e6 * millions, rel=1e-3)
    model = workloads.MODELS["tiny"]
    whole = workloads.forward_flops(model, 1, 8)
    first = workloads.forward_flops(model, 1, 5)
    assert first + workloads.forward_flops(model, 1, 8, start=5, head=3) == whole
