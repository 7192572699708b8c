# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens: what stands in front of every text, as keys and values that its tokens attend to.

    layers/attention/{prefix_k,prefix_v} [L,n,K*H]  keys (not rotated any more) and values
    embed/soft_prompt [n,D]                         embeddings; layers make keys and values of them

A virtual token sees only the virtual tokens before it, so its keys and values are the same for all
rows and for all packed segments of a row: they are made once, and both kinds are a cache that is
there before the text begins. Tokens keep their own positions 0, 1, ... everywhere outside of the
model, which adds n.
"""

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]

SOFT_PROMPT = "soft_prompt"
PREFIX = ("prefix_k", "prefix_v")


def virtual_tokens(params: Params) -> int:
    """n: how many of them stand in front of what a tree of parameters reads."""
    if SOFT_PROMPT in params["embed"]:
        return params["embed"][SOFT_PROMPT].shape[-2]
    layers = params["layers"]
    attention = (layers[0] if isinstance(layers, (tuple, list)) else layers)["attention"]
    return attention[PREFIX[0]].shape[-2] if PREFIX[0] in attention else 0


def stored_prefix(attention: Params, heads: int, dtype: str) -> dict[str, jax.Array]:
    """{"k", "v": [..., K, n, H]} of one layer's leaves, or of all layers' stacked ones."""

    def by_head(leaf: jax.Array) -> jax.Array:
        split = leaf.reshape(*leaf.shape[:-1], heads, -1)
        return split.swapaxes(-2, -3).astype(jnp.dtype(dtype))

    return {name: by_head(attention[leaf]) for name, leaf in zip("kv", PREFIX, strict=True)}
