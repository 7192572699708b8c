# SPDX-License-Identifier: Apache-2.0
"""Exported folders beside transformers and PEFT on torch: the check that `export` makes itself."""

import re

import pytest
from safetensors.numpy import load_file, save_file
from tiny import read_jsonl, run

from jaxrlhf.errors import ModelError
from jaxrlhf.stages import export

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def tuned(tiny, models, tmp_path_factory):
    """A policy and a reward model that are adapters."""
    folder = tmp_path_factory.mktemp("tuned")
    for stage in ("sft", "reward"):
        keys = tiny.settings(stage, models) | {"model.lora.rank": 2, "train.steps": 1}
        assert run(stage, folder / stage, **keys).exit_code == 0
    return folder


@pytest.mark.parametrize("form", ["hf", "peft"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_they_compute_the_same(stage, form, tuned, tmp_path, capsys):
    keys = {"model.path": str(tuned / stage), "format": form}
    assert run("export", tmp_path, **keys).exit_code == 0
    who, what = "PEFT" if form == "peft" else "transformers", "scores" if stage == "reward" else ""
    found = re.search(
        rf"export: {who} computes the same {what}.* within (.*)", capsys.readouterr().out
    )
    assert float(found[1]) < 1e-4
    assert f"- {found[0].removeprefix('export: ')}" in (tmp_path / "export/README.md").read_text()


def test_transformers_generates_what_we_do(models, tmp_path):
    import torch
    import transformers

    folder = models.base / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = "My order is late"
    keys = {"model": str(models.base), "prompt": [prompt]}
    greedy = {"sampling.max_new_tokens": 12, "sampling.temperature": 0, "sampling.stop": []}
    assert run("generate", tmp_path, **keys | greedy).exit_code == 0
    [row] = read_jsonl(tmp_path / "completions.jsonl")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert row["token_ids"] == found[0, ids.shape[1] :].tolist()


def test_a_folder_that_computes_something_else_is_refused(models, tmp_path, monkeypatch):
    save = export.save_hf

    def spoiled(folder, *arguments, **keys):
        save(folder, *arguments, **keys)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        save_file(tensors | {name: -tensors[name]}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export, "save_hf", spoiled)
    # The first check sees it; without it the second does.
    keys = {"model.path": str(models.base)}
    with pytest.raises(ModelError, match="differ when read back"):
        run("export", tmp_path / "a", **keys)
    monkeypatch.setattr(export, "content_digest", lambda tree: 0)
    with pytest.raises(ModelError, match="transformers computes log-probs that are off by"):
        run("export", tmp_path / "b", **keys)
    assert not (tmp_path / "b" / "export").exists()
    assert run("export", tmp_path / "c", **keys, check=False).exit_code == 0
