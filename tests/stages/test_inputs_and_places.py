# SPDX-License-Identifier: Apache-2.0
"""What a run reads, told by its content; and what a dry run says of it without computing."""

import json
import os

import pytest
from tiny import write_jsonl

from jaxrlhf import cli
from jaxrlhf.config.load import load
from jaxrlhf.errors import DataError
from jaxrlhf.stages.lineage import absent, content_of, contents

ROWS = [{"prompt": "a", "completion": " b"}]


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail and returns its one message."""

    def check(*words, code=2):
        assert cli.main([str(word) for word in words]) == code
        return capsys.readouterr().err

    return check


def test_a_pattern_is_told_by_the_files_it_stands_for(tmp_path):
    pattern = str(tmp_path / "*.jsonl")
    assert content_of(pattern) == "missing"
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    one = content_of(pattern)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    two = content_of(pattern)
    write_jsonl(tmp_path / "b.jsonl", ROWS * 2)
    assert len({"missing", one, two, content_of(pattern)}) == 4
    assert content_of("tfds:a[:10%]") == "name:tfds:a[:10%]"


def test_an_unreadable_file_is_named(tmp_path, refused):
    config = load("score", keywords={"model": "./m", "data": "/proc/self/mem"})
    with pytest.raises(DataError, match=r"data.0.source: /proc/self/mem cannot be read: "):
        contents(config)


def test_what_is_not_there_is_listed(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    data = [str(file), str(tmp_path / "*.jsonl"), str(tmp_path / "no.jsonl"), "a/name"]
    keys = {"model": str(tmp_path), "data": [*data, "stage:made[0]/pairs.jsonl"]}
    config = load("score", keywords=keys)
    assert absent(config) == [f"data.2.source: there is no {tmp_path / 'no.jsonl'}"]


def test_a_dry_run_says_what_is_missing(tmp_path, refused, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    text = refused("score", "-m", tmp_path / "m", tmp_path / "no.jsonl", "--dry-run")
    assert "model.path: there is no" in text
    assert "data.0.source: there is no" in text
    assert cli.main(["score", "-m", str(tmp_path), str(file), "--dry-run"]) == 0
    assert "score: dry run: the settings are right" in capsys.readouterr().out

    pipeline = tmp_path / "p.yaml"
    stage = {"stage": "score", "model": str(tmp_path), "data": "no.jsonl"}
    second = {"stage": "eval", "model": "stage:score", "data": {"eval": "a.jsonl"}}
    pipeline.write_text(json.dumps({"stages": [stage, second]}))
    text = refused("run", pipeline, "--dry-run", "--output", tmp_path / "out")
    assert text == f"error: score: data.0.source: there is no {tmp_path / 'no.jsonl'}\n"
    os.rename(file, tmp_path / "no.jsonl")
    assert "eval: data.eval.0.source: there is no" in refused("run", pipeline, "--dry-run")
    write_jsonl(file, ROWS)
    assert cli.main(["run", str(pipeline), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    place = f"output_dir = {file} is a file; name a folder"
    assert place in refused("run", pipeline, "--output", file)


def test_a_dry_run_of_dpo_computes_nothing(tiny, models, tmp_path, monkeypatch, capsys):
    from jaxrlhf.stages import preference

    monkeypatch.setattr(preference, "make_logprobs", lambda *args: None)
    keys = tiny.comparisons(models.base)
    words = [f"{k}={v}" for k, v in keys.items()]
    assert cli.main(["dpo", *words, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "; 6 steps, " in out
    assert " an epoch" in out
    assert "nothing was computed" in out
