# SPDX-License-Identifier: Apache-2.0
"""Two processes over 127.0.0.1 do what one does: training, saving, stopping together."""

import os
import sys
from pathlib import Path

import jax
import pytest
from devices import run_in_processes, run_on_devices, start

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import toy

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.parallel import distributed

MESH = {"data": 2, "fsdp": 2}


def train(folder, only=None, **kwargs):
    """One process's run; `only`: which process gets the signal."""
    if only is not None and int(os.environ["JAX_PROCESS_ID"]) != only:
        kwargs.pop("signal_at")
    return toy.run(folder, mesh=MESH, **kwargs)


def losses(folder):
    lines, _ = toy.record(folder)
    return [(x["step"], x["split"], x["error"]) for x in lines if "split" in x]


@pytest.mark.slow
def test_two_processes_train_and_save_like_one(tmp_path):
    one = run_on_devices(4, train, folder=str(tmp_path / "one"))
    two = run_in_processes(2, train, devices=2, folder=str(tmp_path / "two"))
    assert two[0] == two[1]
    assert two[0]["step"] == one["step"] == 12
    assert two[0]["steps"] == one["steps"]
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [x[:2] for x in a] == [x[:2] for x in b]
    assert [x[2] for x in a] == pytest.approx([x[2] for x in b], rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_they_resume(tmp_path):
    got = run_in_processes(
        2, train, devices=2, folder=str(tmp_path), only=1, signal_at=[2], steps=200, save_every=100
    )
    assert got[0] == got[1]
    assert got[0]["exit_code"] == 143
    assert 2 < got[0]["step"] < 200
    assert got[0]["steps"][-1] == got[0]["step"]
    again = run_in_processes(2, train, devices=2, folder=str(tmp_path), steps=200, save_every=100)
    assert again[0]["start"] == got[0]["step"]
    assert again[0]["exit_code"] == 0


def test_half_an_environment_is_refused_with_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(JaxrlhfError, match="JAX_NUM_PROCESSES=None"):
        distributed.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(JaxrlhfError, match="JAX_PROCESS_ID=2"):
        distributed.initialize()


def test_alone_nothing_is_initialized(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.initialize() is False
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not distributed.wanted()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert distributed.wanted()


def join():
    distributed.initialize()


def test_one_of_two_started_says_how_to_start_the_other(tmp_path):
    env = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "JAXRLHF_START_SECONDS": "2",
    }
    child = start(join, tmp_path / "out.json", env=env)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 1, text
    assert "not all 2 processes came together within 2 s" in text
    assert "JAX_PROCESS_ID=0 ... 1 (this one is 1" in text
    assert "stack trace" not in text


def fail(only):
    """One process cannot go on; the other waits for it in a collective."""
    with distributed.together():
        if jax.process_index() == only:
            raise JaxrlhfError("no space left here")
        distributed.barrier("further on")


@pytest.mark.slow
@pytest.mark.parametrize("only", [0, 1])
def test_where_one_process_fails_all_end(only):
    """jax alone would let both wait for 300 s."""
    with pytest.raises(AssertionError) as failed:
        run_in_processes(2, fail, only=only, timeout=120, env={"JAXRLHF_HEARTBEAT_SECONDS": "5"})
    text = str(failed.value)
    assert "JaxrlhfError: no space left here" in text
    assert "killed after" not in text


def fail_alike():
    with distributed.together():
        raise JaxrlhfError("an unknown key")


@pytest.mark.slow
def test_where_all_fail_alike_each_says_so():
    with pytest.raises(AssertionError) as failed:
        run_in_processes(2, fail_alike, timeout=120)
    text = str(failed.value)
    assert "ended with [1, 1]" in text
    assert text.count("JaxrlhfError: an unknown key") == 2
    assert "DEADLINE" not in text
