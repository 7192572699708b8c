# SPDX-License-Identifier: Apache-2.0
"""Adapters against float64 NumPy and against themselves merged; what starts at the base's bits."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model_rows import (
    CONFIGS,
    MOST,
    RUNTIME,
    assert_same_bits,
    batch,
    logits,
    params,
    random_rows,
    rounding,
)

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.merging import merge, unmerge
from jaxrlhf.models.adapters.modules import projections
from jaxrlhf.models.adapters.peft import load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join, places, split, with_dropout
from jaxrlhf.models.transformer import decode_step, prefill, split_layers

KINDS = ("lora", "dora", "ia3")
ROWS = batch(random_rows(1, (9, 5)))


def adapter_of(name, kind="lora", **keys):
    return resolve(AdapterSpec(kind=kind, **({"rank": 3} if kind != "ia3" else {}) | keys), name)


def started(name, kind="lora", **keys):
    """(adapter, base, base with the adapter's leaves as they start)."""
    adapter = adapter_of(CONFIGS[name], kind, **keys)
    base = {key: leaf for key, leaf in params(name).items() if key not in ("score", "value")}
    return adapter, base, join(init_adapter(jax.random.key(0), adapter, base, "float32"), base)


def trained(name, kind="lora", **keys):
    """The same with random leaves."""
    adapter, base, whole = started(name, kind, **keys)
    own, frozen = adapter.split(whole)
    rng = np.random.default_rng(1)
    own = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), own)
    return adapter, base, join(own, frozen)


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base(name, kind):
    _, base, whole = started(name, kind)

    def compute(tree):
        return logits(tree, CONFIGS[name], RUNTIME, *ROWS)

    before, after = compute(base), compute(whole)
    # DoRA's magnitudes over its norms are one up to rounding; a norm of q and k is fused with what
    # comes before it, and adds up in another order.
    if kind == "dora" or CONFIGS[name].qk_norm != "none":
        np.testing.assert_allclose(before, after, rtol=0, atol=2 * rounding(base, compute))
    else:
        assert_same_bits(before, after)


def float64_merged(leaves):
    """W as the papers write it, from one projection's leaves in float64."""
    x = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    w = x["kernel"]
    if "lora_b" in x:
        w = w + x["lora_scale"][:, None, None] * np.einsum("lir,lro->lio", x["lora_a"], x["lora_b"])
    if "dora_m" in x:
        w = x["dora_m"][:, None] * w / np.linalg.norm(w, axis=1, keepdims=True)
    w = w * x.get("ia3_in", np.ones(w.shape[:2]))[:, :, None]
    return w * x.get("ia3_out", np.ones((w.shape[0], w.shape[2])))[:, None]


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_papers_matrix_and_computes_the_same(name, kind):
    adapter, base, whole = trained(name, kind)
    merged = merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for placed in adapter.placed:
        for part in placed.module.parts:
            group, last = part.split("/")[1:]
            own = dict(whole["layers"][group][last])
            if "lora_b" in own and "lora_a" not in own:  # gpt2's one matrix has one A
                own["lora_a"] = whole["layers"]["attention"]["q"]["lora_a"]
            want = float64_merged(own)
            got = np.asarray(merged["layers"][group][last]["kernel"], np.float64)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    ours, theirs = (logits(tree, CONFIGS[name], RUNTIME, *ROWS) for tree in (whole, merged))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - logits(base, CONFIGS[name], RUNTIME, *ROWS)).max() > 0.1


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_unmerged_it_is_the_base_up_to_rounding(name, kind):
    _, base, whole = trained(name, kind)
    own, _ = split(whole, lambda path: path[-1] not in ("kernel", "bias"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        unmerge(merge(whole), own),
        base,
    )
    _, _, dora = trained(name, "dora")
    with pytest.raises(ValueError, match="DoRA"):
        unmerge(merge(dora), dora)


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("fuse", [True, False])
def test_cached_decoding_is_the_full_forward_pass(name, fuse):
    """Decoding merges first, and fuses q, k, v of what is merged."""
    _, _, whole = trained(name)
    config, runtime = CONFIGS[name], dataclasses.replace(RUNTIME, fuse=fuse)
    tokens, positions, segments = (jnp.asarray(x) for x in batch(random_rows(4, (7, 7))))
    full = logits(whole, config, runtime, tokens, positions, segments)

    @jax.jit
    def cached(params):
        params = split_layers(params, config, runtime)
        assert ("qkv" in params["layers"][0]["attention"]) == fuse
        assert not places({"x": dict(enumerate(params["layers"]))}, "lora_b")
        cut = (tokens[:, :4], positions[:, :4], segments[:, :4])
        _, cache = prefill(params, config, runtime, *cut, 7)
        mask = jnp.ones((2, 7), bool)
        found = []
        for t in (4, 5, 6):
            at = (tokens[:, t], positions[:, t])
            hidden, cache = decode_step(params, config, runtime, *at, cache, jnp.int32(t), mask)
            found.append(hidden)
        return jnp.stack(found, 1)

    from jaxrlhf.models import heads

    got = heads.logits(whole, config, cached(whole))
    np.testing.assert_allclose(got, full[:, 4:], atol=1e-4)


def test_smaller_ranks_are_filled_with_zeros_that_no_gradient_reaches():
    adapter, _, whole = started("llama", rank_pattern={r"layers\.1\..*": 1})
    assert {placed.ranks for placed in adapter.placed} == {(3, 1)}
    own, frozen = adapter.split(whole)
    # B moves where it may; the rest of it multiplies columns of A that are zero.
    grads = jax.grad(
        lambda own: (logits(join(own, frozen), CONFIGS["llama"], RUNTIME, *ROWS) ** 2).sum()
    )(own)
    for group, part in (("attention", "q"), ("mlp", "down")):
        g = grads["layers"][group][part]["lora_b"]
        assert np.abs(g[1, 1:]).max() == 0 < np.abs(g[1, 0]).max()
        assert np.abs(own["layers"][group][part]["lora_a"][1, :, 1:]).max() == 0
    step = jax.tree.map(lambda x, g: x - 0.1 * g, own, grads)
    grads = jax.grad(
        lambda own: (logits(join(own, frozen), CONFIGS["llama"], RUNTIME, *ROWS) ** 2).sum()
    )(step)
    assert np.abs(grads["layers"]["attention"]["q"]["lora_a"][1, :, 1:]).max() == 0
    assert np.abs(grads["layers"]["attention"]["q"]["lora_a"][1, :, 0]).max() > 0
    total = sum(x.size for x in jax.tree.leaves(own))
    assert adapter.count() == total - adapter.filled()


def test_dropout_keeps_the_mean_and_differs_by_key_layer_and_projection():
    _, _, whole = trained("llama")
    config = CONFIGS["llama"]
    plain = np.asarray(logits(whole, config, RUNTIME, *ROWS))
    one, again, two = (
        np.asarray(logits(with_dropout(whole, jax.random.key(k), 0.3), config, RUNTIME, *ROWS))
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-2
    assert np.abs(one - plain).max() > 1e-2
    keyed = with_dropout(whole, jax.random.key(0), 0.3)
    found = [
        tuple(key)
        for group in ("attention", "mlp")
        for leaves in keyed["layers"][group].values()
        for key in np.asarray(leaves["dropout_key"])
    ]
    assert len(set(found)) == len(found) == 2 * 7
    from jaxrlhf.models.adapters.apply import dropped

    leaves = {
        "dropout_key": jax.random.key_data(jax.random.key(3)),
        "dropout_keep": jnp.float32(0.75),
    }
    x = dropped(jnp.ones((400, 100)), leaves)
    np.testing.assert_allclose(x.mean(), 1, atol=0.01)
    assert set(np.unique(x)) == {0, np.float32(1 / 0.75)}


def test_several_adapters_are_swapped_on_one_base_without_compiling_again():
    one, base, first = trained("llama")
    config = CONFIGS["llama"]
    trees = {"first": split(first, one.trains)[0]}
    trees["second"] = jax.tree.map(lambda x: -2 * x, trees["first"])
    made = 0

    @jax.jit
    def program(tree):
        nonlocal made
        made += 1
        return logits(tree, config, RUNTIME, *ROWS)

    said = {}
    for name, own in trees.items():
        whole = one.on(base, join(own, one.constants()))
        assert whole["layers"]["mlp"]["up"]["kernel"] is base["layers"]["mlp"]["up"]["kernel"]
        said[name] = program(whole)
    assert made == 1
    np.testing.assert_allclose(said["first"], program(first), atol=1e-6)
    assert np.abs(said["first"] - said["second"]).max() > 0.1


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_bits_back(name, kind, tmp_path):
    keys = {"modules_to_save": ("model.norm",)} if name == "llama" and kind == "lora" else {}
    if kind == "lora":
        keys["rank_pattern"] = {r"(layers|h)\.0\..*": 2}
    adapter, base, whole = started(name, kind, **keys)
    own, frozen = adapter.split(whole)
    own = jax.tree.map(lambda x: x * 3, own)
    whole = join(own, frozen)
    if keys.get("modules_to_save"):
        np.testing.assert_array_equal(whole["final_norm"]["scale"], 3 * base["final_norm"]["scale"])
    save_adapter(tmp_path, whole, adapter, CONFIGS[name], kind="lm", base="somewhere")
    back = load_adapter(tmp_path, CONFIGS[name], base)
    assert back.adapter.same_shape(adapter)
    assert back.kind == "lm"
    want, _ = split(whole, adapter.trains)
    assert_same_bits(split(back.leaves, adapter.trains)[0], want)
    assert_same_bits(
        back.leaves["layers"],
        split(whole, lambda p: p[0] == "layers" and p[-1] not in ("kernel", "bias", "scale"))[0][
            "layers"
        ],
    )


def test_targets_are_told_as_peft_tells_them():
    found = {name: [m.ours for m in projections(c)] for name, c in CONFIGS.items()}
    assert found == {
        "llama": ["q", "k", "v", "o", "gate", "up", "down"],
        "gpt2": ["qkv", "o", "up", "down"],
        "gemma3": ["q", "k", "v", "o", "gate", "up", "down"],
        "mixtral": ["q", "k", "v", "o"],  # neither the router nor its experts
    }

    def chosen(name, *targets):
        return [p.module.ours for p in adapter_of(CONFIGS[name], targets=targets).placed]

    assert chosen("gpt2", "c_proj") == ["o", "down"]
    assert chosen("gpt2", "attn.c_proj", "up") == ["o", "up"]
    assert chosen("llama", "q_proj", "mlp.down_proj", "v") == ["q", "v", "down"]
    assert chosen("llama", "all-linear") == chosen("llama") == found["llama"]
    with pytest.raises(ConfigError, match=r"lm_head.*there are q"):
        chosen("llama", "lm_head")
    with pytest.raises(ConfigError, match=r"'q' names nothing in this model.*qkv .c_attn."):
        chosen("gpt2", "q")
    with pytest.raises(ConfigError, match="either whole or by an adapter"):
        adapter_of(CONFIGS["llama"], modules_to_save=("q_proj",))


@pytest.mark.parametrize("by_head", [False, True])
def test_parts_of_one_matrix_are_gathered_and_divided(by_head):
    module = dataclasses.replace(projections(CONFIGS["gpt2"])[0], by_head=by_head)
    pieces = [np.full((2, 16), n) + np.arange(16) // 4 * 10 for n in range(3)]
    whole = module.gather(pieces, 4)
    first = whole[0, ::4].tolist()  # of each head
    in_order = [0, 10, 20, 30, 1, 11, 21, 31, 2, 12, 22, 32]
    assert first == (sorted(in_order) if by_head else in_order)
    for got, want in zip(module.divide(whole, 4), pieces, strict=True):
        np.testing.assert_array_equal(got, want)
