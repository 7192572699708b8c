# SPDX-License-Identifier: Apache-2.0
"""One tree of parameters in two halves: what trains, and what nothing changes.

Both are nested dicts with the keys of the whole; joining them copies nothing, unless they hold
different layers of one stacked leaf.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
Path = tuple[str, ...]


def join(first: Params, second: Params) -> Params:
    """The whole tree of two halves: a stacked leaf that both have is the second's layers, then
    those of the first.

    Raises:
        ValueError: a leaf that both have and that is not stacked over layers.
    """
    if not second:
        return first

    def both(a: Any, b: Any, path: Path) -> Any:
        if not isinstance(a, dict) or not isinstance(b, dict):
            if "layers" in path and not isinstance(a, dict) and a.shape[1:] == b.shape[1:]:
                return jnp.concatenate([b, a])
            raise ValueError(f"{'/'.join(path)} is in both halves of the parameters")
        found = dict(b)
        for key, value in a.items():
            found[key] = both(value, b[key], (*path, key)) if key in b else value
        return found

    return both(first, second, ())


def split(params: Params, chosen: Callable[[Path], bool]) -> tuple[Params, Params]:
    """(the leaves whose path is chosen, the others); a dict without leaves is in neither."""

    def halves(tree: Params, path: Path) -> tuple[Params, Params]:
        yes: Params = {}
        no: Params = {}
        for key, value in tree.items():
            here = (*path, key)
            if not isinstance(value, dict):
                (yes if chosen(here) else no)[key] = value
                continue
            for half, part in zip((yes, no), halves(value, here), strict=True):
                if part:
                    half[key] = part
        return yes, no

    return halves(params, ())


def with_dropout(params: Params, key: jax.Array, rate: float) -> Params:
    """The tree with keys for dropout beside every `lora_a`: a forward pass while training.

    Keys are leaves too, so that a scan over layers hands each layer its own.
    """

    def walk(tree: Params, path: Path) -> Params:
        found = {k: walk(v, (*path, k)) if isinstance(v, dict) else v for k, v in tree.items()}
        if "lora_a" in tree:
            lead = tree["lora_a"].shape[:-2]
            own = jax.random.fold_in(key, number[path])
            keys = jax.random.key_data(jax.random.split(own, lead) if lead else own)
            found |= {"dropout_key": keys, "dropout_keep": jnp.full(lead, 1 - rate, jnp.float32)}
        return found

    number = {path: i for i, path in enumerate(sorted(places(params, "lora_a")))}
    return walk(params, ())


def places(params: Params, name: str, path: Path = ()) -> list[Path]:
    """Paths of the dicts that have a leaf of this name."""
    found = [path] if name in params else []
    for key, value in params.items():
        if isinstance(value, dict):
            found += places(value, name, (*path, key))
    return found


def at(tree: Params, path: str) -> Any:
    """What stands at a path of keys joined by "/"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def put(tree: Params, path: str, leaf: Any) -> None:
    """Sets the leaf at a path of keys joined by "/", in place."""
    *outer, last = path.split("/")
    for key in outer:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
