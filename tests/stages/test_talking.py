# SPDX-License-Identifier: Apache-2.0
"""Where texts end: which tokens end them, what keeps them, and what chats add."""

import json

import pytest
from tiny import run

from jaxrlhf.config.stages import STAGES
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages.models import open_model

MARKERS = ["<|im_start|>", "<|im_end|>"]
FEW = {"train.steps": 1, "train.batch_size": 8, "data.max_length": 32}


def opened(place, **keys):
    section = STAGES["generate"].model_validate({"model": str(place), "prompt": ["x"]}).model
    with use_mesh(make_mesh()) as mesh:
        return open_model(section, mesh, frozen=True, **keys)


def written(folder):
    """The ends that a folder's two files name."""
    names = ("config.json", "generation_config.json")
    return [json.loads((folder / name).read_text()).get("eos_token_id") for name in names]


@pytest.fixture(scope="module")
def base(models, tmp_path_factory):
    """A language model with the markers of chatml and two ends, of which config.json knows one."""
    folder = tmp_path_factory.mktemp("ends")
    keys = {"model.add_tokens": MARKERS, "model.resize_embeddings": True}
    assert run("export", folder, **{"model.path": str(models.base)} | keys).exit_code == 0
    file = folder / "export" / "generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"eos_token_id": [said["eos_token_id"], 17]}))
    return folder / "export"


def test_ends_that_only_generation_config_knows_outlive_every_stage(tiny, base, tmp_path):
    ends = list(opened(base).stop_ids)
    assert len(ends) == 2
    texts = {"model": str(base), "data.train": str(tiny.demonstrations)}
    assert run("sft", tmp_path / "sft", **texts | FEW).exit_code == 0
    assert written(tmp_path / "sft/export") == [ends, ends]
    (tmp_path / "sft/export").rename(tmp_path / "aside")
    assert opened(tmp_path / "sft").stop_ids == tuple(ends), "from a checkpoint"
    pairs = {"model": str(tmp_path / "sft"), "data.train": str(tiny.pairs)}
    assert run("dpo", tmp_path / "dpo", **pairs | FEW).exit_code == 0
    assert written(tmp_path / "dpo/export") == [ends, ends]
    assert run("export", tmp_path / "again", model=str(base)).exit_code == 0
    assert written(tmp_path / "again/export") == [ends, ends]
    template = opened(tmp_path / "sft").tokenizer.chat_template
    assert template is None, "texts have no template"
