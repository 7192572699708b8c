# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts: against the merged matrices in float64, and against PEFT on torch."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model_rows import MIXTRAL, RUNTIME, assert_same_bits, batch, logits, params, random_rows

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.merging import merge, unmerge
from jaxrlhf.models.adapters.peft import load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join, split

ROWS = random_rows(2, (9, 6))


def trained(base, config=MIXTRAL, **keys):
    """(adapter, the base with the adapter's leaves as they start, and with random ones)."""
    adapter = resolve(AdapterSpec(**keys), config)
    make = jax.jit(lambda: init_adapter(jax.random.key(0), adapter, {}, "float32"))
    started = join(make(), base)
    own, frozen = adapter.split(started)
    rng = np.random.default_rng(1)

    def move(path, x):
        step = 0.2 * rng.standard_normal(x.shape).astype(np.float32)
        return np.where(x == 0, 0, x + step) if path[-1].key == "lora_a" else x + step

    own = jax.tree_util.tree_map_with_path(move, own)
    for group in own["layers"].values():
        for leaves in group.values():
            if "lora_a" in leaves:  # what fills up smaller ranks stays zero
                real = (np.asarray(leaves["lora_a"]) != 0).any(-2)[..., None]
                for other in group.values():
                    if other["lora_b"].ndim == real.ndim and (other is leaves or real.ndim == 4):
                        other["lora_b"] = np.where(real, other["lora_b"], 0)
    return adapter, started, join(own, frozen)


def base():
    return {key: leaf for key, leaf in params("mixtral").items() if key not in ("score", "value")}


def test_it_starts_as_the_base_and_is_the_papers_matrix_expert_by_expert():
    tree = base()
    adapter, started, whole = trained(tree, rank=2, alpha=3, targets=("experts", "q"))
    rows = batch(ROWS)
    before = logits(tree, MIXTRAL, RUNTIME, *rows)
    assert_same_bits(before, logits(started, MIXTRAL, RUNTIME, *rows))
    merged = merge(whole)
    experts = whole["layers"]["experts"]
    assert set(experts["up"]) == {"kernel", "lora_b", "lora_scale"}
    for name in ("gate", "up", "down"):
        x = {key: np.asarray(leaf, np.float64) for key, leaf in experts[name].items()}
        a = np.asarray(experts["gate" if name == "up" else name]["lora_a"], np.float64)
        want = x["kernel"] + 1.5 * np.einsum("leir,lero->leio", a, x["lora_b"])
        got = merged["layers"]["experts"][name]["kernel"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    after = logits(whole, MIXTRAL, RUNTIME, *rows)
    np.testing.assert_allclose(after, logits(merged, MIXTRAL, RUNTIME, *rows), atol=1e-4)
    assert np.abs(after - before).max() > 0.1
    own, _ = split(whole, lambda path: path[-1] != "kernel")
    for a, b in zip(
        jax.tree.leaves(unmerge(merged, own)["layers"]["experts"]),
        jax.tree.leaves(tree["layers"]["experts"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # 4 experts x 2 layers: gate and up share A.
    assert adapter.count() == 2 * 2 * (4 * (16 + 24 + 12 + 16) + 16 + 16)


def test_experts_are_adapted_only_where_they_are_named():
    adapter = resolve(AdapterSpec(rank=4), MIXTRAL)
    assert not any(placed.module.experts for placed in adapter.placed)
    both = resolve(AdapterSpec(rank=4, targets=("all-linear", "experts")), MIXTRAL)
    assert len(both.placed) == len(adapter.placed) + 2
    for keys, message in (
        ({"kind": "dora"}, "kind = dora: on experts"),
        ({"kind": "ia3"}, "kind = ia3: on experts"),
        ({"dropout": 0.1}, r"dropout = 0\.1: on experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(AdapterSpec(**{"rank": 2} | keys, targets=("experts",)), MIXTRAL)


CASES = {
    "all experts' parameters": {"rank": 2, "alpha": 3, "targets": ("experts",)},
    "with attention": {"rank": 3, "targets": ("q", "v", "experts"), "rslora": True},
    "down alone": {"rank": 2, "targets": ("experts.down_proj",)},
    "gate and up alone, ranks": {
        "rank": 3,
        "targets": ("gate_up_proj", "o"),
        "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 1},
    },
    "qwen3_moe": {"rank": 2, "targets": ("k", "experts")},
}
FAST = "with attention"


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    [c if c == FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_peft_computes_the_same_and_folders_keep_every_bit(case, tmp_path):
    import peft
    import torch
    import transformers
    from make_oracles import make_model

    from jaxrlhf.models.weights import load_hf

    name = "qwen3-moe" if case == "qwen3_moe" else "mixtral"
    make_model(name).save_pretrained(tmp_path / "base")
    ours = load_hf(tmp_path / "base")
    adapter, _, whole = trained(ours.params, ours.config, **CASES[case])
    where = str(tmp_path / "base")
    save_adapter(tmp_path / "a", whole, adapter, ours.config, kind="lm", base=where)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
    assert adapter.count() == sum(p.numel() for n, p in theirs.named_parameters() if "lora" in n)
    got = logits(whole, ours.config, RUNTIME, *batch(ROWS))
    plain = logits(ours.params, ours.config, RUNTIME, *batch(ROWS))
    assert np.abs(got - plain).max() > 0.02
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            want = theirs(torch.tensor([row])).logits[0].numpy()
            np.testing.assert_allclose(got[i, : len(row)], want, atol=1e-4)
    back = load_adapter(tmp_path / "a", ours.config, ours.params)
    assert back.adapter == adapter
    assert_same_bits(back.adapter.split(back.leaves)[0], adapter.split(whole)[0])

    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", ours.config, ours.params)
    assert_same_bits(again.adapter.split(again.leaves)[0], adapter.split(whole)[0])
