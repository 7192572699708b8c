# SPDX-License-Identifier: Apache-2.0
"""The embedded synthetic world: how large, and how its labelers are asked."""

from __future__ import annotations

from pydantic import Field

from jaxrlhf.config.base import Positive, Section


class WorldSizes(Section):
    """Rows of each file that is generated."""

    pretraining: Positive = Field(default=20_000, description="texts of mixed support talk")
    demonstrations: Positive = Field(
        default=4_000, description="prompts with a reply of varied quality"
    )
    prompts_train: Positive = Field(default=4_000, description="prompts for sampling and RL")
    prompts_eval: Positive = Field(default=256, description="held-out prompts")
    vocabulary: Positive = Field(
        default=320, description="largest size of the trained tokenizer, tokens"
    )
