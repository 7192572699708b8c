# SPDX-License-Identifier: Apache-2.0
"""Writes tests/oracles/models: tiny random models as transformers saved them, with its own outputs.

    python tests/models/make_oracles.py

Needs torch and transformers (the parity extra). What it writes is committed, so that a Python
without torch compares with the same truth; torch's seed makes the files reproducible.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "oracles" / "models"

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 37,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (model_type, kind, config.json fields)
CASES: dict[str, tuple[str, str, dict]] = {
    "llama": ("llama", "lm", LLAMA),
    "llama-mha-untied": (
        "llama",
        "lm",
        LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    ),
    "llama-mqa-tied-bias-wide-heads": (
        "llama",
        "lm",
        LLAMA
        | {
            "num_key_value_heads": 1,
            "head_dim": 6,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "llama-llama3-rope": ("llama", "lm", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        "lm",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "gpt2": ("gpt2", "lm", GPT2),
    "gpt2-untied-narrow-mlp": (
        "gpt2",
        "lm",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 20, "activation_function": "gelu"},
    ),
    "gpt2-one-head": ("gpt2", "lm", GPT2 | {"n_head": 1, "activation_function": "relu"}),
    "llama-reward": ("llama", "reward", LLAMA | {"num_labels": 1}),
    "llama-reward-three": ("llama", "reward", LLAMA | {"num_labels": 3}),
    "gpt2-reward": ("gpt2", "reward", GPT2 | {"num_labels": 1}),
}


def make_model(name: str):
    """A random model of transformers in eval mode; biases and norms are random too."""
    import torch
    import transformers

    model_type, kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    torch.manual_seed(sorted(CASES).index(name))
    auto = {
        "lm": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    model = auto.from_config(config).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 or "embed" in key or "wte" in key else 0.3
            offset = 1.0 if ("norm" in key or "ln_" in key) and key.endswith("weight") else 0.0
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    return model


def inputs(seed: int = 0, rows: int = 3, length: int = 14) -> list[list[int]]:
    """Rows of real tokens (3 .. 36, never pad or a special id), of different lengths, EOS last."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        [1, *(int(t) for t in rng.integers(3, 37, length - 2 - 4 * row)), 2] for row in range(rows)
    ]


def expected(model, kind: str) -> dict:
    """What transformers computes on `inputs()`, each row alone: logits, or the row's score."""
    import torch

    out: dict = {"input_ids": inputs()}
    with torch.no_grad():
        each = [model(torch.tensor([row])).logits[0] for row in out["input_ids"]]
        out["logits"] = (
            [[[round(x, 6) for x in t] for t in row.tolist()] for row in each]
            if (kind == "lm")
            else [[round(x, 6) for x in row.tolist()] for row in each]
        )
        if kind == "lm":
            prompt = torch.tensor([out["input_ids"][0][:5]])
            tokens = model.generate(
                prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )
            out["greedy"] = tokens[0, 5:].tolist()
    return out


def main() -> int:
    for name, (_, kind, _) in CASES.items():
        model = make_model(name)
        model.save_pretrained(FOLDER / name)
        text = json.dumps(expected(model, kind), separators=(",", ":"))
        (FOLDER / name / "expected.json").write_text(text + "\n")
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
