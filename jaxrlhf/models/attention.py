# SPDX-License-Identifier: Apache-2.0
"""Self-attention with grouped keys and values, over whole rows or one cached step.

A token attends to the tokens of its own segment at or before it. Padding is segment 0 and attends
to padding, so no query is ever without a key: no row of a softmax is empty, nothing becomes NaN,
and what stands in padded slots reaches no real token. Keys and values are never repeated to the
number of query heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.layers import Dense, Norm, constrain, project, visiting
from jaxrlhf.models.rope import rotate
from jaxrlhf.ops.softcap import softcap

# Finite, so that subtracting the row's maximum never gives inf - inf; exp of it is exactly 0.
MASKED = -1e30

LayerCache = dict[str, jax.Array]  # {"k", "v"}: [B, K, S, H]


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, cap: float | None
) -> jax.Array:
    """q [B,K,G,T,H] over k, v [B,K,S,H] where mask [B,T,S]; softmax in float32. -> [B,K,G,T,H]"""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=accumulate)
    scores = softcap(scores, cap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=accumulate
    )
    return (out / total).astype(q.dtype)


def _attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache,
    mask: jax.Array,
    cap: float | None,
) -> jax.Array:
    """q [B,K,G,H] over its own k, v [B,K,H] and those of the cache where mask [B,S]; softmax in
    float32. -> [B,K,G,H]"""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, cache["k"], preferred_element_type=accumulate)
    scores = jnp.where(mask[:, None, None], softcap(scores, cap), MASKED)
    own = jnp.einsum("bkgh,bkh->bkg", q, k, preferred_element_type=accumulate)
    own = softcap(own, cap)[..., None]
    top = jnp.maximum(scores.max(-1, keepdims=True), own)
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    out = jnp.einsum(
        "bkgs,bksh->bkgh", weights.astype(v.dtype), cache["v"], preferred_element_type=accumulate
    )
    total = weights.sum(-1, keepdims=True) + own
    return ((out + own * v[:, :, None]) / total).astype(q.dtype)


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool = True,
    block: int = 64,
    window: int | jax.Array | None = None,
    cap: float | None = None,
    prefix: LayerCache | None = None,
    before: jax.Array | None = None,
) -> jax.Array:
    """Attention of whole rows: q [B,K,G,T,H] (already scaled), k, v [B,K,T,H] -> [B,K,G,T,H].

    Causal rows go in blocks of queries, each against the keys from the first that its window
    reaches up to its own end, so what is masked anyway is neither computed nor stored.

    Args:
        window: a token sees itself and the window - 1 tokens before it. An int saves the work of
            the keys before; an array (layers that differ, in one scan) only masks them.
        cap: see `ops.softcap`.
        prefix: {"k", "v": [K,n,H]} of virtual tokens in front of every segment; only if causal.
        before: int [B,T], a token's own position, without the n: what a window counts on.
    """
    length = q.shape[3]
    if not causal:
        return _attend(q, k, v, segment_ids[:, :, None] == segment_ids[:, None, :], cap)
    outputs = []
    step = block or length
    for start in range(0, length, step):
        end = min(start + step, length)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        mask = segment_ids[:, start:end, None] == segment_ids[:, None, first:end]
        back = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        mask &= back >= 0
        if window is not None:
            mask &= back < window
        keys, values = k[:, :, first:end], v[:, :, first:end]
        if prefix is not None and before is not None:
            keys, values = (
                jnp.concatenate([jnp.broadcast_to(own, (x.shape[0], *own.shape)), x], axis=2)
                for own, x in ((prefix["k"], keys), (prefix["v"], values))
            )
            count = prefix["k"].shape[1]
            since = before[:, start:end, None] + count - jnp.arange(count)
            near = jnp.broadcast_to(segment_ids[:, start:end, None] > 0, since.shape)
            if window is not None:
                near &= since < window
            mask = jnp.concatenate([near, mask], axis=2)
        outputs.append(_attend(q[:, :, :, start:end], keys, values, mask, cap))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)


class Attention(nn.Module):
    """q, k, v and output projections around either kind of attention."""

    config: ModelConfig
    runtime: Runtime

    def setup(self):
        c, dtype = self.config, self.runtime.param_dtype
        query, key = c.num_heads * c.head_size, c.kv_heads * c.head_size
        kv = {"axes": ("embed", "kv_heads"), "use_bias": c.qkv_bias, "param_dtype": dtype}
        heads = {**kv, "axes": ("embed", "heads")}
        self.q = Dense(query, **heads)
        self.k = Dense(key, **kv)
        self.v = Dense(key, **kv)
        self.qkv = Dense(query + 2 * key, **heads)  # the three of them fused, for decoding
        self.o = Dense(
            c.hidden_size,
            axes=("heads", "embed"),
            use_bias=c.output_bias,
            scale=(2 * c.num_layers) ** -0.5,
            param_dtype=dtype,
        )
        if c.qk_norm != "none":
            per_head = c.qk_norm == "head"
            self.q_norm = Norm(c, dtype, None if per_head else "heads")
            self.k_norm = Norm(c, dtype, None if per_head else "kv_heads")

    def _project(self, x, angles):
        """x [B, ..., D] to q [B, ..., K, G, H], scaled, and k, v [B, ..., K, H]; rotated."""
        c = self.config
        lead = x.shape[:-1]
        if self.has_variable("params", "qkv"):
            query, key = c.num_heads * c.head_size, c.kv_heads * c.head_size
            q, k, v = jnp.split(self.qkv(x), (query, query + key), axis=-1)
        else:
            q, k, v = project(x, (self.q, self.k, self.v), self.runtime.fuse)
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(q.reshape(*lead, c.num_heads, c.head_size), "act_heads", None)
        k = constrain(k.reshape(*lead, c.kv_heads, c.head_size), "act_heads", None)
        v = constrain(v.reshape(*lead, c.kv_heads, c.head_size), "act_heads", None)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q *= (c.query_scale or c.head_size) ** -0.5
        return q.reshape(*lead, c.kv_heads, c.num_heads // c.kv_heads, c.head_size), k, v

    def __call__(
        self, x, angles, segment_ids, window=None, causal: bool = True, prefix=None, before=None
    ):
        """Whole rows: x [B,T,D] -> (out [B,T,D], {"k", "v": [B,K,T,H]} without the prefix's)."""
        q, k, v = self._project(x, angles)
        q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
        out = attend_rows(
            q,
            k,
            v,
            segment_ids,
            causal=causal,
            block=self.runtime.attention_block,
            window=window,
            cap=self.config.attention_softcap,
            prefix=prefix,
            before=before,
        )
        out = out.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1)
        return self.o(constrain(out, "act_heads")), {"k": k, "v": v}

    def step(self, x, angles, cache: LayerCache, column, mask):
        """One token a row: x [B,D] attending to itself and where mask [B,S], which leaves out
        `column`, where it is written."""
        q, k, v = self._project(x, angles)
        out = _attend_cached(q, k, v, cache, mask, self.config.attention_softcap)
        # Written after it was read: adding nothing says so. Were their order left open, XLA:CPU
        # would keep the cache for the one and copy it for the other, in every layer and step.
        nothing = 0 * out[:, :, 0]
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(
                cache[name], (new + nothing)[:, :, None].astype(cache[name].dtype), column, axis=2
            )
            for name, new in (("k", k), ("v", v))
        }
        return self.o(visiting(out.reshape(x.shape[0], -1), "act_heads")), cache
