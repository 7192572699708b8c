# SPDX-License-Identifier: Apache-2.0
"""Pipelines: what is finished is skipped, what changed is redone, a kill changes nothing."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from devices import run_in_processes
from safetensors.numpy import load_file
from tiny import FEW, SHAPE, record

from jaxrlhf import cli
from jaxrlhf.config.pipeline import load_pipeline, resolve
from jaxrlhf.stages.lineage import identity


def text(tiny):
    """A world whose tokenizer is used, a base model, two repetitions of more of it, and a report.

    Their step is the program of the base model that other tests share.
    """
    data = f"data: {{train: {tiny.text}, max_length: {FEW['data.max_length']}}}"
    return f"""
seed: 3
stages:
  - stage: world
    world_seed: 0
    sizes: {{vocabulary: 400, pretraining: 9, demonstrations: 9, prompts_train: 5, prompts_eval: 5}}
  - name: base
    stage: pretrain
    model: {{init: {json.dumps(SHAPE)}, tokenizer: stage:world/tokenizer}}
    {data}
    train: {{steps: 3, batch_size: 16, save_every: 1}}
    optim: {{learning_rate: 0.02, schedule: constant}}
  - name: tuned
    stage: pretrain
    model: stage:base
    {data}
    train: {{steps: 3, batch_size: 16, save_every: 1}}
    optim: {{learning_rate: 0.02, schedule: constant}}
    for_each: {{seed: [0, 1]}}
  - stage: report
    runs: [stage:base, stage:tuned]
"""


STAGES = ["world", "base", "tuned[0]", "tuned[1]", "report"]
TRAINED = ["base", "tuned-0", "tuned-1"]


def summary(folder):
    """{stage: content} of a pipeline's directory."""
    content = json.loads((folder / "pipeline.json").read_text())
    return {stage["name"]: stage["content"] for stage in content["stages"]}


def statuses(folder):
    content = json.loads((folder / "pipeline.json").read_text())
    return {stage["name"]: stage["status"] for stage in content["stages"]}


def same(found, whole):
    """The same results, logs and checkpoints of every stage, whatever happened on the way."""
    assert list(summary(found)) == STAGES
    for name in STAGES[:-1]:  # the page says when and how fast: its bytes are its own
        assert summary(found)[name] == summary(whole)[name]
    for name in TRAINED:
        assert record(found / name) == record(whole / name)


@pytest.fixture(scope="session")
def pipeline(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    file.write_text(text(tiny))
    return file


@pytest.fixture(scope="session")
def whole(pipeline):
    """A pipeline that nobody interrupted."""
    folder = pipeline.parent / "whole"
    assert cli.main(["run", str(pipeline), "--output", str(folder)]) == 0
    assert set(statuses(folder).values()) == {"done"}
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """The finished pipeline in another place, which is no change."""
    return shutil.copytree(whole, tmp_path / "copy")


def again(pipeline, folder, *overrides):
    """Calls it again and returns the names of the stages that ran."""
    assert cli.main(["run", str(pipeline), "--output", str(folder), *overrides]) == 0
    return [name for name, status in statuses(folder).items() if status != "skipped"]


def identities(pipeline, folder, *overrides):
    """{stage: the digest by which it is known when it is finished}."""
    plan = load_pipeline([pipeline], overrides)
    outputs = {planned.name: folder / planned.folder for planned in plan.stages}
    return {p.name: identity(p.stage, resolve(p.config, outputs)) for p in plan.stages}


def test_a_word_that_no_pipeline_takes_is_refused(pipeline, copy, capsys):
    for word in ("nevr", str(copy)):
        call = ["run", str(pipeline), "--output", str(copy), "--resume", word]
        assert cli.main(call) == 2
        assert f"--resume {word}: a pipeline takes auto, or never" in capsys.readouterr().err


def test_a_second_call_skips_everything(pipeline, whole, copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    began = time.process_time()
    assert again(pipeline, copy) == []
    assert time.process_time() - began < 5
    after = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    del before[copy / "pipeline.json"], after[copy / "pipeline.json"]
    assert after == before
    assert summary(copy) == summary(whole)


def test_each_repetition_has_its_own_folder_values_and_parents(whole):
    stages = json.loads((whole / "pipeline.json").read_text())["stages"]
    assert [stage["dir"] for stage in stages] == ["world", *TRAINED, "report"]
    assert [stage["values"] for stage in stages[2:4]] == [{"seed": 0}, {"seed": 1}]
    assert [stage["parents"] for stage in stages] == [
        [],
        ["world"],
        ["base"],
        ["base"],
        ["base", "tuned[0]", "tuned[1]"],
    ]
    contents = summary(whole)
    assert contents["tuned[0]"] != contents["tuned[1]"]
    # A stage knows by content what fed it.
    tuned = json.loads((whole / "tuned-0" / "summary.json").read_text())
    assert tuned["parents"]["model.path"] == contents["base"]
    assert (whole / "report" / "report.html").stat().st_size > 10_000


def test_a_changed_key_reruns_exactly_what_depends_on_it(pipeline, whole, copy):
    free = ["tuned.train.keep_last=3", "base.train.log_every=2"]
    assert again(pipeline, copy, *free) == []
    assert again(pipeline, copy, "tuned.for_each.seed=[0, 5]") == ["tuned[1]", "report"]
    assert summary(copy)["tuned[0]"] == summary(whole)["tuned[0]"]
    assert summary(copy)["tuned[1]"] != summary(whole)["tuned[1]"]
    # The best checkpoint is chosen while a stage trains: a finished one has to train again.
    chosen = ["tuned.data.eval_fraction=0.1", "tuned.train.keep_best=nats_per_token"]
    assert identities(pipeline, copy, *chosen) != identities(pipeline, copy, chosen[0])
    # Nothing is thrown away.
    assert record(copy / "tuned-1.old-1") == record(whole / "tuned-1")


def test_a_damaged_result_is_noticed_and_mended(pipeline, whole, copy):
    weights = copy / "base" / "export" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (copy / "tuned-1" / "summary.json").unlink()
    assert again(pipeline, copy) == ["base", "tuned[1]"]
    assert weights.read_bytes() == good
    same(copy, whole)


def test_stopped_then_killed_then_called_again_it_ends_the_same(
    pipeline, whole, commands, tmp_path
):
    call = ["run", str(pipeline), "--output", str(tmp_path)]
    child = commands.start(call)
    deadline = time.monotonic() + 300
    while "pretrain: compiling" not in commands.out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)  # inside the first training stage, while it compiles
    code, said = commands.end()
    assert code == 143, said
    assert "resumable" in said
    assert not (tmp_path / "tuned-0").exists()
    code, said = commands(call, crash="step:0,step:2")  # base is past 2, or is killed there
    assert code == -9, said
    assert cli.main(call) == 0
    same(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_every_kind_of_point_it_ends_the_same(pipeline, whole, commands, tmp_path):
    call = ["run", str(pipeline), "--output", str(tmp_path)]
    for point in ("step:1", "manifest:3", "committed:3", "step:0", "written:2", "retained:3"):
        code, said = commands(call, crash=point)
        assert code == -9, (point, said)
    assert cli.main(call) == 0
    same(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_random_times_it_ends_the_same(pipeline, whole, commands, tmp_path):
    call = ["run", str(pipeline), "--output", str(tmp_path)]
    rng = random.Random(0)
    killed = 0
    for _ in range(4):
        child = commands.start(call)
        # A pipeline takes 5 s on one machine and 30 on another: what it has said is its clock.
        said = rng.randrange(1, 25)
        while len(commands.out.read_text().splitlines()) < said and alive(child):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):  # a late call has little left to do
            os.kill(child, signal.SIGKILL)
        code, text = commands.end()
        assert code in (-9, 0), text
        killed += code == -9
    assert killed >= 2
    assert cli.main(call) == 0
    same(tmp_path, whole)


def alive(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stage_that_fails_is_named_and_what_was_finished_stays(pipeline, copy, capsys):
    (copy.parent / "empty.jsonl").write_text("")
    bad = f"tuned.data.train={copy.parent / 'empty.jsonl'}"
    assert cli.main(["run", str(pipeline), "--output", str(copy), bad]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: [3/5] tuned[0]: ")
    assert "empty.jsonl" in text
    assert "Traceback" not in text
    # The earlier run of that stage, and those before it, are still there.
    assert (copy / "tuned-0.old-1" / "export" / "model.safetensors").is_file()
    assert (copy / "base" / "export" / "model.safetensors").is_file()


def in_every_process(pipeline, folder, late):
    """Runs the pipeline twice and exports a model; one process is always later than the other."""
    from jaxrlhf.stages import lineage

    contents = lineage.contents

    def slowly(config):
        time.sleep(0.7 if os.environ["JAX_PROCESS_ID"] == late else 0)
        return contents(config)

    lineage.contents = slowly
    run = ["run", pipeline, "--output", folder]
    export = ["export", f"{folder}/base", "-o", f"{folder}/hf"]
    return [cli.main(run), statuses(Path(folder)), cli.main(run), cli.main(export)]


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_two_processes_run_a_pipeline_like_one(pipeline, whole, tmp_path, late):
    keys = {"pipeline": str(pipeline), "folder": str(tmp_path / "two"), "late": late}
    for code, first, second, export in run_in_processes(2, in_every_process, **keys):
        assert (code, second, export) == (0, 0, 0)
        assert first == dict.fromkeys(STAGES, "done")
    assert statuses(tmp_path / "two") == dict.fromkeys(STAGES, "skipped")
    assert summary(tmp_path / "two")["world"] == summary(whole)["world"]
    want, got, exported = (
        load_file(folder / "model.safetensors")
        for folder in (whole / "base/export", tmp_path / "two/base/export", tmp_path / "two/hf")
    )
    for name, value in want.items():
        assert exported[name].tobytes() == got[name].tobytes(), name
        # Where a gradient is nearly 0, Adam makes of its rounding some of a step of 0.02.
        np.testing.assert_allclose(got[name], value, atol=2e-4, err_msg=name)
    assert not list((tmp_path / "two").rglob("*.partial"))
