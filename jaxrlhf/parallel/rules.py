# SPDX-License-Identifier: Apache-2.0
"""Logical axis names to mesh axes: the one table, and what follows from it.

Weights name their dimensions ("embed", "mlp", ...), so do activations ("batch", "act_embed", ...).
RULES says which mesh axis each lives on; everything else here is derived. A dimension that its mesh
axis does not divide is replicated, and listed, so that nobody is surprised by the memory it costs.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # weights
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "outputs": None,  # of a scalar head: few
    # activations
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    # activations that go to weights which stay where they are (see ops/placement.py)
    "visit_batch": "data",
    "visit_embed": "fsdp",
    "visit_vocab": ("tensor", "fsdp"),
}

T = TypeVar("T")


def _is_axes(x: Any) -> bool:
    """Axis names of one leaf: a plain tuple (or PartitionSpec) of names; None = no names known."""
    return x is None or isinstance(x, PartitionSpec) or (type(x) is tuple)


def path_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A pytree path as plain names, whatever containers it goes through."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _spec(
    name: str, axes: Any, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, MeshAxes]
) -> tuple[PartitionSpec, list[str]]:
    """The spec of one leaf, and a line for each dimension that had to be replicated."""
    if axes is None:
        return PartitionSpec(), []
    if len(axes) != len(shape):
        raise ValueError(f"{name}: axis names {tuple(axes)} do not fit the shape {shape}")
    entries: list[MeshAxes] = []
    replicated: list[str] = []
    used: set[str] = set()
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name}: unknown axis name {axis!r}; known are {', '.join(rules)}")
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else (target or ())
        # An axis of size 1 splits nothing; an axis can split only one dimension of a leaf.
        names = tuple(n for n in names if mesh.shape[n] > 1 and n not in used)
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            replicated.append(
                f"{name} dimension {i} ({axis} {size}) over {'x'.join(names)} {parts}"
            )
            names = ()
        used.update(names)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries), replicated


def shardings(
    axes_tree: Any, abstract_tree: Any, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES
) -> tuple[Any, list[str]]:
    """Shardings of a parameter tree, from the names of its dimensions.

    Args:
        axes_tree: the parameter tree with a tuple of logical names (or None) for each leaf.
        abstract_tree: the same tree of arrays or ShapeDtypeStructs.

    Returns:
        A tree of NamedSharding, and one line for every dimension replicated because its mesh axis
        does not divide it.

    Raises:
        ValueError: a leaf without axis names, names that do not fit its shape, an unknown name.
    """
    named = {
        path_keys(path): axes
        for path, axes in jax.tree_util.tree_flatten_with_path(axes_tree, is_leaf=_is_axes)[0]
    }
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_tree)
    out: list[NamedSharding] = []
    replicated: list[str] = []
    for path, leaf in leaves:
        keys = path_keys(path)
        if keys not in named:
            raise ValueError(f"{'/'.join(keys)}: this parameter has no axis names")
        spec, lines = _spec("/".join(keys), named[keys], leaf.shape, mesh, rules)
        out.append(NamedSharding(mesh, spec))
        replicated += lines
    return jax.tree_util.tree_unflatten(treedef, out), replicated


def like_params(tree: Any, abstract_params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters: optimizer states, averages.

    A leaf whose path ends in a parameter's path takes its spec when the shapes are equal; one with
    a single dimension missing (the factored moments of adafactor) takes the spec without that
    dimension; anything else (counters, placeholders) is replicated.
    """
    specs = {
        path_keys(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(abstract_params)[0],
            jax.tree.leaves(param_shardings),
            strict=True,
        )
    }

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = path_keys(path)
        # The longest suffix: `score/kernel` must not answer for `layers/score/kernel`.
        for start in range(len(keys)):
            if keys[start:] in specs:
                shape, spec = specs[keys[start:]]
                return NamedSharding(mesh, _inherit(tuple(leaf.shape), shape, spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def _inherit(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    if shape == param_shape:
        return spec
    full = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    found = {
        full[:i] + full[i + 1 :]
        for i in range(len(param_shape))
        if param_shape[:i] + param_shape[i + 1 :] == shape
    }
    # Two equal dimensions with different specs: nothing tells which one was dropped.
    return PartitionSpec(*found.pop()) if len(found) == 1 else PartitionSpec()


def state_shardings(
    axes_tree: Any, abstract_state: T, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES
) -> tuple[T, list[str]]:
    """Shardings of a whole TrainState (from `jax.eval_shape`), optimizer and extras included.

    `jit(tx.init)(params)` on its own would leave the moments on one device.

    Args:
        axes_tree: logical names of `abstract_state.params`.

    Returns:
        The state with a NamedSharding for every leaf, and the list of replicated dimensions.
    """
    state: Any = abstract_state
    params, replicated = shardings(axes_tree, state.params, mesh, rules)
    rest = {"opt_state": state.opt_state, "extra": state.extra}
    rest = like_params(rest, state.params, params, mesh)
    step = NamedSharding(mesh, PartitionSpec())
    return state.replace(step=step, params=params, **rest), replicated


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: T, mesh: Mesh) -> T:
    """A pytree of host arrays, the same on each process, to global arrays split by rows.

    Scalars are replicated. Raises ValueError where the rows do not divide among the devices.
    """
    rows = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.ndim and x.shape[0] % parts:
            raise ValueError(
                f"a batch of {x.shape[0]} rows does not divide over data x fsdp = {parts} devices"
            )
        sharding = rows if x.ndim else replicated(mesh)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Iterator[Mesh]:
    """Makes the mesh and the rule table current, so that models' logical constraints hold.

    Both are needed: with the mesh alone (or under `with mesh:`) Linen drops every logical
    constraint without a word.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(rules.items())):
        yield mesh
