# SPDX-License-Identifier: Apache-2.0
"""Model families as data: which config.json field and which tensor is which of ours. No jax here.

`table` has one entry a family, in the words of `describe`; fields that need more than a new name
(rotary positions, windows) are read by `parts`; `translate` reads and writes a whole config.json.
"""

from jaxrlhf.models.families.describe import Family, Field, Tensor
from jaxrlhf.models.families.table import FAMILIES, HARMLESS
from jaxrlhf.models.families.translate import config_from_hf, config_to_hf, supported

__all__ = [
    "FAMILIES",
    "HARMLESS",
    "Family",
    "Field",
    "Tensor",
    "config_from_hf",
    "config_to_hf",
    "supported",
]
