# SPDX-License-Identifier: Apache-2.0
"""Rows and small models for the tests of models/."""

from functools import lru_cache, partial

import jax
import numpy as np
import pytest

from jaxrlhf.models import heads
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import abstract_params, hidden_states

LLAMA = ModelConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24
)
GPT2 = ModelConfig(
    family="gpt2",
    vocab_size=37,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    mlp_dim=24,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    position="learned",
    max_positions=64,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
# Layers that differ: windows shorter than the rows, angles of their own, caps, norms on both sides.
GEMMA = ModelConfig(
    family="gemma3_text",
    vocab_size=37,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    norm_offset=True,
    embedding_scale=True,
    block="both",
    qk_norm="head",
    query_scale=5,
    logit_softcap=3.0,
    window=4,
    window_layers=(True, False, True),
    window_rope_theta=100.0,
    activation="gelu_tanh",
)
# Experts, and a window in every layer.
MIXTRAL = ModelConfig(
    family="mixtral",
    vocab_size=37,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=12,
    window=5,
    num_experts=4,
    experts_per_token=2,
    tie_embeddings=False,
)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gemma3": GEMMA, "mixtral": MIXTRAL}
# Two quickly, the others in the slow run.
MOST = [
    "llama",
    "gpt2",
    pytest.param("gemma3", marks=pytest.mark.slow),
    pytest.param("mixtral", marks=pytest.mark.slow),
]
# Blocks of 5 do not divide the lengths used here: ragged ends are always exercised.
RUNTIME = Runtime(attention_block=5)


@lru_cache
def params(name: str):
    """Random parameters (numpy), biases and norms too, so that a bias left out shows."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        start = 1.0 if path[-1].key == "scale" else 0.0
        return (start + 0.3 * rng.standard_normal(shape.shape)).astype(np.float32)

    shapes = abstract_params(CONFIGS[name], heads=("lm", "score", "value"))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def batch(rows: list[list[int]], length: int | None = None, pad: int = 0, left: bool = False):
    """Padded (tokens, positions, segment_ids), int32 [B, T]; positions 0.. on real tokens."""
    length = length or max(map(len, rows))
    tokens = np.full((len(rows), length), pad, np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = slice(length - len(row), None) if left else slice(0, len(row))
        tokens[i, at], positions[i, at], segments[i, at] = row, np.arange(len(row)), 1
    return tokens, positions, segments


@partial(jax.jit, static_argnums=(1, 2))
def hidden(tree, config, runtime, tokens, positions, segments):
    return hidden_states(tree, config, runtime, tokens, positions, segments)


@partial(jax.jit, static_argnums=(1, 2))
def logits(tree, config, runtime, tokens, positions, segments):
    return heads.logits(
        tree, config, hidden_states(tree, config, runtime, tokens, positions, segments)
    )


@partial(jax.jit, static_argnums=(1, 2))
def scores(tree, config, runtime, tokens, positions, segments):
    states = hidden_states(tree, config, runtime, tokens, positions, segments)
    return heads.last_token_score(tree, states, segments)


def rounding(tree, compute) -> float:
    """The most that one unit in the last place of every parameter changes in compute(tree).

    What another order of additions may cost: a fixed bound would be the machine's it was chosen on.
    """
    rng = np.random.default_rng(0)

    def nudged(leaf):
        return leaf * (1 + rng.choice([-1, 1], leaf.shape) * 2.0**-23).astype(np.float32)

    exact = compute(tree)
    changed = [compute(jax.tree.map(nudged, tree)) for _ in range(3)]
    return max(float(np.abs(x - exact).max()) for x in changed)


def random_rows(seed: int, lengths: tuple[int, ...], vocab: int = 37) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
