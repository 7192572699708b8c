# SPDX-License-Identifier: Apache-2.0
"""The modules of a family as PEFT sees them, and which of them a name means.

They follow from the family's own map of tensors: `x.weight` and `x.bias` are the module `x`. A
matrix in which a family keeps several of our projections is one module with several parts.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.transformer import abstract_params

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Module:
    """One module of transformers' model.

    Attributes:
        hf: its name there; "{layer}" stands for the layer's number.
        parts: the dicts of our tree that it holds, side by side along the last axis.
        leaves: (suffix of the tensor, paths of our leaves, transposed there) of its tensors.
        inputs: features of its input; None if it is no projection within a layer.
        outputs: features of each part's output.
        by_head: its parts stand side by side within each head, not one after the other.
        experts: how many of these matrices a layer has; 0 = one that is no expert's.
    """

    hf: str
    parts: tuple[str, ...]
    leaves: tuple[tuple[str, tuple[str, ...], bool], ...]
    inputs: int | None = None
    outputs: tuple[int, ...] = ()
    by_head: bool = False
    experts: int = 0

    def gather(self, pieces: Sequence[np.ndarray], head_size: int) -> np.ndarray:
        """The parts' values [..., out] as the module's own, along its last axis."""
        if not self.by_head or len(pieces) == 1:
            return np.concatenate(pieces, axis=-1)
        heads = [piece.reshape(*piece.shape[:-1], -1, head_size) for piece in pieces]
        return np.stack(heads, axis=-2).reshape(*pieces[0].shape[:-1], -1)

    def divide(self, value: np.ndarray, head_size: int) -> list[np.ndarray]:
        """The inverse of `gather`; parts that are not projections are equally large."""
        count = len(self.parts)
        if not self.by_head or count == 1:
            cuts = np.cumsum(self.outputs)[:-1] if self.outputs else count
            return np.split(value, cuts, axis=-1)
        heads = value.reshape(*value.shape[:-1], -1, count, head_size)
        return [heads[..., n, :].reshape(*value.shape[:-1], -1) for n in range(count)]

    @property
    def conv1d(self) -> bool:
        """Stored [in, out], as transformers' Conv1D; PEFT calls it fan_in_fan_out."""
        return self.inputs is not None and not self.leaves[0][2]

    @property
    def layered(self) -> bool:
        return "{layer}" in self.hf

    @property
    def ours(self) -> str:
        """Our name: q, gate, ...; parts of one matrix together: qkv, gate_up."""
        last = [part.rsplit("/", 1)[-1] for part in self.parts]
        return ("" if all(len(name) == 1 for name in last) else "_").join(last)

    @property
    def short(self) -> str:
        return self.hf.rsplit(".", 1)[-1]

    def name(self, layer: int) -> str:
        """Its full name in one layer."""
        return self.hf.format(layer=layer)


def modules(config: ModelConfig) -> tuple[Module, ...]:
    """All modules of an architecture in the family's order, heads included."""
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            abstract_params(config, heads=("lm", "score"))
        )
    }
    by_head: dict[str, bool] = {}
    tensors: dict[str, list[tuple[str, tuple[str, ...], bool]]] = {}
    for tensor in FAMILIES[config.family].tensors:
        leaves = tuple(path for path in tensor.leaves if path in shapes)
        if leaves and "{expert}" not in tensor.hf:
            hf, suffix = tensor.hf.rsplit(".", 1)
            by_head[hf] = getattr(tensor, "by_head", False)
            tensors.setdefault(hf, []).append((suffix, leaves, tensor.transpose))
    found = []
    for hf, entries in tensors.items():
        weights = entries[0][1]
        parts = tuple(path.rsplit("/", 1)[0] for path in weights)
        sizes = [shapes[path] for path in weights]
        # A plain matrix in every layer; experts' kernels have one more axis, and the router, which
        # chooses among them, is no linear layer in transformers.
        kernel = weights[0].endswith("/kernel") and not weights[0].endswith("router/kernel")
        linear = kernel and "{layer}" in hf and len(sizes[0]) == 3
        inputs = sizes[0][-2] if linear else None
        outputs = tuple(size[-1] for size in sizes) if linear else ()
        found.append(Module(hf, parts, tuple(entries), inputs, outputs, by_head[hf]))
    return tuple(found)


def projections(config: ModelConfig) -> tuple[Module, ...]:
    """What can be adapted: the projections within layers, never a head."""
    return tuple(module for module in modules(config) if module.inputs is not None)


def expert_modules(config: ModelConfig) -> tuple[Module, ...]:
    """What experts have, as the parameters that transformers 5 keeps them in: gate and up as one,
    and down. Adapted where they are named."""
    if not config.num_experts:
        return ()
    wide, narrow = config.mlp_dim, config.hidden_size
    found = []
    for hf, names, inputs, out in (
        ("gate_up_proj", ("gate", "up"), narrow, wide),
        ("down_proj", ("down",), wide, narrow),
    ):
        parts = tuple(f"layers/experts/{name}" for name in names)
        kernels = tuple(f"{part}/kernel" for part in parts)
        name = f"model.layers.{{layer}}.mlp.experts.{hf}"
        outputs = (out,) * len(parts)
        weight = (("weight", kernels, True),)
        found.append(Module(name, parts, weight, inputs, outputs, experts=config.num_experts))
    return tuple(found)


def is_named(module: Module, target: str, layer: int = 0) -> bool:
    """Whether a target means a module: our name, its name, or the end of its full name; "experts"
    means all that experts have."""
    name = module.name(layer)
    if module.experts and target == "experts":
        return True
    return target == module.ours or name == target or name.endswith(f".{target}")


def described(choices: Iterable[Module]) -> str:
    """Names for a message: ours, with those of transformers where they differ."""
    short = [module.short for module in choices]
    return ", ".join(
        module.ours
        if module.ours == module.short
        else f"{module.ours} ({module.short if short.count(module.short) == 1 else _two(module)})"
        for module in choices
    )


def _two(module: Module) -> str:
    return ".".join(module.hf.split(".")[-2:])


def choose(targets: Sequence[str], choices: tuple[Module, ...], field: str) -> tuple[Module, ...]:
    """The modules that are targets, in the family's order; all-linear means none of experts.

    Raises:
        ConfigError: a target that means none, with what there is.
    """
    names = tuple(target for target in targets if target != ALL_LINEAR)
    everything = ALL_LINEAR in targets
    for target in names:
        if not any(is_named(module, target) for module in choices):
            known = [name for module in choices for name in (module.ours, module.short)]
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{field}: {target!r} names nothing in this model; there are {described(choices)}"
                f"{hint}"
            )
    return tuple(
        m
        for m in choices
        if (everything and not m.experts) or any(is_named(m, target) for target in names)
    )


def pattern_of(patterns: Iterable[str], module: Module, layer: int) -> str | None:
    """The first pattern that means a module in a layer: our name, or a regular expression that
    its full name, or the end of it after a dot, matches."""
    name = module.name(layer)
    for pattern in patterns:
        if pattern == module.ours or re.match(rf"(.*\.)?({pattern})$", name):
            return pattern
    return None
