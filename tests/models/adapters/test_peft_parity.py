# SPDX-License-Identifier: Apache-2.0
"""Against PEFT on torch, live: adapters go both ways and compute the same logits."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_oracles import CASES, inputs, make_model
from model_rows import CONFIGS, RUNTIME, batch, logits, params, scores

from jaxrlhf.models.adapters.merging import merge
from jaxrlhf.models.adapters.peft import load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.weights import load_hf, save_hf

pytestmark = pytest.mark.torch

ALIKE = 1e-4


def moved(leaves, seed=0, by=0.2):
    """The leaves after some training: no zeros are left but those that fill up smaller ranks."""
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        leaf = np.asarray(leaf)
        if path[-1].key == "lora_scale":
            return leaf
        step = (by * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return np.where(leaf == 0, 0, leaf + step) if path[-1].key == "lora_a" else leaf + step

    found = jax.tree_util.tree_map_with_path(move, leaves)
    for group in found.get("layers", {}).values():
        for own in group.values():
            if "lora_a" in own:  # what fills up smaller ranks stays zero
                own["lora_b"] = own["lora_b"] * (own["lora_a"] != 0).any(1)[..., None]
    return found


def theirs_on(rows, model):
    import torch

    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].numpy() for row in rows]


def compare(tree, config, rows, want):
    got = logits(tree, config, RUNTIME, *batch(rows))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i, : len(row)], want[i], atol=ALIKE)
    return np.asarray(got)


OURS = {
    "lora on everything": ("llama", AdapterSpec(rank=3, alpha=5)),
    "lora on q and down": ("llama", AdapterSpec(rank=2, targets=("q", "down_proj"))),
    "rslora, patterns": (
        "llama",
        AdapterSpec(
            rank=4,
            alpha=6,
            rslora=True,
            targets=("q_proj", "v", "o", "up"),
            rank_pattern={"o": 2, r"layers\.1\.self_attn\.v_proj": 3},
            alpha_pattern={"up": 1.5},
        ),
    ),
    "norms and embedding whole": (
        "llama-untied",
        AdapterSpec(
            rank=2,
            targets=("k",),
            modules_to_save=("embed_tokens", "lm_head", "post_attention_layernorm", "model.norm"),
        ),
    ),
    "gpt2, everything": ("gpt2", AdapterSpec(rank=3, alpha=5)),
    "gpt2, the fused matrix": ("gpt2", AdapterSpec(rank=2, targets=("c_attn",))),
    "gpt2, one c_proj": ("gpt2", AdapterSpec(rank=2, targets=("attn.c_proj", "up"))),
    "gpt2, a norm": ("gpt2", AdapterSpec(rank=2, targets=("qkv",), modules_to_save=("ln_1",))),
    "dora": ("llama", AdapterSpec(kind="dora", rank=3)),
    "gpt2, dora": ("gpt2", AdapterSpec(kind="dora", rank=3)),
    "ia3": ("llama", AdapterSpec(kind="ia3")),
    "gpt2, ia3": ("gpt2", AdapterSpec(kind="ia3")),
}


def base(name):
    """(config, parameters) of a random base."""
    if name != "llama-untied":
        return CONFIGS[name], {k: x for k, x in params(name).items() if k != "value"}
    config = dataclasses.replace(CONFIGS["llama"], tie_embeddings=False)
    rng = np.random.default_rng(3)
    head = {"kernel": rng.standard_normal((16, 37)).astype(np.float32)}
    tree = {k: x for k, x in params("llama").items() if k != "value"}
    return config, tree | {"lm_head": head}


@pytest.mark.parametrize("case", OURS)
def test_peft_computes_what_our_adapter_does(case, tmp_path):
    import peft
    import transformers

    family, spec = OURS[case]
    config, tree = base(family)
    save_hf(tmp_path / "base", tree, config, hf_config={"bos_token_id": 1, "eos_token_id": 2})
    adapter = resolve(spec, config)
    started = join(init_adapter(jax.random.key(0), adapter, tree, "float32"), tree)
    trained, frozen = adapter.split(started)
    trained = moved(trained)
    whole = join(trained, frozen)
    save_adapter(
        tmp_path / "adapter",
        whole,
        adapter,
        config,
        kind="lm",
        base=str(tmp_path / "base"),
        base_content="x",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    rows = inputs(seed=3)
    plain = theirs_on(rows, model)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    want = theirs_on(rows, theirs)
    compare(whole, config, rows, want)
    compare(merge(whole), config, rows, want)
    assert max(abs(a - b).max() for a, b in zip(want, plain, strict=True)) > 0.05  # it does much
    own = sum(p.numel() for n, p in theirs.named_parameters() if "lora" in n or "ia3" in n)
    assert adapter.count() == own

    back = load_adapter(tmp_path / "adapter", config, tree, kind="lm")
    assert back.base_content == "x"
    assert back.adapter.same_shape(adapter)
    again, _ = adapter.split(back.adapter.on(tree, back.leaves))
    jax.tree.map(np.testing.assert_array_equal, again, trained)


THEIRS = {
    "llama": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "llama-mqa-tied-bias-wide-heads": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*\.(q_proj|v_proj|down_proj)",
        "use_rslora": True,
    },
    "llama-mha-untied": {
        "r": 4,
        "target_modules": ["k_proj", "o_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 5},
        "modules_to_save": ["lm_head", "norm"],
    },
    "gpt2": {"r": 3, "target_modules": ["c_attn"]},
    "gpt2-untied-narrow-mlp": {"r": 2, "target_modules": "all-linear", "use_dora": True},
    "llama-linear-rope": {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "gpt2-one-head": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["c_fc"]},
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_pefts_adapter_does(name, tmp_path):
    import peft

    model = make_model(name)
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **THEIRS[name])
    check_theirs(name, model, settings, tmp_path)


def test_we_compute_what_pefts_ia3_does(tmp_path):
    import peft

    for name in ("llama", "gpt2"):
        model = make_model(name)
        model.save_pretrained(tmp_path / name / "base")
        settings = peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)
        check_theirs(name, model, settings, tmp_path / name)


def check_theirs(name, model, settings, folder):
    import peft
    import torch

    torch.manual_seed(5)
    theirs = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder / "adapter")
    ours = load_hf(folder / "base")
    found = load_adapter(folder / "adapter", ours.config, ours.params, kind=CASES[name][1])
    whole = found.adapter.on(ours.params, found.leaves)
    rows = inputs(seed=4)
    compare(whole, ours.config, rows, theirs_on(rows, theirs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reward_models_go_both_ways(name, tmp_path):
    import peft
    import transformers

    config, tree = base(name)
    hf = {"eos_token_id": 2, "pad_token_id": 0}
    save_hf(tmp_path / "base", tree, config, hf_config=hf)
    adapter = resolve(AdapterSpec(rank=2), config, heads=("score",))
    whole = {key: value for key, value in tree.items() if key not in ("value", "lm_head")}
    whole = join(init_adapter(jax.random.key(0), adapter, whole, "float32"), whole)
    trained, frozen = adapter.split(whole)
    whole = join(moved(trained), frozen)
    save_adapter(
        tmp_path / "ours", whole, adapter, config, kind="reward", base=str(tmp_path / "base")
    )
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())[
        "modules_to_save"
    ] == ["score"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    rows = inputs(seed=5)
    want = np.stack(theirs_on(rows, theirs))
    np.testing.assert_allclose(scores(whole, config, RUNTIME, *batch(rows)), want, atol=ALIKE)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tmp_path / "theirs", config, tree)
    assert back.kind == "reward"
    again = back.adapter.on(tree, back.leaves)
    np.testing.assert_allclose(scores(again, config, RUNTIME, *batch(rows)), want, atol=ALIKE)
