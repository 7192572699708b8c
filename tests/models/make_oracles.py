# SPDX-License-Identifier: Apache-2.0
"""Writes tests/oracles/models: tiny random models as transformers saved them, with its own outputs.

    python tests/models/make_oracles.py

Needs torch and transformers (the parity extra). What it writes is committed, so that a Python
without torch compares with the same truth; torch's seed makes the files reproducible.
"""

import json
import sys
import zlib
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
BASE = LLAMA | {"rms_norm_eps": 1e-5}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 8}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.3]}
LONG |= {"long_factor": [2.0, 5.0], "original_max_position_embeddings": 12}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
SOFT = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
NEAR_FAR = ["sliding_attention", "full_attention"]
# name -> (model_type, kind, config.json fields). Windows are shorter than the rows of `inputs`.
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
    "llama-dynamic-rope": (
        "llama",
        "lm",
        LLAMA
        | {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
        },
    ),
    "mistral": ("mistral", "lm", BASE | {"sliding_window": 4}),
    "mistral-mha-tied-no-window": (
        "mistral",
        "lm",
        BASE | {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mistral-wide-heads": ("mistral", "lm", BASE | {"sliding_window": 7, "head_dim": 6}),
    "qwen2": ("qwen2", "lm", BASE),
    "qwen2-tied-yarn": (
        "qwen2",
        "lm",
        BASE | {"tie_word_embeddings": True, "rope_parameters": YARN, "num_key_value_heads": 1},
    ),
    "qwen2-late-window": (
        "qwen2",
        "lm",
        BASE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "lm", BASE | {"head_dim": 6}),
    "qwen3-tied-bias": (
        "qwen3",
        "lm",
        BASE | {"head_dim": 4, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-mha-late-window": (
        "qwen3",
        "lm",
        BASE
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        | {"num_key_value_heads": 4, "head_dim": 6},
    ),
    "gemma": ("gemma", "lm", BASE | {"head_dim": 6}),
    "gemma-mqa": ("gemma", "lm", BASE | {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma-untied-bias": (
        "gemma",
        "lm",
        BASE | {"head_dim": 4, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma2": ("gemma2", "lm", BASE | SOFT | {"head_dim": 6, "sliding_window": 4}),
    "gemma2-far-near": (
        "gemma2",
        "lm",
        BASE
        | {"head_dim": 6, "sliding_window": 5, "layer_types": NEAR_FAR[::-1]}
        | {"query_pre_attn_scalar": 7},
    ),
    "gemma2-no-caps": (
        "gemma2",
        "lm",
        BASE
        | {"head_dim": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"num_key_value_heads": 4},
    ),
    "gemma3": (
        "gemma3_text",
        "lm",
        BASE | {"head_dim": 6, "sliding_window": 4, "layer_types": NEAR_FAR},
    ),
    "gemma3-pattern-linear": (
        "gemma3_text",
        "lm",
        BASE
        | {"head_dim": 6, "sliding_window": 3, "num_hidden_layers": 7}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "gemma3-capped-untied": (
        "gemma3_text",
        "lm",
        BASE
        | {"head_dim": 4, "sliding_window": 6, "layer_types": NEAR_FAR}
        | {"final_logit_softcapping": 3.0}
        | {"tie_word_embeddings": False, "num_key_value_heads": 1},
    ),
    "phi3": ("phi3", "lm", BASE),
    "phi3-longrope": (
        "phi3",
        "lm",
        BASE | {"rope_parameters": LONG, "original_max_position_embeddings": 12},
    ),
    "phi3-partial-window": (
        "phi3",
        "lm",
        BASE
        | {"hidden_size": 32, "sliding_window": 5, "num_key_value_heads": 4}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "olmo2": ("olmo2", "lm", BASE),
    "olmo2-mha-tied": (
        "olmo2",
        "lm",
        BASE | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "olmo2-bias-yarn": (
        "olmo2",
        "lm",
        BASE | {"attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN},
    ),
    "smollm3": (
        "smollm3",
        "lm",
        BASE | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "smollm3-interval-untied": (
        "smollm3",
        "lm",
        BASE | {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
    ),
    "smollm3-window": (
        "smollm3",
        "lm",
        BASE
        | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}
        | {"use_sliding_window": True, "sliding_window": 4, "mlp_bias": True},
    ),
    "mixtral": ("mixtral", "lm", BASE | MOE),
    "mixtral-one-expert-tied": (
        "mixtral",
        "lm",
        BASE | MOE | {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "mixtral-window": ("mixtral", "lm", BASE | MOE | {"sliding_window": 5, "head_dim": 6}),
    "qwen3-moe": ("qwen3_moe", "lm", BASE | QWEN_MOE),
    "qwen3-moe-normed": (
        "qwen3_moe",
        "lm",
        BASE | QWEN_MOE | {"norm_topk_prob": True, "num_experts_per_tok": 3},
    ),
    "qwen3-moe-mha-tied": (
        "qwen3_moe",
        "lm",
        BASE | QWEN_MOE | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "gpt-neox": ("gpt_neox", "lm", NEOX | {"hidden_size": 32}),
    "gpt-neox-sequential": (
        "gpt_neox",
        "lm",
        NEOX | {"hidden_size": 32, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "gpt-neox-whole-heads-no-bias": (
        "gpt_neox",
        "lm",
        NEOX
        | {
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            },
        },
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
    "gemma2-reward": (
        "gemma2",
        "reward",
        BASE | {"head_dim": 6, "sliding_window": 4, "num_labels": 1},
    ),
    "gpt-neox-reward": ("gpt_neox", "reward", NEOX | {"hidden_size": 32, "num_labels": 1}),
}


def make_model(name: str):
    """A random model of transformers in eval mode; biases and norms are random too."""
    import torch
    import transformers

    model_type, kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    torch.manual_seed(zlib.crc32(name.encode()))
    auto = {
        "lm": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    model = auto.from_config(config).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 or "embed" in key or "wte" in key else 0.3
            scale = ("norm" in key or "ln_" in key) and key.endswith("weight")
            offset = 1.0 if scale and not model_type.startswith("gemma") else 0.0
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
        # Shortest first: after a long row transformers keeps the frequencies of dynamic scaling.
        each = [model(torch.tensor([row])).logits[0] for row in out["input_ids"][::-1]][::-1]
        out["logits"] = (
            [[[round(x, 6) for x in t] for t in row.tolist()] for row in each]
            if (kind == "lm")
            else [[round(x, 6) for x in row.tolist()] for row in each]
        )
        if kind == "lm":
            prompt = torch.tensor([out["input_ids"][0][:5]])
            # Without its cache: with it, keys keep the angles of when their row was shorter.
            tokens = model.generate(
                prompt,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                use_cache=False,
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
