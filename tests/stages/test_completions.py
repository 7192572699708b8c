# SPDX-License-Identifier: Apache-2.0
"""Completions and what is said of them, on several devices and in several processes, are those of
one device."""

from pathlib import Path

import pytest
from devices import run_in_processes, run_on_devices
from tiny import metrics, read_jsonl, run, write_jsonl

SLOW = pytest.mark.slow


def stages(folder, jobs):
    """Several stages one after the other: {name: [stage, settings]}."""
    return {
        name: run(stage, Path(folder) / name, **keys).metrics
        for name, (stage, keys) in jobs.items()
    }


def same_rows(ours, theirs):
    """Two jsonl files, up to the rounding of numbers."""
    ours, theirs = read_jsonl(ours), read_jsonl(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            close = name in ("logprobs", "logprob", "token_logprobs", "scores", "reward")
            assert (pytest.approx(value, abs=1e-4) if close else value) == b[name], name


def same_figures(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not isinstance(value, str):  # the kind of line
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name


def generation(models, prompts, **keys):
    sampling = {"sampling.max_new_tokens": 4, "sampling.temperature": 1.0}
    return ["generate", {"model.path": str(models.base), "prompts": str(prompts)} | sampling | keys]


def few(tiny, count, folder):
    """So many held-out prompts of one bucket of lengths."""
    return write_jsonl(folder / f"{count}.jsonl", read_jsonl(tiny.held_out)[:count])


def test_fewer_prompts_than_devices_are_completed_as_on_one(tiny, models, tmp_path):
    jobs = {str(n): generation(models, few(tiny, n, tmp_path)) for n in (1, 2)}
    run_on_devices(4, stages, folder=str(tmp_path / "four"), jobs=jobs)
    stages(tmp_path / "one", jobs)
    for name in jobs:
        file = Path(name) / "completions.jsonl"
        same_rows(tmp_path / "four" / file, tmp_path / "one" / file)


def evaluated(tiny, models, prompts):
    """PPO that looks at held-out prompts, at so low a rate that rounding stays rounding."""
    keys = tiny.ppo(models.base, models.judge) | {"data.eval": str(prompts), "train.steps": 1}
    return ["ppo", keys | {"train.microbatch_size": 1, "optim.learning_rate": 1e-5}]


def same_evaluations(ours, theirs):
    assert len(metrics(ours, "eval")) == len(metrics(theirs, "eval")) == 2
    for a, b in zip(metrics(ours, "eval"), metrics(theirs, "eval"), strict=True):
        same_figures(a, b)
    same_rows(ours / "samples.jsonl", theirs / "samples.jsonl")


@SLOW
def test_ppo_looks_at_fewer_prompts_than_devices(tiny, models, tmp_path):
    jobs = {"ppo": evaluated(tiny, models, few(tiny, 2, tmp_path))}
    jobs["ppo"][1]["train.batch_size"] = 16
    run_on_devices(4, stages, folder=str(tmp_path / "four"), jobs=jobs)
    stages(tmp_path / "one", jobs)
    same_evaluations(tmp_path / "four/ppo", tmp_path / "one/ppo")


@SLOW
def test_two_processes_say_what_one_says(tiny, models, tmp_path):
    prompts = few(tiny, 3, tmp_path)
    measured = {
        "prompts": str(prompts),
        "proxy": str(models.judge),
        "reference": str(models.judge.parent / "base"),
        "eval.bootstrap": 20,
        "sampling.max_new_tokens": 4,
    }
    rows = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(tiny.demonstrations)[:5])
    jobs = {
        "generate": generation(models, prompts),
        "eval": ["eval", {"model.path": str(models.base), **measured}],
        "logprobs": ["score", {"model.path": str(models.base), "data": str(rows)}],
        "rewards": ["score", {"model.path": str(models.judge), "data": str(rows)}],
        "ppo": evaluated(tiny, models, prompts),
    }
    one = stages(tmp_path / "one", jobs)
    two = run_in_processes(2, stages, folder=str(tmp_path / "two"), jobs=jobs, timeout=600)
    for name in ("generate", "eval", "logprobs", "rewards"):
        for found in two:
            same_figures(found[name][0], one[name][0])
    for file in ("generate/completions", "logprobs/scores", "rewards/scores"):
        same_rows(tmp_path / "two" / f"{file}.jsonl", tmp_path / "one" / f"{file}.jsonl")
    same_evaluations(tmp_path / "two/ppo", tmp_path / "one/ppo")
