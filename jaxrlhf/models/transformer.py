# SPDX-License-Identifier: Apache-2.0
"""The one decoder: parameters in, hidden states out; heads are functions of those (heads.py).

Parameters are a plain nested dict in one layout for every family, layers stacked on a leading L:

    embed/embedding [V,D]    position_embed/embedding [M,D] (learned positions)
    layers/attention/{q,k,v,o}/{kernel [L,in,out], bias [L,out]}
    layers/attention/{q,k}_norm/scale (some families)
    layers/mlp/{gate,up,down}/{kernel, bias}    layers/{attention,mlp}_norm/{scale, bias} [L,D]
    layers/experts/{router/kernel [L,D,E], {gate,up,down}/kernel [L,E,in,out]} (instead of mlp)
    layers/{attention,mlp}_post_norm (families that normalise what a branch adds)
    final_norm/{scale, bias} [D]    lm_head/kernel [D,V] (untied)
    score/kernel [D,R] (reward models)    value/{kernel [D,1], bias [1]}

Nothing here calls jit: `config`, `runtime` and `cache_length` are static, whoever owns a program
closes over them.
"""

from functools import lru_cache
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrlhf.models.adapters.bottleneck import bottleneck
from jaxrlhf.models.adapters.merging import merge
from jaxrlhf.models.adapters.virtual import (
    PREFIX,
    SOFT_PROMPT,
    stored_prefix,
    virtual_tokens,
)
from jaxrlhf.models.attention import Attention, LayerCache
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.experts import Experts, Routing
from jaxrlhf.models.heads import lm_head_kernel
from jaxrlhf.models.layers import (
    MLP,
    Dense,
    Embedding,
    Norm,
    constrain,
    fuse_weights,
    visiting,
)
from jaxrlhf.models.quantization import numbers
from jaxrlhf.models.rope import rope_angles, rope_choice
from jaxrlhf.ops.placement import on_mesh, place

Params = dict[str, Any]
Cache = tuple[LayerCache, ...]

HEADS = ("lm", "score", "value")


class LayerKind(NamedTuple):
    """What distinguishes one layer of a model whose layers differ: numbers, so that a scan over
    layers can bring them along."""

    window: Any  # tokens it sees, itself among them
    rope: Any  # which of `rope_angles` it takes


UNLIMITED = 2**30  # a window that no text fills


def layer_kinds(config: ModelConfig) -> list[LayerKind] | None:
    """Of each layer; None where all are alike, which compiles to less."""
    if config.uniform:
        return None
    return [
        LayerKind(
            config.window if config.has_window(layer) else UNLIMITED, rope_choice(config, layer)
        )
        for layer in range(config.num_layers)
    ]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `config.block` says where norms stand."""

    config: ModelConfig
    runtime: Runtime
    causal: bool = True
    collect: bool = False  # also return keys and values
    route: bool = False  # also return what the router did

    def setup(self):
        c, r = self.config, self.runtime
        if c.block != "post":
            self.attention_norm = Norm(c, r.param_dtype)
            self.mlp_norm = Norm(c, r.param_dtype)
        if c.block in ("post", "both"):
            self.attention_post_norm = Norm(c, r.param_dtype)
            self.mlp_post_norm = Norm(c, r.param_dtype)
        self.attention = Attention(c, r)
        if c.num_experts:
            self.experts = Experts(c, r)
        else:
            self.mlp = MLP(c, r)

    def _feed_forward(self, x, real=None):
        """(what the mlp or the experts add, Routing or None)."""
        y, routing = self.experts(x, real) if self.config.num_experts else (self.mlp(x), None)
        return self._narrowed(y, "mlp_bottleneck"), routing

    def _narrowed(self, y, name: str):
        """What a branch adds, through its bottleneck adapter where it has one."""
        if not self.has_variable("params", name):  # found, never declared
            return y
        leaves: Any = self.get_variable("params", name)
        return bottleneck(y, leaves)

    def _add(self, x, attend, at, real=None):
        """Both branches onto x. attend: normed x -> (out, more); at: states where x lives."""
        kind = self.config.block
        out, more = attend(x if kind == "post" else self.attention_norm(x))
        out = self._narrowed(out, "attention_bottleneck")
        if kind in ("post", "both"):
            out = self.attention_post_norm(out)
        if kind == "parallel":
            added, routing = self._feed_forward(self.mlp_norm(x), real)
            return at(x + out + added), more, routing
        x = at(x + out)
        added, routing = self._feed_forward(x if kind == "post" else self.mlp_norm(x), real)
        if kind in ("post", "both"):
            added = self.mlp_post_norm(added)
        return at(x + added), more, routing

    def _own(self, angles, kind: LayerKind | None):
        """This layer's angles and window."""
        if kind is None or angles is None:
            return angles, self.config.window
        return tuple(part[kind.rope] for part in angles), kind.window

    def __call__(self, x, angles, segment_ids, kind=None, prefix=None, before=None):
        """Whole rows: x [B,T,D] -> (x, ({"k", "v": [B,K,T,H]} if collect, Routing if route)).

        prefix, before: see `attention.attend_rows`.
        """
        angles, window = self._own(angles, kind)

        def attend(x):
            return self.attention(x, angles, segment_ids, window, self.causal, prefix, before)

        real = segment_ids > 0 if self.route else None
        x, cache, routing = self._add(x, attend, lambda x: constrain(x, "act_embed"), real)
        return x, (cache if self.collect else None, routing)

    def step(self, x, angles, cache, column, mask, kind=None):
        """One token a row: x [B,D] -> (x, cache)."""
        angles, _ = self._own(angles, kind)
        x = visiting(x, "visit_embed")

        def attend(x):
            return self.attention.step(x, angles, cache, column, mask)

        x, cache, _ = self._add(x, attend, lambda x: visiting(x, "visit_embed"))
        return x, cache


class Decoder(nn.Module):
    """Embedding, layers under one scan, final norm; and the heads, declared for `init` only."""

    config: ModelConfig
    runtime: Runtime
    causal: bool = True
    collect: bool = False
    route: bool = False

    def setup(self):
        c, r = self.config, self.runtime
        self.embed = Embedding(
            c.vocab_size, c.hidden_size, ("vocab", "embed"), r.dtype, r.param_dtype
        )
        if c.position == "learned":
            self.position_embed = Embedding(
                c.max_positions, c.hidden_size, (None, "embed"), r.dtype, r.param_dtype
            )
        # prevent_cse is needed only outside of a scan's own barrier, that is, when unrolled.
        block = nn.remat(Block, prevent_cse=r.unroll != 1) if r.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast, 0, 0, nn.broadcast)),
            length=c.num_layers,
            unroll=c.num_layers if r.unroll is True else min(r.unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, r, self.causal, self.collect, self.route)
        self.final_norm = Norm(c, r.param_dtype)

    def start(self, tokens, positions):
        """Embedded tokens [..., D] and what rotates their queries and keys (None if learned)."""
        c = self.config
        x = self.embed(tokens)
        if c.embedding_scale:  # rounded to the dtype of x, as the families that do this have it
            x *= jnp.asarray(c.hidden_size**0.5, x.dtype)
        return self.place_at(x, positions)

    def place_at(self, x, positions):
        """The same of what is embedded already."""
        if self.config.position == "learned":
            return x + self.position_embed(positions), None
        return x, rope_angles(self.config, positions)

    def place_soft_prompt(self):
        """`start` of the soft prompt: one row [1,n,D]."""
        x: Any = self.get_variable("params", "embed")[SOFT_PROMPT]
        x = x.astype(self.runtime.dtype)[None]
        return self.place_at(x, jnp.arange(x.shape[1])[None])

    def finish(self, x):
        """The final norm."""
        return self.final_norm(x)

    def __call__(self, tokens, positions, segment_ids, prefix=None, before=None):
        """-> (hidden [B,T,D], (cache, Routing), stacked over layers; None what is not asked for)"""
        x, angles = self.start(tokens, positions)
        x, more = self.through(x, angles, segment_ids, prefix, before)
        return self.finish(x), more

    def through(self, x, angles, segment_ids, prefix=None, before=None):
        """What is embedded already, through the layers."""
        kinds = layer_kinds(self.config)
        if kinds is not None:
            kinds = LayerKind(*(jnp.asarray(each) for each in zip(*kinds, strict=True)))
        x = constrain(x, "act_embed")
        return self.layers(x, angles, segment_ids, kinds, prefix, before)

    def read_soft_prompt(self):
        """The soft prompt's (states [1,n,D], (cache, None))."""
        x, angles = self.place_soft_prompt()
        return self.through(x, angles, jnp.ones(x.shape[:2], jnp.int32))


class WithHeads(nn.Module):
    """A decoder's own leaves and those of its heads, at one level: what `init` builds."""

    config: ModelConfig
    runtime: Runtime
    heads: tuple[str, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, tokens):
        decoder = Decoder(self.config, self.runtime)
        nn.share_scope(self, decoder)
        hidden, _ = decoder(tokens, tokens, jnp.ones_like(tokens))
        c, dtype = self.config, self.runtime.param_dtype
        outputs = []
        if "lm" in self.heads and not c.tie_embeddings:
            scale = 0.02 * c.hidden_size**0.5
            head = Dense(c.vocab_size, ("embed", "vocab"), False, scale, dtype, name="lm_head")
            outputs.append(head(hidden))
        if "score" in self.heads:
            # Close to Stiennon et al. 2020, arXiv:2009.01325, appendix B: std 1 / sqrt(D + 1).
            scale = (c.hidden_size / (c.hidden_size + 1)) ** 0.5
            head = Dense(self.num_outputs, ("embed", None), False, scale, dtype, name="score")
            outputs.append(head(hidden))
        if "value" in self.heads:
            # Zero: the first values say nothing, and the first returns are the rewards themselves.
            outputs.append(Dense(1, ("embed", None), True, 0.0, dtype, name="value")(hidden))
        return outputs


def _initializer(config, heads, num_outputs, param_dtype, key):
    if wrong := set(heads) - set(HEADS):
        raise ValueError(f"heads {sorted(wrong)}: each one of {HEADS}")
    module = WithHeads(config, Runtime(param_dtype=param_dtype), tuple(heads), num_outputs)
    return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def _unboxed(tree):
    """The leaves without their axis names. (`nn.unbox` would also constrain them to the current
    mesh, which shapes without arrays cannot be; where they live is the caller's to say.)"""
    return jax.tree.map(
        lambda box: box.value, tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def init_params(
    key: jax.Array,
    config: ModelConfig,
    *,
    heads: tuple[str, ...] = ("lm",),
    num_outputs: int = 1,
    param_dtype: str = "float32",
) -> Params:
    """Fresh parameters: kernels normal(0, 1/in), those that write to the residual stream smaller
    by sqrt(2 L), embeddings normal(0, 1/D), scales one, biases zero.

    Args:
        heads: which of "lm", "score" (num_outputs wide) and "value" to add. A tied "lm" adds none.
    """
    return _unboxed(_initializer(config, heads, num_outputs, param_dtype, key))


@lru_cache(maxsize=64)
def _abstract_boxed(config, heads, num_outputs, param_dtype):
    def init(key):
        return _initializer(config, heads, num_outputs, param_dtype, key)

    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))


def abstract_params(
    config: ModelConfig,
    *,
    heads: tuple[str, ...] = ("lm",),
    num_outputs: int = 1,
    param_dtype: str = "float32",
) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs; nothing is allocated."""
    return _unboxed(_abstract_boxed(config, tuple(heads), num_outputs, param_dtype))


def logical_axes(
    config: ModelConfig, *, heads: tuple[str, ...] = ("lm",), num_outputs: int = 1
) -> Params:
    """The same tree with a tuple of logical axis names (or None) for each leaf.

    Names: layers, embed, heads, kv_heads, mlp, vocab; see parallel/rules.py.
    """
    boxed = _abstract_boxed(config, tuple(heads), num_outputs, "float32")
    return jax.tree.map(
        lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def _clean(tokens, positions, segment_ids):
    """Padded slots hold token 0 at position 0: whatever stood there cannot reach anything."""
    real = segment_ids > 0
    return jnp.where(real, tokens, 0), jnp.where(real, positions, 0)


def _outer(params: Params) -> Params:
    return {key: value for key, value in params.items() if key != "layers"}


def _start(decoder: Decoder, outer, tokens, positions) -> tuple[Any, Any]:
    both: Any = decoder.apply(outer, tokens, positions, method="start")
    return both


def _finish(decoder: Decoder, outer, x) -> jax.Array:
    hidden: Any = decoder.apply(outer, x, method="finish")
    return hidden


def _run(
    params,
    config,
    runtime,
    tokens,
    positions,
    segment_ids,
    *,
    causal=True,
    collect=False,
    route=False,
    prefix=None,
) -> tuple[Any, Any, Any]:
    """(hidden [B,T,D]; keys and values stacked [L,...] or a tuple over layers, or None; Routing
    [L,E] or None). prefix: `read_virtual_tokens`, if it is there already."""
    if prefix is None:
        prefix = read_virtual_tokens(params, config, runtime)
    if (config.window is not None or prefix is not None) and not causal:
        what = "a window" if prefix is None else "virtual tokens"
        raise ValueError(f"a model with {what} reads from left to right: causal must be true")
    tokens, positions = _clean(tokens, positions, segment_ids)
    before = None
    if prefix is not None:
        before, positions = positions, positions + virtual_tokens(params)
    decoder = Decoder(config, runtime, causal, collect, route)
    if not isinstance(params["layers"], (tuple, list)):
        both: Any = decoder.apply(
            {"params": params}, tokens, positions, segment_ids, prefix, before
        )
        hidden, (cache, routing) = both
        return hidden, cache, routing
    outer = {"params": _outer(params)}
    x, angles = _start(decoder, outer, tokens, positions)
    x, caches, routings = _through(decoder, params, x, angles, segment_ids, prefix, before)
    routing = jax.tree.map(lambda *each: jnp.stack(each), *routings) if route else None
    return _finish(decoder, outer, x), caches, routing


def _through(decoder: Decoder, params, x, angles, segment_ids, prefix=None, before=None):
    """Through layers that are a tuple: (x, caches of each, Routing of each)."""
    config = decoder.config
    block = Block(config, decoder.runtime, decoder.causal, decoder.collect, decoder.route)
    kinds = layer_kinds(config) or [None] * config.num_layers
    prefixes = prefix or [None] * config.num_layers
    caches, routings = [], []
    for layer, kind, own in zip(params["layers"], kinds, prefixes, strict=True):
        both: Any = block.apply({"params": layer}, x, angles, segment_ids, kind, own, before)
        x, (cache, routing) = both
        caches.append(cache)
        routings.append(routing)
    return x, tuple(caches), routings


def read_virtual_tokens(params: Params, config: ModelConfig, runtime: Runtime) -> Any:
    """Keys and values of what stands in front of every text (adapters/virtual.py): {"k", "v"}
    [L,K,n,H], or a tuple over layers as the layers are; None where nothing does."""
    layers = params["layers"]
    split = isinstance(layers, (tuple, list))
    if SOFT_PROMPT in params["embed"]:
        decoder = Decoder(config, runtime, collect=True)
        if not split:
            both: Any = decoder.apply({"params": params}, method="read_soft_prompt")
            return {name: leaf[:, 0] for name, leaf in both[1][0].items()}
        both: Any = decoder.apply({"params": _outer(params)}, method="place_soft_prompt")
        x, angles = both
        ones = jnp.ones(x.shape[:2], jnp.int32)
        _, caches, _ = _through(decoder, params, x, angles, ones)
        return tuple({name: leaf[0] for name, leaf in cache.items()} for cache in caches)
    if PREFIX[0] not in (layers[0] if split else layers)["attention"]:
        return None
    if split:
        return tuple(
            stored_prefix(layer["attention"], config.kv_heads, runtime.dtype) for layer in layers
        )
    return stored_prefix(layers["attention"], config.kv_heads, runtime.dtype)


def hidden_states(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool = True,
) -> jax.Array:
    """Hidden states after the final norm, [B, T, D] in runtime.dtype.

    Args:
        tokens, positions, segment_ids: int32 [B, T]; segment 0 is padding, and neither the tokens
            nor the positions there matter. A token outside the vocabulary gives NaN.
        causal: False lets a token see all of its segment.
    """
    return _run(params, config, runtime, tokens, positions, segment_ids, causal=causal)[0]


def hidden_states_and_routing(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, Routing]:
    """As `hidden_states`, and what the routers of a model with experts did with real tokens."""
    if not config.num_experts:
        raise ValueError(f"a {config.family} model without experts has no routers")
    found = _run(params, config, runtime, tokens, positions, segment_ids, route=True)
    return found[0], found[2]


def split_layers(params: Params, config: ModelConfig, runtime: Runtime) -> Params:
    """Parameters for a decode loop: `layers` as a tuple of per-layer trees, in runtime.dtype.

    Adapters are merged; q, k, v (and gate, up) become one matrix if runtime.fuse. Do it once,
    before the loop; every function here takes either form. Norms and biases keep their dtype.
    Quantized kernels stay so, and adapters beside them: merged they would need the memory that
    quantizing saves.
    """
    if isinstance(params["layers"], (tuple, list)):
        return params

    def computed(path, leaf):
        matrix = path[-1].key in ("kernel", "embedding")
        return leaf.astype(runtime.dtype) if matrix else leaf

    def fused(group, names, name):
        if not runtime.fuse or any(part not in group for part in names):
            return group
        leaves = fuse_weights([group[part] for part in names])
        if leaves is None:
            return group
        return {key: value for key, value in group.items() if key not in names} | {name: leaves}

    layers = []
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        layer = merge(layer, quantized=False)
        layer = jax.tree_util.tree_map_with_path(computed, layer)
        layer["attention"] = fused(layer["attention"], ("q", "k", "v"), "qkv")
        if "mlp" in layer:
            layer["mlp"] = fused(layer["mlp"], ("gate", "up"), "gate_up")
        layers.append(layer)
    outer = {
        key: value
        if key in ("score", "value")
        else jax.tree_util.tree_map_with_path(computed, value)
        for key, value in _outer(params).items()
    }
    if on_mesh() and ("lm_head" in outer or config.tie_embeddings):
        # Laid out once for all steps as `heads.logits` reads it.
        outer["lm_head"] = {"kernel": place(lm_head_kernel(outer), None, "visit_vocab")}
    return outer | {"layers": tuple(layers)}


def prefill(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache_length: int,
) -> tuple[jax.Array, Cache]:
    """Reads right-padded prompts [B, P]: (hidden [B, P, D], cache of `cache_length` >= P columns).

    Prompt token p of a row lies in column p; the columns of its padding hold nothing to attend to
    (leave them out of `cache_mask`), those after P are zero. Virtual tokens have columns of their
    own in front, which nobody outside counts.
    """
    length = tokens.shape[1]
    if cache_length < length:
        raise ValueError(f"cache_length = {cache_length} is shorter than the prompts, {length}")
    prefix = read_virtual_tokens(params, config, runtime)
    hidden, caches, _ = _run(
        params, config, runtime, tokens, positions, segment_ids, collect=True, prefix=prefix
    )
    if isinstance(caches, dict):  # stacked by the scan
        caches = tuple(
            {name: leaf[index] for name, leaf in caches.items()}
            for index in range(config.num_layers)
        )
    pad = ((0, 0), (0, 0), (0, cache_length - length), (0, 0))
    caches = tuple({name: jnp.pad(c[name], pad) for name in ("k", "v")} for c in caches)
    if prefix is None:
        return hidden, caches
    if isinstance(prefix, dict):
        prefix = [{k: x[index] for k, x in prefix.items()} for index in range(config.num_layers)]

    def behind(own: jax.Array, cache: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [jnp.broadcast_to(own, (tokens.shape[0], *own.shape)), cache], axis=2
        )

    return hidden, tuple(
        {name: behind(own[name], cache[name]) for name in ("k", "v")}
        for own, cache in zip(prefix, caches, strict=True)
    )


def decode_step(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    token: jax.Array,
    position: jax.Array,
    cache: Cache,
    column: jax.Array,
    cache_mask: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One more token for each row: (hidden [B, D] after the final norm, cache).

    Args:
        token, position: int32 [B]; position = tokens before it in its row.
        cache: as returned by `prefill`; keys and values of the token are written at `column`.
        column: int32 [], the same for every row (P + t at step t), so the update is in place.
        cache_mask: bool [B, S], columns the row may attend to (a window counts these). `column`
            itself is always attended to, columns after it never, whatever the mask says there.
    """
    params = split_layers(params, config, runtime)
    if ahead := virtual_tokens(params):
        cache_mask = jnp.pad(cache_mask, ((0, 0), (ahead, 0)), constant_values=True)
        position, column = position + ahead, column + ahead
    columns = jnp.arange(cache_mask.shape[1])
    mask = (cache_mask & (columns < column)) | (columns == column)
    near = mask
    if config.window is not None:  # real tokens between a column's and this one
        since = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
        near = mask & (since < config.window)
    mask, near = mask & (columns != column), near & (columns != column)  # its own is not there yet
    decoder = Decoder(config, runtime)
    outer = {"params": _outer(params)}
    x, angles = _start(decoder, outer, token, position)
    block = Block(config, runtime)
    kinds = layer_kinds(config) or [None] * config.num_layers
    caches = []
    for index, (layer, layer_cache, kind) in enumerate(
        zip(params["layers"], cache, kinds, strict=True)
    ):
        seen = near if config.has_window(index) else mask
        both: Any = block.apply(
            {"params": layer},
            x,
            angles,
            layer_cache,
            column,
            seen,
            kind,
            method="step",
        )
        x, layer_cache = both
        caches.append(layer_cache)
    return _finish(decoder, outer, x), tuple(caches)


def count_params(params: Params) -> int:
    """A model's numbers in a tree of arrays or ShapeDtypeStructs, however they are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(numbers(str(getattr(path[-1], "key", "")) if path else "", x) for path, x in leaves)
