# SPDX-License-Identifier: Apache-2.0
"""Every stage with LoRA for two steps, on a real small model and on the shape of a real large one;
what comes out is read by PEFT on torch, which must compute the same."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import run, write_jsonl

from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.transformer import init_params
from jaxrlhf.models.weights import save_hf

pytestmark = pytest.mark.torch

# Qwen2.5-0.5B's own config.json, of what says its shape.
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPENINGS = ("Once upon a time", "Lily saw a dog", "The ball was red", "Tom was sad")
ENDINGS = (" and they were happy.", " in the park.", ". It was late.", " so he sang.")


@pytest.fixture(scope="module")
def half_a_billion(stories, tmp_path_factory):
    """A folder of that shape with random weights, and the small model's tokenizer."""
    folder = tmp_path_factory.mktemp("large") / "qwen"
    config = config_from_hf(QWEN, "config.json")
    params = jax.jit(lambda key: init_params(key, config, param_dtype="bfloat16"))(
        jax.random.key(0)
    )
    save_hf(folder, params, config, hf_config=QWEN)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / name, folder / name)
    return folder


@pytest.fixture
def rows(tmp_path):
    """What each stage is fed with."""
    asked = [{"prompt": opening} for opening in OPENINGS]
    told = [row | {"completion": end} for row, end in zip(asked, ENDINGS, strict=True)]
    other = ENDINGS[1:] + ENDINGS[:1]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": end}
        for row, end in zip(told, other, strict=True)
    ]
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **columns):\n    return [*map(len, completions)]\n")
    return {
        "sft": {"data.train": str(write_jsonl(tmp_path / "told.jsonl", told))},
        "reward": {"data.train": str(write_jsonl(tmp_path / "pairs.jsonl", pairs))},
        "dpo": {"data.train": str(tmp_path / "pairs.jsonl")},
        "ppo": {
            "data.train": str(write_jsonl(tmp_path / "asked.jsonl", asked)),
            "reward": f"{reward}:length",
            "rl.critic": "shared",
            "rl.minibatches": 1,
            "sampling.max_new_tokens": 8,
        },
    }


def size_said(what, text):
    """Bytes, of what is printed as `what 1,234.5 MB`."""
    found = re.search(rf"{what} ([\d.,]+) (bytes|MB)", text)
    assert found, text
    return float(found[1].replace(",", "")) * {"bytes": 1, "MB": 1e6}[found[2]]


BASES = ["stories", pytest.param("half_a_billion", marks=pytest.mark.slow)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_two_steps_and_what_peft_makes_of_them(stage, base, rows, request, tmp_path, capsys):
    place = request.getfixturevalue(base)
    keys = {
        "model": str(place),
        "model.lora.rank": 4,
        "train.steps": 2,
        "train.batch_size": 4,
        "data.max_length": 32,
        "optim.learning_rate": 1e-3,
    }
    assert run(stage, tmp_path / "run", **keys | rows[stage]).exit_code == 0
    text = capsys.readouterr().out
    tensors = load_file(tmp_path / "run/export/adapter_model.safetensors")
    assert any(np.abs(x).max() > 0 for name, x in tensors.items() if "lora_B" in name)
    # Of a shared critic the value head trains too, and is not exported.
    trained = sum(x.size for x in tensors.values())
    if stage == "ppo":
        config = json.loads((place / "config.json").read_text())
        trained += config["hidden_size"] + 1
    said = re.search(r"([\d,]+) of [\d,]+ parameters train;", text)
    assert said, text
    assert int(said[1].replace(",", "")) == trained
    moments = 2 * 4 * trained
    assert moments <= size_said("optimizer", text) <= 1.001 * moments + 64
    assert size_said("peak memory", text) > sum(
        p.stat().st_size for p in place.glob("*.safetensors")
    )

    assert run(
        "export", tmp_path / "peft", **{"model.path": str(tmp_path / "run"), "format": "peft"}
    )
    found = re.search(r"PEFT computes the same .* within (.*)", capsys.readouterr().out)
    assert found
    assert float(found[1]) < 1e-4
