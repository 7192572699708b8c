# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: its settings, the modules of a model they mean, and its leaves.

    spec -> resolve(spec, config) -> Adapter -> init_adapter(key, adapter, params) -> leaves

Leaves are stacked over layers as the kernels are. Where layers differ in rank the smaller ones are
filled up with zeros on both sides, which stay zero: neither side has a gradient there.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters import apply
from jaxrlhf.models.adapters.beside import Shapes, axes_beside, init_beside, shapes_beside
from jaxrlhf.models.adapters.modules import (
    ALL_LINEAR,
    Module,
    choose,
    described,
    expert_modules,
    modules,
    pattern_of,
    projections,
)
from jaxrlhf.models.adapters.trees import Path, at, join, put, split
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.quantization import FORMATS, axes_of_stored, dense_kernel

Params = dict[str, Any]
Kind = Literal["lora", "dora", "ia3", "soft_prompt", "prefix", "bottleneck"]
OF_PROJECTIONS = ("lora", "dora", "ia3")  # what can be merged into the base's matrices
FIELD = "model.adapter"


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as it is asked for.

    Attributes:
        rank, alpha: r, and the numerator of the scale; alpha None = 2 r.
        targets: names of projections, ours or those of transformers; () = the kind's usual ones.
        dropout: share of the features of A's input that training leaves out.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        rank_pattern, alpha_pattern: other values for the modules whose name matches.
        modules_to_save: modules that are trained whole beside the adapter.
        virtual_tokens: n of a soft prompt or prefix.
        width: r of a bottleneck, whose targets are `bottleneck.PLACES`.
    """

    kind: Kind = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    virtual_tokens: int = 20
    width: int = 64


@dataclass(frozen=True)
class Placed:
    """A module with an adapter: rank and alpha in each layer (rank 0 = none there).

    `scales_input` is of (IA)3 alone: the vector multiplies what the module reads.
    """

    module: Module
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scales_input: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter of one architecture. `saved` are the modules that train whole; `beside` the paths
    and shapes of leaves that belong to no projection (soft prompt, prefix, bottleneck)."""

    kind: Kind
    placed: tuple[Placed, ...]
    saved: tuple[Module, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    beside: Shapes = ()

    @property
    def merges(self) -> bool:
        """Whether matrices of the base can hold what it does."""
        return self.kind in OF_PROJECTIONS

    @property
    def virtual_tokens(self) -> int:
        """How many stand in front of every text."""
        return self.beside[0][1][-2] if self.kind in ("soft_prompt", "prefix") else 0

    @property
    def reads_base(self) -> bool:
        """Whether how it starts depends on the base's weights."""
        return self.kind in ("dora", "soft_prompt", "prefix")

    def trains(self, path: Path) -> bool:
        """Whether a leaf of the model's tree is trained."""
        whole = "/".join(path)
        if path[-1] in apply.TRAINED or any(whole == own for own, _ in self.beside):
            return True
        return any(whole in leaves for m in self.saved for _, leaves, _ in m.leaves)

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what trains, what is frozen) of a tree; a value head, which is new, trains."""
        return split(params, lambda path: path[0] == "value" or self.trains(path))

    def on(self, base: Params, leaves: Params) -> Params:
        """A base with this adapter's leaves, copying nothing: swapping adapters is calling it with
        others. What was trained whole stands in the place of the base's own."""
        return join(leaves, split(base, self.trains)[1])

    def scale(self, placed: Placed, layer: int) -> float:
        """What multiplies A B in a layer; 0 where there is none."""
        rank, alpha = placed.ranks[layer], placed.alphas[layer]
        return 0.0 if rank == 0 else alpha / (math.sqrt(rank) if self.rslora else rank)

    def filled(self) -> int:
        """Numbers in its leaves that only fill up smaller ranks."""
        return sum(
            (max(p.ranks) * len(p.ranks) - sum(p.ranks))
            * ((p.module.inputs or 0) + sum(p.module.outputs))
            * (p.module.experts or 1)
            for p in self.placed
        )

    def constants(self) -> Params:
        """Its leaves that nothing trains: LoRA's scales."""
        found: Params = {}
        for placed in self.placed if self.kind != "ia3" else ():
            scales = [self.scale(placed, layer) for layer in range(len(placed.ranks))]
            for part in placed.module.parts:
                put(found, f"{part}/lora_scale", jnp.asarray(scales, jnp.float32))
        return found

    def count(self) -> int:
        """Numbers of its own that train, the zeros that fill up smaller ranks left out."""
        total = sum(math.prod(shape) for _, shape in self.beside)
        for placed in self.placed:
            module = placed.module
            assert module.inputs is not None
            out = sum(module.outputs)
            if self.kind == "ia3":
                layers = len(placed.ranks)
                total += layers * (module.inputs if placed.scales_input else out)
                continue
            total += sum(placed.ranks) * (module.inputs + out) * (module.experts or 1)
            if self.kind == "dora":
                total += out * len(placed.ranks)
        return total

    def same_shape(self, other: "Adapter") -> bool:
        """Whether another adapter's leaves could take this one's place."""
        return dataclasses.replace(self, dropout=other.dropout) == other


def resolve(
    spec: AdapterSpec, config: ModelConfig, *, heads: tuple[str, ...] = (), field: str = FIELD
) -> Adapter:
    """The adapter that a spec means in an architecture.

    Args:
        heads: of "score"; trained whole in any case, being new.

    Raises:
        ConfigError: a name or pattern that means nothing in this model, or a module that cannot
            be trained whole.
    """
    if spec.kind not in OF_PROJECTIONS:
        beside = shapes_beside(
            spec.kind,
            config,
            tokens=spec.virtual_tokens,
            width=spec.width,
            where=spec.targets,
            field=field,
        )
        return Adapter(spec.kind, (), _saved(spec, config, heads, (), field), beside=beside)
    plain = projections(config)
    choices = (*plain, *expert_modules(config))
    targets = spec.targets
    if not targets:
        usual = ("k", "v", "down")
        targets = (
            tuple(m.name(0) for m in plain if any(p.rsplit("/")[-1] in usual for p in m.parts))
            if spec.kind == "ia3"
            else (ALL_LINEAR,)
        )
    chosen = choose(targets, choices, f"{field}.targets")
    if any(m.experts for m in chosen) and (spec.kind != "lora" or spec.dropout):
        what = f"kind = {spec.kind}" if spec.kind != "lora" else f"dropout = {spec.dropout}"
        raise ConfigError(
            f"{field}.{what}: on experts there is LoRA without dropout, as in PEFT; set that, or "
            "leave the experts out of targets"
        )
    saved = _saved(spec, config, heads, chosen, field)
    layers = range(config.num_layers)
    for name, patterns in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        for pattern in patterns:
            if not any(pattern_of([pattern], m, layer) for m in chosen for layer in layers):
                raise ConfigError(
                    f"{field}.{name}: {pattern!r} matches none of the targets {described(chosen)}"
                )

    def place(module: Module) -> Placed:
        if spec.kind == "ia3":
            return Placed(module, (0,) * config.num_layers, (), scales_input=module.ours == "down")
        keys = (*spec.rank_pattern, *spec.alpha_pattern)
        found = [pattern_of(keys, module, layer) or "" for layer in layers]
        ranks = tuple(spec.rank_pattern.get(key, spec.rank) for key in found)
        usual = 2.0 * spec.rank if spec.alpha is None else spec.alpha
        alphas = tuple(float(spec.alpha_pattern.get(key, usual)) for key in found)
        return Placed(module, ranks, alphas)

    placed = tuple(map(place, chosen))
    for one in placed:
        limit = min(one.module.inputs or 1, sum(one.module.outputs))
        if one.ranks and max(one.ranks) > limit:
            raise ConfigError(
                f"{field}.rank = {max(one.ranks)} is more than {one.module.ours} has: "
                f"{one.module.inputs} inputs, {sum(one.module.outputs)} outputs; a rank of "
                f"{limit} can express every change"
            )
    return Adapter(spec.kind, placed, saved, spec.dropout, spec.rslora)


def _saved(
    spec: AdapterSpec,
    config: ModelConfig,
    heads: tuple[str, ...],
    chosen: tuple[Module, ...],
    field: str,
) -> tuple[Module, ...]:
    known = tuple(m for m in modules(config) if m.parts != ("score",) or "score" in heads)
    names = (*spec.modules_to_save, *heads)
    saved = choose(names, known, f"{field}.modules_to_save") if names else ()
    for module in saved:
        if module in chosen:
            raise ConfigError(
                f"{field}.modules_to_save: {module.ours} is among the targets too; "
                "it is trained either whole or by an adapter"
            )
        if config.tie_embeddings and module.parts[0] in ("embed", "lm_head"):
            raise ConfigError(
                f"{field}.modules_to_save: {module.short} is embedding and output head at once in "
                "this model (tied), which PEFT would train as two; leave it out"
            )
    return saved


def init_adapter(
    key: jax.Array,
    adapter: Adapter,
    params: Params,
    dtype: str,
    *,
    config: ModelConfig | None = None,
    text: tuple[int, ...] = (),
) -> Params:
    """The adapter's own leaves: they change nothing yet, but for virtual tokens.

    A is uniform within 1 / sqrt(in), as PEFT draws it, B zero; DoRA's magnitudes are the norms of
    the base's columns, (IA)3's vectors one. For the others see `beside.init_beside`. Pure: jit it,
    or `jax.eval_shape` it.

    Args:
        params: the model's tree; only DoRA, soft prompt and prefix read it.
        dtype: of the leaves that train.
        config: the architecture; only soft prompt and prefix read it.
        text: token ids that virtual tokens start from.
    """
    if adapter.beside:
        return init_beside(key, adapter.beside, params, dtype, config=config, text=text)
    found: Params = {}
    for placed in adapter.placed:
        module, ranks = placed.module, placed.ranks
        layers, rank = len(ranks), max(ranks)
        assert module.inputs is not None
        for n, (part, out) in enumerate(zip(module.parts, module.outputs, strict=True)):
            if adapter.kind == "ia3":
                size = module.inputs if placed.scales_input else out
                name = "ia3_in" if placed.scales_input else "ia3_out"
                leaves = {name: jnp.ones((layers, size), dtype)}
            else:
                lead = (layers, module.experts) if module.experts else (layers,)
                leaves = {"lora_b": jnp.zeros((*lead, rank, out), dtype)}
                if n == 0:
                    own = jax.random.fold_in(key, zlib.crc32(part.encode()))
                    bound = module.inputs**-0.5
                    shape = (*lead, module.inputs, rank)
                    a = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
                    real = jnp.arange(rank) < jnp.asarray(ranks)[:, None]
                    real = real.reshape(layers, *(1,) * (len(lead)), rank)
                    leaves["lora_a"] = jnp.where(real, a, 0).astype(dtype)
                if adapter.kind == "dora":
                    kernel = dense_kernel(at(params, part), jnp.float32)
                    leaves["dora_m"] = jnp.sqrt(jnp.sum(kernel * kernel, axis=-2)).astype(dtype)
            for name, leaf in leaves.items():
                put(found, f"{part}/{name}", leaf)
    return join(found, adapter.constants())


def with_adapter_axes(axes: Params, params: Params) -> Params:
    """Logical axis names with those of the adapter leaves that `params` has, beside the kernel's,
    and of the leaves that a quantized kernel is stored in.

    The rank lives whole on every device; the other dimension where the kernel's does.
    """
    return join(_beside_kernels(axes, params), axes_beside(params))


def _beside_kernels(axes: Params, params: Params) -> Params:
    found = {}
    for key, value in axes.items():
        own = params.get(key)
        if not isinstance(value, dict) or not isinstance(own, dict):
            found[key] = value
            continue
        found[key] = _beside_kernels(value, own)
        if "kernel" not in value:
            continue
        *lead, inputs, out = value["kernel"]
        names = {
            "lora_a": (*lead, inputs, None),
            "lora_b": (*lead, None, out),
            "lora_scale": tuple(lead[:1]),  # one for all experts
            "dora_m": (*lead, out),
            "ia3_in": (*lead, inputs),
            "ia3_out": (*lead, out),
        }
        for name in FORMATS:
            names |= axes_of_stored(value["kernel"], name)
        found[key] |= {name: names[name] for name in own if name in names}
    return found
