# SPDX-License-Identifier: Apache-2.0
"""Where a run's results are, said at its beginning and its end; how a stopped one goes on."""

import time

import pytest
from tiny import FEW

from jaxrlhf import cli
from jaxrlhf.config.load import load
from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.stages import run_stage
from jaxrlhf.stages.rundir import default_directory


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    found = [default_directory("data pairs") for _ in range(3)]
    assert [path.is_dir() for path in found] == [True] * 3
    first = found[0].name
    assert first.startswith("data-pairs-2001")
    assert [path.name for path in found] == [first, f"{first}-2", f"{first}-3"]


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    with pytest.raises(JaxrlhfError, match="runs is no folder; give an --output"):
        default_directory("sft")


def test_a_stopped_run_says_how_to_go_on_and_a_finished_one_where_it_is(
    tiny, stories, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    keys = {"model": str(stories), "data.train": str(tiny.demonstrations), "train.steps": 2, **FEW}
    config = load("sft", keywords=keys)
    stopped = run_stage("sft", config, stop_requested=lambda: True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sft: in {stopped.path}"
    way = f"resumable: the same command with --output {stopped.path}"
    assert any(line.endswith(way) for line in lines)
    assert stopped.exit_code == 143

    items = [f"{key}={value}" for key, value in keys.items()]
    assert cli.main(["sft", *items, "--output", str(stopped.path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sft: resuming at step 1") for line in said)
    assert said[-1] == f"sft: results in {tmp_path / stopped.path}"
    assert len(list((tmp_path / "runs").iterdir())) == 1
