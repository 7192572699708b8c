# SPDX-License-Identifier: Apache-2.0
"""Tokens a model did not have: given to tokenizer and embedding, and kept in what is saved."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import run, write_jsonl

from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ConfigError, DataError, ModelError
from jaxrlhf.models.weights import load_hf
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages.models import open_model

MARKERS = ["<|im_start|>", "<|im_end|>"]


def opened(path, **keys):
    model = {"path": str(path)} | keys
    section = STAGES["generate"].model_validate({"model": model, "prompt": ["x"]}).model
    with use_mesh(make_mesh()) as mesh:
        return open_model(section, mesh, kind="lm")


def test_a_chat_template_whose_markers_the_model_lacks(models, tmp_path, capsys):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    keys = {
        "model": str(models.base),
        "data.train": str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}] * 8)),
        "data.template": "chatml",
        "data.max_length": 32,
        "train.batch_size": 8,
        "train.steps": 2,
    }
    with pytest.raises(DataError, match=r"lacks .*model.add_tokens='\[<\|im_start\|>, <\|im_end"):
        run("sft", tmp_path / "none", **keys)
    keys["model.add_tokens"] = MARKERS
    with pytest.raises(DataError, match=r"model\.resize_embeddings=true"):
        run("sft", tmp_path / "small", **keys)
    keys["model.resize_embeddings"] = True
    assert run("sft", tmp_path / "run", **keys).exit_code == 0
    before = opened(models.base).config.vocab_size
    assert f"2 tokens added, the embedding has {before + 2} rows (2 new)" in capsys.readouterr().out

    found = opened(tmp_path / "run")  # without saying it again
    ids = found.tokenizer.convert_tokens_to_ids(MARKERS)
    assert ids == [before, before + 1]
    assert found.config.vocab_size == before + 2
    saved = json.loads((tmp_path / "run/export/config.json").read_text())
    assert saved["vocab_size"] == before + 2
    old = load_hf(Path(models.base) / "export").params["embed"]["embedding"]
    new = load_hf(tmp_path / "run/export").params["embed"]["embedding"]
    mean = np.asarray(old, np.float64).mean(0)
    moved = np.abs(np.asarray(new[before:], np.float64) - mean).max(-1)
    assert (moved > 0).all(), "new rows are trained"
    assert (moved < 0.05).all(), "from the mean on"


def test_rows_to_a_multiple_through_export(models, tmp_path, capsys):
    before = opened(models.base).config.vocab_size
    folder = tmp_path / "larger"
    keys = {"model.add_tokens": MARKERS, "model.resize_embeddings": 64}
    assert run("export", folder, **{"model.path": str(models.base)} | keys).exit_code == 0
    found = opened(folder)
    assert found.config.vocab_size == -(-(before + 2) // 64) * 64
    assert found.tokenizer.convert_tokens_to_ids(MARKERS) == [before, before + 1]
    again = opened(folder, add_tokens=MARKERS, resize_embeddings=True)
    assert again.config == found.config, "nothing is missing the second time"


def test_an_adapter_leaves_the_embedding_as_it_is(models, tmp_path):
    keys = {"model.path": str(models.base), "model.lora.rank": 2, "data.train": "x.jsonl"}
    with pytest.raises(ConfigError, match=r"write the larger model first \(jaxrlhf export"):
        run("sft", tmp_path, **keys | {"model.resize_embeddings": True})


def test_a_token_that_white_space_would_lose(models):
    with pytest.raises((DataError, ModelError), match="white space around it"):
        opened(models.base, add_tokens=["<new> "])
