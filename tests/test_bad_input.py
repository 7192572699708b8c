# SPDX-License-Identifier: Apache-2.0
"""What a person gets wrong: one screen that names the field, the value, the place and the fix."""

import json
import shutil

import pytest
from tiny import FEW, words, write_jsonl

from jaxrlhf import cli
from jaxrlhf.train.lock import run_lock


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail and returns what it says."""

    def check(command, folder, keys, *more, code=1):
        assert cli.main(words(command, folder, keys, *more)) == code
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert "Traceback" not in text
        assert len(text.splitlines()) <= cli.MAX_LINES
        assert not (folder / "summary.json").exists()
        return text

    return check


@pytest.fixture
def keys(tiny, stories):
    """Settings with which SFT would run: a model that is there without a stage having run."""
    return {
        "model": str(stories),
        "data.train": str(tiny.demonstrations),
        "train.steps": 2,
        **FEW,
    }


ROWS = [{"prompt": f"a{i}", "completion": f" b{i}"} for i in range(9)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "answer": "b"}\n', ["bad.jsonl:1", "column_map: {completion: answer}"]),
        (b"", ["bad.jsonl", "holds no rows"]),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp', ["bad.jsonl:2"]),
        (b'{"prompt": "a", "completion": "b\xff"}\n', ["bad.jsonl", "UTF-8"]),
        (b'{"prompt": "a", "completion": 3}\n', ["bad.jsonl", "completion", "3"]),
        (
            b'{"prompt": "a", "completion": null}\n',
            ["bad.jsonl:1", "{completion: YOUR_COLUMN}"],
        ),
        (b'["prompt"]\n', ["bad.jsonl"]),
    ],
    ids=["column", "empty", "cut", "utf-8", "type", "null", "list"],
)
def test_bad_rows_are_named_by_file_and_line(refused, keys, tmp_path, content, said):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    text = refused("sft", tmp_path / "run", {**keys, "data.train": str(file)})
    assert all(word in text for word in said), text
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_bad_rows_of_comparisons_and_prompts_are_named_too(refused, keys, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b"}] * 8)
    for command in ("reward", "dpo"):
        text = refused(command, tmp_path / command, {**keys, "data.train": str(rows)})
        assert "rows.jsonl" in text
        assert "rejected" in text
    more = {"reward": "builtins:len", "sampling.max_new_tokens": 8}
    rows = write_jsonl(tmp_path / "text.jsonl", [{"question": "a"}] * 8)
    text = refused("ppo", tmp_path / "ppo", {**keys, **more, "data.train": str(rows)})
    assert "text.jsonl" in text
    assert "prompt" in text


def test_a_prompt_that_is_too_long_is_named_where_that_is_an_error(refused, keys, tmp_path):
    rows = [*ROWS, {"prompt": "word " * 500, "completion": " b"}]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    keys = {**keys, "data.train": str(file), "data.truncation": "error"}
    text = refused("sft", tmp_path / "run", keys)
    assert "long.jsonl:10" in text
    assert "data.max_length" in text or "max_length" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.step": 3}, ["train.step", "train.step=3", "did you mean train.steps?"]),
        ({"train.steps": "many"}, ["train.steps", "many", "whole number"]),
        ({"optim.learning_rate": True}, ["optim.learning_rate", "true"]),
        ({"train.batch_size": 8, "train.microbatch_size": 3}, ["batch_size = 8", "3"]),
        ({"optim.name": "adam"}, ["optim.name", "adam", "adamw"]),
    ],
)
def test_wrong_settings_end_with_2(refused, keys, tmp_path, change, said):
    text = refused("sft", tmp_path / "run", keys | change, code=2)
    assert all(word in text for word in said), text
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_says_what_there_is(refused, keys, tmp_path):
    text = refused("sft", tmp_path / "run", keys | {"mesh.tensor": 3}, code=2)
    assert "mesh" in text
    assert "3" in text
    assert "1 device" in text


def test_a_folder_that_is_no_model_says_what_it_is(refused, keys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = refused("sft", tmp_path / "run", keys | {"model": str(empty)})
    assert str(empty) in text
    assert "config.json" in text
    text = refused("sft", tmp_path / "run", keys | {"model": str(tmp_path / "nowhere")})
    assert "does not exist" in text
    text = refused("sft", tmp_path / "run", keys | {"model": keys["data.train"]})
    assert "is a file" in text


def test_a_model_with_damaged_weights_is_named(refused, keys, tmp_path, stories):
    copy = tmp_path / "copy"
    shutil.copytree(stories, copy)
    [weights] = copy.glob("*.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-100])
    text = refused("sft", tmp_path / "run", keys | {"model": str(copy)})
    assert weights.name in text


def test_a_run_directory_in_use_names_its_holder(refused, keys, tmp_path):
    with run_lock(tmp_path / "run"):
        text = refused("sft", tmp_path / "run", keys)
    assert "in use by another run (process" in text
    assert "--output" in text


def test_a_run_directory_that_cannot_be_made_is_named(refused, keys, tmp_path):
    (tmp_path / "file").write_text("")
    text = refused("sft", tmp_path / "file" / "run", keys)
    assert str(tmp_path / "file") in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no_such_module:f", ["no_such_module", "cannot be imported"]),
        ("{folder}/none.py:f", ["no file"]),
        ("{folder}/has.py:other", ["no function 'other'", "mine"]),
        ("{folder}/broken.py:f", ["broken.py", "SyntaxError"]),
        ("{folder}/raises.py:f", ["raises.py", "ZeroDivisionError"]),
    ],
)
def test_a_reward_function_that_is_not_there(refused, keys, tmp_path, source, said):
    (tmp_path / "has.py").write_text("def mine(prompts, completions, **columns):\n    return [0]\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    rows = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"a{i}"} for i in range(8)])
    keys = keys | {
        "reward": source.format(folder=tmp_path),
        "data.train": str(rows),
        "sampling.max_new_tokens": 8,
    }
    text = refused("ppo", tmp_path / "run", keys, code=2)
    assert all(word in text for word in said), text


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (30_000, "step 1 is kept. Free some space and resume"),  # a checkpoint does not fit
        pytest.param(1_000, "cannot be written: File too large", marks=pytest.mark.slow),
        pytest.param(10_000, "the tokenizer cannot be written", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(
    limit, said, tiny, models, tmp_path, commands
):
    """A limit on the size of files stands in for a disk that is full."""
    run = tmp_path / "run"
    keys = tiny.sft(models.base) | {"train.save_every": 1, "optim.schedule": "constant"}
    del keys["train.eval_every"]
    keys["train.steps"] = 1
    assert cli.main(words("sft", run, keys)) == 0
    kept = sorted(p for p in (run / "checkpoints" / "1").rglob("*") if p.is_file())
    before = {p: p.read_bytes() for p in kept}
    keys["train.steps"] = 3
    code, text = commands(words("sft", run, keys), limit=limit)
    assert code == 1, text
    assert "Traceback" not in text
    error = text[text.index("error: ") :]
    assert len(error.splitlines()) <= cli.MAX_LINES
    assert said in error
    assert {p: p.read_bytes() for p in kept} == before
    # With room again it goes on from there.
    assert cli.main(words("sft", run, keys)) == 0
    assert json.loads((run / "summary.json").read_text())["steps_done"] == 3
