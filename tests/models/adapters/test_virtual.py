# SPDX-License-Identifier: Apache-2.0
"""Soft prompts, prefixes and bottlenecks: against the base reading the same text, and float64."""

import json
import math
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model_rows import CONFIGS, LLAMA, RUNTIME, assert_same_bits, batch, logits, params, random_rows

from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models import heads
from jaxrlhf.models.adapters.peft import adapter_of, load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.adapters.virtual import virtual_tokens
from jaxrlhf.models.transformer import decode_step, prefill, split_layers

SPECS = {
    "soft_prompt": AdapterSpec(kind="soft_prompt", virtual_tokens=5),
    "prefix": AdapterSpec(kind="prefix", virtual_tokens=5),
    "bottleneck": AdapterSpec(kind="bottleneck", width=3),
}
VIRTUAL = ("soft_prompt", "prefix")
SLOW = pytest.mark.slow
OTHERS = [name for name in CONFIGS if name != "gemma3"]
TEXT = (7, 11, 4)  # repeated to 5 tokens
ROWS = random_rows(2, (9, 6))


@lru_cache
def started(name, kind):
    """(adapter, base, base with the adapter's leaves as they start)."""
    config = CONFIGS[name]
    adapter = resolve(SPECS[kind], config)
    base = {key: leaf for key, leaf in params(name).items() if key not in ("score", "value")}

    @jax.jit
    def make(base):
        key = jax.random.key(0)
        return init_adapter(key, adapter, base, "float32", config=config, text=TEXT)

    return adapter, base, join(make(base), base)


def trained(name, kind):
    """The same with random leaves."""
    adapter, base, whole = started(name, kind)
    own, frozen = adapter.split(whole)
    rng = np.random.default_rng(1)
    own = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), own)
    return adapter, base, join(own, frozen)


def packed():
    """Both rows, each alone and both in one row."""
    tokens, positions, segments = batch([*ROWS, ROWS[0] + ROWS[1]])
    first = len(ROWS[0])
    segments[2, first:], positions[2, first:] = 2, np.arange(len(ROWS[1]))
    return tokens, positions, segments


@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(n, marks=SLOW) for n in OTHERS)])
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_of_a_text_are_that_text_in_front_of_every_segment(kind, name):
    """The base reads the text as tokens; windows and positions count it."""
    _, base, whole = started(name, kind)
    assert virtual_tokens(whole) == 5
    assert virtual_tokens(base) == 0
    text = [TEXT[i % 3] for i in range(5)]
    want = logits(base, CONFIGS[name], RUNTIME, *batch([text + row for row in ROWS]))
    got = logits(whole, CONFIGS[name], RUNTIME, *packed())
    first, second = map(len, ROWS)
    for have, row in ((got[0], 0), (got[1], 1), (got[2], 0), (got[2, first:], 1)):
        length = (first, second)[row]
        np.testing.assert_allclose(have[:length], want[row, 5 : 5 + length], atol=1e-4)


@lru_cache
def cached_logits(name, length, start):
    """A program: logits of the tokens from `start` on, decoded one at a time from a cache."""
    config = CONFIGS[name]

    @jax.jit
    def program(tree, tokens, positions, segments):
        tree = split_layers(tree, config, RUNTIME)
        cut = (tokens[:, :start], positions[:, :start], segments[:, :start])
        _, cache = prefill(tree, config, RUNTIME, *cut, length)
        mask = jnp.ones((len(tokens), length), bool)
        found = []
        for t in range(start, length):
            at = (tokens[:, t], positions[:, t])
            hidden, cache = decode_step(tree, config, RUNTIME, *at, cache, jnp.int32(t), mask)
            found.append(hidden)
        return heads.logits(tree, config, jnp.stack(found, 1))

    return program


@pytest.mark.parametrize("name", ["gemma3", pytest.param("gpt2", marks=SLOW)])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=SLOW if k != "soft_prompt" else ()) for k in SPECS]
)
def test_cached_decoding_is_the_full_forward_pass(kind, name):
    _, base, whole = trained(name, kind)
    rows = [jnp.asarray(x) for x in batch(random_rows(4, (7, 7)))]
    full = logits(whole, CONFIGS[name], RUNTIME, *rows)
    got = cached_logits(name, 7, 5)(whole, *rows)
    np.testing.assert_allclose(got, full[:, 5:], atol=1e-4)
    assert np.abs(full - logits(base, CONFIGS[name], RUNTIME, *rows)).max() > 0.1


def llama64(tree, tokens):
    """Logits [T,V] of the llama of these tests in float64, as the papers have it: pre-norm, grouped
    heads, rotary positions; a prefix in front of the keys, a bottleneck after each branch."""
    c = LLAMA
    t = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    n, size = virtual_tokens(tree), c.head_size
    at = n + np.arange(len(tokens))
    angle = np.outer(at, c.rope_theta ** (-np.arange(0, size, 2) / size))

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * scale

    def turn(x):  # [T, heads, H]
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def narrow(x, own):
        if own is None:
            return x
        h = x @ own["down"]["kernel"] + own["down"]["bias"]
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
        return x + h @ own["up"]["kernel"] + own["up"]["bias"]

    x = t["embed"]["embedding"][tokens]
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[i], t["layers"])  # noqa: B023
        own = layer["attention"]
        h = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (
            (h @ own[name]["kernel"]).reshape(len(tokens), -1, size) for name in ("q", "k", "v")
        )
        q, k = turn(q), turn(k)
        if n:
            k = np.concatenate([own["prefix_k"].reshape(n, -1, size), k])
            v = np.concatenate([own["prefix_v"].reshape(n, -1, size), v])
        k, v = (np.repeat(z, c.num_heads // c.kv_heads, axis=1) for z in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, np.arange(n + len(tokens)) > at[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, v).reshape(len(tokens), -1)
        x = x + narrow(out @ own["o"]["kernel"], layer.get("attention_bottleneck"))
        h, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = h @ mlp["gate"]["kernel"]
        h = gate / (1 + np.exp(-gate)) * (h @ mlp["up"]["kernel"])
        x = x + narrow(h @ mlp["down"]["kernel"], layer.get("mlp_bottleneck"))
    return norm(x, t["final_norm"]["scale"]) @ t["embed"]["embedding"].T


@pytest.mark.parametrize("kind", ["prefix", "bottleneck"])
def test_it_is_the_papers_in_float64(kind):
    _, base, whole = trained("llama", kind)
    rows = batch(ROWS)
    got = logits(whole, LLAMA, RUNTIME, *rows)
    for i, row in enumerate(ROWS):
        np.testing.assert_allclose(got[i, : len(row)], llama64(whole, row), atol=1e-4)
        assert np.abs(llama64(whole, row) - llama64(base, row)).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_a_bottleneck_starts_as_the_base_bit_by_bit(name):
    _, base, whole = started(name, "bottleneck")
    rows = batch(ROWS)
    before, after = (logits(tree, CONFIGS[name], RUNTIME, *rows) for tree in (base, whole))
    if CONFIGS[name].qk_norm == "none":
        assert_same_bits(before, after)
    else:  # fused with the norm before it, which then adds up in another order
        np.testing.assert_allclose(before, after, atol=1e-5)


def test_where_a_bottleneck_stands_is_a_choice():
    spec = AdapterSpec(kind="bottleneck", width=2, targets=("mlp",))
    adapter = resolve(spec, LLAMA)
    assert {path.split("/")[1] for path, _ in adapter.beside} == {"mlp_bottleneck"}
    assert adapter.count() == 2 * (16 * 2 + 2 + 2 * 16 + 16)
    assert resolve(SPECS["prefix"], LLAMA).count() == 5 * 2 * 2 * 8
    assert resolve(SPECS["soft_prompt"], LLAMA).count() == 5 * 16
    with pytest.raises(ConfigError, match="'q': a bottleneck stands after attention or mlp"):
        resolve(AdapterSpec(kind="bottleneck", targets=("q",)), LLAMA)
    with pytest.raises(ConfigError, match="64 positions"):
        resolve(AdapterSpec(kind="prefix", virtual_tokens=64), CONFIGS["gpt2"])


@pytest.mark.parametrize("kind", SPECS)
def test_folders_keep_every_bit_and_refuse_what_does_not_fit(kind, tmp_path):
    adapter, base, whole = trained("llama", kind)
    save_adapter(tmp_path, whole, adapter, LLAMA, kind="lm", base="b", base_content="x")
    back = load_adapter(tmp_path, LLAMA, base)
    assert back.adapter == adapter
    assert back.base_content == "x"
    assert_same_bits(back.adapter.split(back.leaves)[0], adapter.split(whole)[0])
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter_of(said, LLAMA, "lm", "here") == adapter
    assert ("peft_cannot_read_this" in said) == (kind == "bottleneck")

    def refused(message, **change):
        (tmp_path / "adapter_config.json").write_text(json.dumps(said | change))
        with pytest.raises(ModelError, match=message):
            load_adapter(tmp_path, LLAMA, base)

    refused("surprise = 3 is not read", surprise=3)
    if kind == "bottleneck":
        refused("wrong shape: layers.attention_bottleneck.down.kernel", width=4)
        refused("non_linearity = 'relu': gelu", non_linearity="relu")
        refused("not part of this adapter", target_modules=["mlp"])
    else:
        refused("num_virtual_tokens = 0: a positive", num_virtual_tokens=0)
        refused("wrong shape: prompt_embeddings", num_virtual_tokens=4)
        refused("num_layers = 3, of this llama model 2", num_layers=3)
