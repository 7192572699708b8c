# SPDX-License-Identifier: Apache-2.0
"""Training some of a model's own parameters: its last layers, its heads, or what a pattern names.

Layers are stacked, so the last n of them are the last n rows of every stacked leaf: both halves of
the tree then have a leaf at the same path, which `trees.join` lays one after the other.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.trees import Path
from jaxrlhf.models.config import ModelConfig

Params = dict[str, Any]
FIELD = "train.only"
HEADS = ("lm_head", "score", "value")
_LAST = re.compile(r"last ([0-9]+)")


@dataclass(frozen=True)
class Only:
    """Which parameters train. Heads of scalars are what is learnt, so they always do.

    Attributes:
        last: so many layers, counted from the end.
        heads: the output head too, where it is a matrix of its own.
        patterns: regular expressions; one that matches the beginning of a leaf's path trains it.
    """

    last: int = 0
    heads: bool = False
    patterns: tuple[str, ...] = ()

    def _whole(self, path: Path) -> bool:
        name = "/".join(path)
        return (
            path[0] in HEADS[1:]
            or (self.heads and path[0] in HEADS)
            or any(re.match(pattern, name) for pattern in self.patterns)
        )

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what trains, what is frozen) of one model's tree of arrays or shapes.

        Raises:
            ConfigError: nothing would train, or a pattern names nothing.
        """
        names: list[str] = []

        def halves(tree: Params, path: Path) -> tuple[Params, Params]:
            yes: Params = {}
            no: Params = {}
            for key, value in tree.items():
                here = (*path, key)
                if isinstance(value, dict):
                    parts = halves(value, here)
                elif self._whole(here):
                    parts = (value, {})
                elif here[0] == "layers" and self.last:
                    parts = _cut(value, self.last)
                else:
                    parts = ({}, value)
                if not isinstance(value, dict):
                    names.append("/".join(here))
                for half, part in zip((yes, no), parts, strict=True):
                    if not isinstance(part, dict) or part:
                        half[key] = part
            return yes, no

        found = halves(params, ())
        for pattern in self.patterns:
            if not any(re.match(pattern, name) for name in names):
                raise ConfigError(
                    f"{FIELD}: {pattern!r} matches no parameter; there are {', '.join(names)}"
                )
        if not found[0]:
            raise ConfigError(
                f"{FIELD} = heads: this model's head is its embedding (tied), so nothing would "
                "train; name layers ('last 2') or a pattern ('embed')"
            )
        return found


def _cut(leaf: Any, last: int) -> tuple[Any, Any]:
    """(the last rows, those before them) of an array or a shape."""
    first = leaf.shape[0] - last
    if first <= 0:
        return leaf, {}
    if isinstance(leaf, jax.ShapeDtypeStruct):
        rest = leaf.shape[1:]
        shapes = [jax.ShapeDtypeStruct((size, *rest), leaf.dtype) for size in (last, first)]
        return shapes[0], shapes[1]
    return leaf[first:], leaf[:first]


def parse_only(texts: tuple[str, ...], config: ModelConfig) -> Only:
    """`last N`, `heads` and patterns to what they mean for an architecture.

    Raises:
        ConfigError: more layers than there are, or a text that is no regular expression.
    """
    last, heads, patterns = 0, False, []
    for text in texts:
        if text == "heads":
            heads = True
        elif found := _LAST.fullmatch(text):
            last = int(found[1])
            if not 1 <= last <= config.num_layers:
                raise ConfigError(
                    f"{FIELD}: {text!r} of {config.num_layers} layers; say 1 to {config.num_layers}"
                )
        else:
            try:
                re.compile(text)
            except re.error as error:
                raise ConfigError(
                    f"{FIELD}: {text!r} is neither `last N` nor `heads` nor a regular expression: "
                    f"{error}"
                ) from error
            patterns.append(text)
    return Only(last, heads, tuple(patterns))
