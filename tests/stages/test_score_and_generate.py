# SPDX-License-Identifier: Apache-2.0
"""Given rows scored and prompts completed: each row once, in order, or an error that names it."""

import io
import json
import math
import shutil
import sys

import pytest
from tiny import TESTS, read_jsonl, write_jsonl

import jaxrlhf
from jaxrlhf import cli
from jaxrlhf.stages.completions import Completions
from jaxrlhf.stages.generate import rows_of
from jaxrlhf.stages.outputs import check_output
from jaxrlhf.stages.outputs import write_jsonl as write

FEW = ["sampling.max_new_tokens=4", "sampling.batch_size=2"]


@pytest.fixture
def said(capsys):
    """Runs a command; returns what it printed, or, with a code, the error it ended with."""

    def call(*words, code=0):
        assert cli.main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        if code:
            assert err.splitlines()[-1].startswith("error: ") or err.startswith("error: ")
        return err if code else out

    return call


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A model of 64 learned positions, with a tokenizer of two words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    shutil.copytree(TESTS / "oracles" / "models" / "gpt2", folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def test_what_was_sampled_is_not_what_the_prompts_bring_along():
    columns = {"completion": ["theirs"], "logprobs": [1], "id": [7], "chosen": [" yes"]}
    found = Completions(
        prompts=["a"],
        prompt_ids=[[1]],
        columns=columns,
        texts=["ours"],
        token_ids=[[3]],
        logprobs=[[-1.0]],
        finish_reasons=["stop"],
        groups=None,
    )
    [row] = rows_of(found)
    assert (row["completion"], row["logprobs"], row["id"]) == ("ours", [-1.0], 7)


def test_every_row_is_scored_in_order(models, tmp_path, said):
    rows = [{"prompt": "a", "completion": text} for text in (" it", "", " ", " my order")]
    rows[0] |= {"chosen": " no", "rejected": " never"}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said("score", "-m", models.base, data, "-o", tmp_path / "out.jsonl")
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [len(row["token_ids"]) > 0 for row in found] == [True, False, True, True]
    assert (found[1]["logprob"], found[1]["token_logprobs"]) == (0.0, [])

    model = jaxrlhf.load(models.base)
    scores = model.score(["a"] * 4, [row["completion"] for row in rows])
    assert scores == pytest.approx([row["logprob"] for row in found])
    assert model.score("a", "") == 0
    judge = jaxrlhf.load(models.judge)
    assert math.isfinite(judge.score("a", ""))


def test_errors_speak_of_the_commands_own_keys(models, tmp_path, said):
    chat = [{"role": "user", "content": "a"}]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat, "completion": "b"}])
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a b c d", "completion": " b"}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": 3}])
    score = ("score", "-m", models.base)
    generate = ("generate", "-m", models.base, "-o", tmp_path / "out", *FEW, "--prompts")
    for words, mend in (
        ((*score, chats), "set template to one of"),
        ((*score, rows, "max_length=4"), "more than max_length = 4; raise it\n"),
        ((*score, bad), "'completion' must be text, found int 3\n"),
        ((*generate, chats), "set template to one of"),
        (
            (*generate, rows, "max_prompt_length=2", "truncation=error"),
            "more than max_prompt_length = 2; raise it, or set truncation to drop, left or right",
        ),
    ):
        text = said(*words, code=1)
        assert mend in text
        assert "data." not in text


def test_what_generate_writes_of_chats_can_be_scored(models, tmp_path, said):
    chat = [{"role": "user", "content": "where is my order"}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": chat, "chosen": "a"}] * 2)
    out, template = tmp_path / "out.jsonl", "template=plain"
    words = ("-m", models.base, template, "sampling.temperature=0", *FEW)
    said("generate", "--prompts", prompts, "-o", out, *words)
    said("score", "-m", models.base, template, out, "-o", tmp_path / "scores.jsonl")
    made, scored = read_jsonl(out), read_jsonl(tmp_path / "scores.jsonl")
    assert [row["prompt"] for row in made] == [chat, chat]
    end = json.loads((models.base / "export" / "config.json").read_text())["eos_token_id"]
    # as the template ends a turn, whatever the model said
    assert [row["token_ids"][-1] for row in scored] == [end, end]


def test_places_are_tried_before_the_model_is_opened(models, tmp_path, said):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    generate = ("generate", "-m", "./nowhere", "--prompts", file)
    for words, mend in (
        ((*generate, "-o", tmp_path), f"output = {tmp_path} is a folder; name a file"),
        ((*generate, "-o", file / "x"), "cannot be written: Not a directory"),
        (("score", "-m", "./nowhere", file, "-o", "/proc/x"), "cannot be written: No such file"),
        (("export", "-m", "./nowhere", "-o", file), "is a file; name a folder"),
        (("data", "pairs", file, "-o", tmp_path), "is a folder; name a file"),
    ):
        assert mend in said(*words, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    check_output(tmp_path / "new" / "folders" / "file")
    assert not (tmp_path / "new").exists()


def test_dates_are_written_as_text(tmp_path):
    import datetime

    write(tmp_path / "a.jsonl", [{"at": datetime.datetime(2024, 1, 2)}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"at": "2024-01-02 00:00:00"}]


def test_learned_positions_bound_rows_and_samples(gpt2, tmp_path, said):
    rows = [{"prompt": "a " * n, "completion": "b"} for n in (2, 80)]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    for words in (
        ("sft", "-m", gpt2, "--output", tmp_path / "sft", f"data={long}", "train.steps=1"),
        ("eval", "-m", gpt2, "--output", tmp_path / "eval", f"data.eval={long}"),
    ):
        text = said(*words, code=2)
        assert "set data.max_length to 64 or less" in text
    text = said("score", "-m", gpt2, long, "-o", tmp_path / "out", code=2)
    assert "set max_length to 64 or less" in text
    assert "long.jsonl:2" in text
    text = said("generate", "-m", gpt2, "--prompt", "a b", code=2)
    assert "sampling.max_new_tokens = 128 after a prompt of 2 tokens exceeds the 64" in text
    assert "set it to 62 or less" in text
    words = ("ppo", "-m", gpt2, "--output", tmp_path / "ppo", f"data={long}", "train.steps=1")
    more = ("reward=builtins:len", "sampling.max_new_tokens=60", "data.max_length=70", "--dry-run")
    text = said(*words, *more, code=2)
    assert "sampling.max_new_tokens = 60" in text


def test_chat_spells_out_escapes_and_reads_any_bytes(models, monkeypatch, said):
    from jaxrlhf.stages import tools

    monkeypatch.setattr(tools, "decode_continuation", lambda *args: " \x1b[31mred")
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff\n\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    out = said("chat", "-m", models.base, "sampling.max_new_tokens=2")
    assert "a\ufffd \\x1b[31mred" in out
    assert "\x1b" not in out


def test_printed_completions_hold_no_escapes(models, monkeypatch, said):
    from jaxrlhf.stages import completions

    monkeypatch.setattr(completions, "decode_continuation", lambda *args: "\x1b[31mred")
    out = said("generate", "-m", models.base, "--prompt", "a", *FEW)
    assert "a\\x1b[31mred" in out


def test_data_commands_do_as_they_are_told(tiny, tmp_path, said):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    show = ("data", "show", rows, f"model.tokenizer={tiny.tokenizer}")
    assert "b]]" in said(*show, "data.append_eos=false")
    assert "b]]" not in said(*show)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "where is my order"}])
    show = ("data", "show", prompts, f"model.tokenizer={tiny.tokenizer}")
    assert ": 3 tokens" in said(*show, "data.max_prompt_length=3")
    sentences = [{"sentence": f"s{i}", "label": i % 2} for i in range(40)]
    rows = write_jsonl(tmp_path / "sentences.jsonl", sentences)
    first, again, other = (said("data", "pairs", rows, f"seed={seed}") for seed in (1, 1, 2))
    assert first == again != other
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": 1, "completions": [], "ranks": []}])
    assert "on_bad_row" not in said("data", "pairs", bad, code=1)
