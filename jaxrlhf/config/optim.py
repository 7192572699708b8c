# SPDX-License-Identifier: Apache-2.0
"""`optim.*`: the optimizer and its schedule; schedules run in optimizer steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import DType, NonNegative, PositiveFloat, Section, Share


class OptimSection(Section):
    """`optim: NAME` is short for `optim.name: NAME`."""

    shorthand: ClassVar[str | None] = "name"

    name: Literal["adamw", "adafactor", "sgd"] = Field(
        default="adamw", description="the update rule"
    )
    learning_rate: NonNegative = Field(default=1e-4, description="its peak, after warmup")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear",
        description="decay from the peak at the end of warmup to final_ratio at the end",
    )
    warmup: NonNegative = Field(
        default=0.0,
        description="below 1: share of the run's optimizer steps; from 1: number of them",
    )
    final_ratio: Share = Field(default=0.0, description="last learning rate as a share of the peak")
    weight_decay: NonNegative = Field(
        default=0.0, description="decoupled, on matrices only (not on norms, biases, embeddings)"
    )
    clip_norm: PositiveFloat | None = Field(
        default=1.0,
        description="largest global norm of the accumulated gradient; null = no clipping",
    )
    b1: Share = Field(default=0.9, description="decay of the first moment per step")
    b2: Share = Field(default=0.999, description="decay of the second moment per step")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    moment_dtype: DType = Field(default="float32", description="how the first moment is stored")
