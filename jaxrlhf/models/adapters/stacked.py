# SPDX-License-Identifier: Apache-2.0
"""LoRA's matrices of all experts of a layer as PEFT keeps them (`target_parameters`).

transformers holds the experts' kernels as one parameter [E, out, in]. PEFT gives it one A of
[E r, in], expert after expert, and one B of [out, r E], in which the experts' columns alternate.
Several such parameters of one module are wrapped around each other, the later ones outside.
"""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.models.adapters.modules import Module


def stored(value: np.ndarray, leaf: str, rank: int) -> np.ndarray:
    """Our [E,in,R] or [E,R,out], of which the first `rank` count, as PEFT's."""
    if leaf == "lora_a":
        cut = value[:, :, :rank].transpose(0, 2, 1)
        return cut.reshape(-1, cut.shape[-1])
    cut = value[:, :rank].transpose(2, 1, 0)
    return cut.reshape(cut.shape[0], -1)


def loaded(value: np.ndarray, leaf: str, experts: int) -> np.ndarray:
    """PEFT's as our [E,in,r] or [E,r,out]: the inverse of `stored`."""
    if leaf == "lora_a":
        return value.reshape(experts, -1, value.shape[-1]).transpose(0, 2, 1)
    return value.reshape(value.shape[0], -1, experts).transpose(2, 1, 0)


def wrapper(module: Module, others: Sequence[Module], layer: int) -> str:
    """The name of the module that holds A and B, given the other adapted parameters there."""
    name, _ = module.name(layer).rsplit(".", 1)
    after = module.parts[0].endswith("/down")
    inside = not after and any(other.experts and other != module for other in others)
    return f"{name}.base_layer" if inside else name
