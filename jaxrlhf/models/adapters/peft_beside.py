# SPDX-License-Identifier: Apache-2.0
"""PEFT's folders of soft prompts and prefixes, and ours of bottlenecks, which PEFT does not have.

PEFT keeps either kind of virtual tokens as one tensor `prompt_embeddings`: [n,D] of a soft prompt,
[n, L*2*K*H] of a prefix, for each layer its keys, then its values. A bottleneck's tensors are our
leaves, stacked over layers, under our names with dots.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters.beside import PREFIX_PATHS, PROMPT_PATH, Shapes, shapes_beside
from jaxrlhf.models.adapters.bottleneck import PLACES
from jaxrlhf.models.config import ModelConfig

KINDS = {"PROMPT_TUNING": "soft_prompt", "PREFIX_TUNING": "prefix", "BOTTLENECK": "bottleneck"}
NOTE = "peft_cannot_read_this"

_VIRTUAL = frozenset(
    """
    num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers
    """.split()  # noqa: SIM905
)
# Fields that are read, and those that say only how training began. PEFT stores a projected
# prefix as the keys and values that the projection makes of it, so nothing is left to project.
FIELDS = {
    "PROMPT_TUNING": _VIRTUAL
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
    | {"tokenizer_kwargs"},
    "PREFIX_TUNING": _VIRTUAL | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "BOTTLENECK": frozenset({"width", "target_modules", "non_linearity", NOTE}),
}


def config_problems(peft: Mapping[str, Any]) -> Iterator[str]:
    """What of an adapter_config.json of these kinds we cannot compute."""
    bottleneck = peft["peft_type"] == "BOTTLENECK"
    size = "width" if bottleneck else "num_virtual_tokens"
    value = peft.get(size)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        yield f"{size} = {value!r}: a positive integer"
    if bottleneck and peft.get("non_linearity") != "gelu":
        yield f"non_linearity = {peft.get('non_linearity')!r}: gelu"
    if not bottleneck and peft.get("num_transformer_submodules") not in (None, 1):
        yield "num_transformer_submodules: 1, a decoder"


def _dimensions(kind: str, config: ModelConfig) -> dict[str, int]:
    """What PEFT records of the base: a prefix has the heads of keys and values."""
    if kind == "soft_prompt":
        heads, dim = config.num_heads, config.hidden_size
    else:
        heads, dim = config.kv_heads, config.kv_heads * config.head_size
    return {"token_dim": dim, "num_attention_heads": heads, "num_layers": config.num_layers}


def shapes_of(peft: Mapping[str, Any], config: ModelConfig, where: str) -> Shapes:
    """The leaves that an adapter_config.json describes, on an architecture.

    Raises:
        ModelError: it is of another model.
    """
    kind = KINDS[peft["peft_type"]]
    if kind == "bottleneck":
        targets = tuple(peft["target_modules"])
        if wrong := [name for name in targets if name not in PLACES]:
            raise ModelError(f"{where}: target_modules: {wrong[0]!r}: one of {', '.join(PLACES)}")
        return shapes_beside(
            kind, config, tokens=0, width=peft["width"], where=targets, field=where
        )
    for name, ours in _dimensions(kind, config).items():
        # The heads of a soft prompt do not matter to it.
        if peft.get(name, ours) not in (ours, None) and (kind, name) != (
            "soft_prompt",
            "num_attention_heads",
        ):
            raise ModelError(
                f"{where}: {name} = {peft[name]}, of this {config.family} model {ours}: is this "
                "another model's adapter?"
            )
    return shapes_beside(
        kind, config, tokens=peft["num_virtual_tokens"], width=0, where=(), field=where
    )


def config_of(kind: str, shapes: Shapes, config: ModelConfig) -> dict[str, Any]:
    """What adapter_config.json says of these leaves; the inverse of `shapes_of`."""
    if kind == "bottleneck":
        paths = dict(shapes)
        there = [place for place in PLACES if f"layers/{place}_bottleneck/up/bias" in paths]
        return {
            "peft_type": "BOTTLENECK",
            NOTE: "PEFT has no bottleneck adapters; jaxrlhf reads this folder",
            "width": paths[f"layers/{there[0]}_bottleneck/down/bias"][-1],
            "target_modules": there,
            "non_linearity": "gelu",
        }
    settings = {
        "num_virtual_tokens": shapes[0][1][-2],
        **_dimensions(kind, config),
        "num_transformer_submodules": 1,
    }
    if kind == "soft_prompt":
        return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **settings}
    return {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **settings}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a folder: its name and shape there, and the paths of its leaves."""

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layers: int

    def stored(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The leaves [L,n,K*H] of a prefix as PEFT has them; others as they are."""
        if len(leaves) == 1:
            return leaves[0]
        both = np.stack(leaves, axis=1)  # [L,2,n,K*H]
        return np.ascontiguousarray(both.transpose(2, 0, 1, 3).reshape(self.shape))

    def leaves(self, value: np.ndarray) -> list[np.ndarray]:
        """The inverse of `stored`."""
        if len(self.paths) == 1:
            return [value]
        both = value.reshape(value.shape[0], self.layers, 2, -1).transpose(2, 1, 0, 3)
        return [np.ascontiguousarray(one) for one in both]


def stored_tensors(shapes: Shapes) -> tuple[StoredTensor, ...]:
    """The tensors of a folder with these leaves."""
    if not shapes:
        return ()
    first, shape = shapes[0]
    if first == PROMPT_PATH:
        return (StoredTensor("prompt_embeddings", shape, (first,), 0),)
    if first == PREFIX_PATHS[0]:
        layers, count, size = shape
        whole = (count, layers * 2 * size)
        return (StoredTensor("prompt_embeddings", whole, PREFIX_PATHS, layers),)
    return tuple(StoredTensor(p.replace("/", "."), shape, (p,), 0) for p, shape in shapes)
