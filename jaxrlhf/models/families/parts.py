# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model see only a window, which rotate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxrlhf.models.config import ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Windows:
    """sliding_window, and which layers have it.

    Attributes:
        default: the window where config.json does not say.
        switch: the window counts only with use_sliding_window.
        layers: which layers, where config.json has no layer_types: all; those from
            max_window_layers on; all but every n-th, n = `every` (or sliding_window_pattern); those
            that do not rotate. "all" has no layer_types.
    """

    default: int | None = None
    switch: bool = False
    layers: Literal["all", "late", "pattern", "unrotated"] = "all"
    every: int = 2

    @property
    def known(self) -> frozenset[str]:
        names = {"sliding_window"}
        names |= {"use_sliding_window", "max_window_layers"} if self.switch else set()
        names |= {"layer_types"} if self.layers != "all" else set()
        if self.layers == "pattern":
            names |= {"sliding_window_pattern", "_sliding_window_pattern"}
        return frozenset(names)

    def read(self, hf: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        window = hf.get("sliding_window", self.default)
        if self.switch and not hf.get("use_sliding_window"):
            window = None
        count = values.get("num_layers")
        if not isinstance(count, int):
            return  # somebody else's problem
        types = hf.get("layer_types") if "layer_types" in self.known else None
        if types is None:
            types = [SLIDING if self._has(i, hf, values) else FULL for i in range(count)]
        elif not isinstance(types, list) or any(t not in (SLIDING, FULL) for t in types):
            problems.append(f"layer_types = {types!r}: a list of {SLIDING!r} and {FULL!r}")
            return
        elif len(types) != count:
            problems.append(f"layer_types has {len(types)} entries for {count} layers")
            return
        elif window is None and SLIDING in types:
            problems.append(f"layer_types has {SLIDING!r}, but no sliding_window is in use")
        if window is not None and SLIDING in types:
            values["window"] = window
            values["window_layers"] = tuple(t == SLIDING for t in types)

    def _has(self, layer: int, hf: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        if self.layers == "late":
            return layer >= hf.get("max_window_layers", 28)
        if self.layers == "pattern":
            n = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or self.every
            return bool((layer + 1) % n)
        if self.layers == "unrotated":
            rotates = values.get("rope_layers") or ()
            return bool(rotates) and not rotates[layer]
        return True

    def write(self, config: ModelConfig) -> dict[str, Any]:
        hf: dict[str, Any] = {"sliding_window": config.window}
        if self.switch:
            hf["use_sliding_window"] = config.window is not None
        if self.layers == "late":
            hf["max_window_layers"] = config.num_layers
        if self.layers != "all":
            each = (config.has_window(layer) for layer in range(config.num_layers))
            hf["layer_types"] = [SLIDING if has else FULL for has in each]
        return hf


@dataclass(frozen=True)
class RopeLayers:
    """no_rope_layers: one number a layer, 1 where it does rotate; else all but every n-th do."""

    every: int = 4
    known = frozenset({"no_rope_layers", "no_rope_layer_interval"})

    def read(self, hf: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        count = values.get("num_layers")
        if not isinstance(count, int):
            return
        rotates = hf.get("no_rope_layers")
        if rotates is None:
            every = hf.get("no_rope_layer_interval") or self.every
            rotates = [bool((layer + 1) % every) for layer in range(count)]
        if not isinstance(rotates, list) or len(rotates) != count:
            problems.append(f"no_rope_layers = {rotates!r}: a list of {count} numbers, 0 or 1")
            return
        values["rope_layers"] = tuple(bool(value) for value in rotates)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        rotates = config.rope_layers or (True,) * config.num_layers
        return {"no_rope_layers": [int(value) for value in rotates]}
