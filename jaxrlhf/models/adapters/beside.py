# SPDX-License-Identifier: Apache-2.0
"""Adapters that are no part of a projection: their leaves, where these live, how they start.

Soft prompts and prefixes (virtual.py) and bottlenecks (bottleneck.py).
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.bottleneck import PLACES
from jaxrlhf.models.adapters.trees import at, places, put
from jaxrlhf.models.adapters.virtual import PREFIX, SOFT_PROMPT
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import prefill

Params = dict[str, Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # path joined by "/", shape

PROMPT_PATH = f"embed/{SOFT_PROMPT}"
PREFIX_PATHS = tuple(f"layers/attention/{name}" for name in PREFIX)


def shapes_beside(
    kind: str,
    config: ModelConfig,
    *,
    tokens: int,
    width: int,
    where: tuple[str, ...],
    field: str,
) -> Shapes:
    """The leaves of a soft prompt or prefix of so many virtual `tokens`, or of bottlenecks of a
    `width` at the places `where` (() = all of them).

    Raises:
        ConfigError: no such place, or positions that the model cannot shift.
    """
    layers, size = config.num_layers, config.hidden_size
    if kind in ("soft_prompt", "prefix"):
        limit = config.max_positions if config.position == "learned" else None
        if limit is not None and tokens >= limit:
            raise ConfigError(
                f"{field}.virtual_tokens = {tokens} leaves no room for text: the model has {limit} "
                "positions"
            )
    if kind == "soft_prompt":
        if config.rope_limit is not None:
            raise ConfigError(
                f"{field}.kind = soft_prompt: this {config.family} model turns all positions of "
                f"rows beyond {config.rope_limit} tokens slower, so virtual tokens have no keys of "
                "their own; kind = prefix has"
            )
        return ((PROMPT_PATH, (tokens, size)),)
    if kind == "prefix":
        shape = (layers, tokens, config.kv_heads * config.head_size)
        return tuple((path, shape) for path in PREFIX_PATHS)
    if wrong := [place for place in where if place not in PLACES]:
        raise ConfigError(
            f"{field}.targets: {wrong[0]!r}: a bottleneck stands after {' or '.join(PLACES)}"
        )
    each = {
        "down/kernel": (layers, size, width),
        "down/bias": (layers, width),
        "up/kernel": (layers, width, size),
        "up/bias": (layers, size),
    }
    return tuple(
        (f"layers/{place}_bottleneck/{name}", shape)
        for place in PLACES
        if place in (where or PLACES)
        for name, shape in each.items()
    )


def axes_beside(params: Params) -> Params:
    """Logical axis names of those of these leaves that a tree of parameters has.

    Virtual tokens and a bottleneck's width live whole on every device; the rest as the embedding,
    keys and values, or the residual stream do.
    """
    known = {
        PROMPT_PATH: (None, "embed"),
        **dict.fromkeys(PREFIX_PATHS, ("layers", None, "kv_heads")),
    }
    for place in PLACES:
        known |= {
            f"layers/{place}_bottleneck/down/kernel": ("layers", "embed", None),
            f"layers/{place}_bottleneck/down/bias": ("layers", None),
            f"layers/{place}_bottleneck/up/kernel": ("layers", None, "embed"),
            f"layers/{place}_bottleneck/up/bias": ("layers", "embed"),
        }
    found: Params = {}
    for path, names in known.items():
        *outer, last = path.split("/")
        if tuple(outer) in places(params, last):
            put(found, path, names)
    return found


def init_beside(
    key: jax.Array,
    shapes: Shapes,
    params: Params,
    dtype: str,
    *,
    config: ModelConfig | None = None,
    text: tuple[int, ...] = (),
) -> Params:
    """Leaves as training begins.

    A soft prompt is the embeddings of `text`, repeated or cut to n tokens, or of tokens drawn from
    the vocabulary (Lester et al. 2021, arXiv:2104.08691, section 3.2: better than random numbers);
    a prefix the keys and values that the base makes of these tokens (Li & Liang 2021,
    arXiv:2101.00190, section 7.4). Either is then a text in front of every text. Bottlenecks change
    nothing: `up` is zero, `down` uniform within 1 / sqrt(in).
    """
    found: Params = {}
    if shapes[0][0] in (PROMPT_PATH, *PREFIX_PATHS):
        assert config is not None
        count = shapes[0][1][-2]
        ids = jax.random.randint(key, (count,), 0, config.vocab_size)
        if text:
            ids = jnp.asarray([text[i % len(text)] for i in range(count)], jnp.int32)
        if shapes[0][0] == PROMPT_PATH:
            rows = jnp.take(at(params, "embed/embedding"), ids, axis=0)
            # As tokens enter the layers: transformers scales when it looks up.
            rows *= config.hidden_size**0.5 if config.embedding_scale else 1.0
            leaves = [rows]
        else:
            leaves = _keys_and_values(params, config, ids)
        for (path, _), leaf in zip(shapes, leaves, strict=True):
            put(found, path, leaf.astype(dtype))
        return found
    for path, shape in shapes:
        leaf = jnp.zeros(shape, dtype)
        if path.endswith("down/kernel"):
            bound = shape[-2] ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            leaf = jax.random.uniform(own, shape, jnp.float32, -bound, bound).astype(dtype)
        put(found, path, leaf)
    return found


def _keys_and_values(params: Params, config: ModelConfig, ids: jax.Array) -> list[jax.Array]:
    """[L,n,K*H] each, of a row of tokens."""
    at_once = jnp.arange(len(ids))[None]
    runtime = Runtime(dtype="float32")
    _, caches = prefill(
        params, config, runtime, ids[None], at_once, jnp.ones_like(at_once), len(ids)
    )

    def stacked(name: str) -> jax.Array:  # each [1,K,n,H]
        each = jnp.stack([cache[name][0] for cache in caches])
        return each.swapaxes(1, 2).reshape(len(caches), len(ids), -1)

    return [stacked("k"), stacked("v")]
