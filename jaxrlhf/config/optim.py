# SPDX-License-Identifier: Apache-2.0
"""`optim.*`: the optimizer and its schedule; schedules run in optimizer steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import DType, NonNegative, PositiveFloat, Section, Share


class OptimSection(Section):
    """`optim: NAME` is short for `optim.name: NAME`."""

    shorthand: ClassVar[str | None] = "name"

    name: Literal["adamw", "adafactor", "sgd"] = Field("adamw", description="the update rule")
    learning_rate: NonNegative = Field(1e-4, description="its peak, after warmup")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="decay from the peak at the end of warmup to final_ratio at the end"
    )
    warmup: NonNegative = Field(
        0.0, description="below 1: share of the run's optimizer steps; from 1: number of them"
    )
    final_ratio: Share = Field(0.0, description="last learning rate as a share of the peak")
    weight_decay: NonNegative = Field(
        0.0, description="decoupled, on matrices only (not on norms, biases, embeddings)"
    )
    clip_norm: PositiveFloat | None = Field(
        1.0, description="largest global norm of the accumulated gradient; null = no clipping"
    )
    b1: Share = Field(0.9, description="decay of the first moment per step")
    b2: Share = Field(0.999, description="decay of the second moment per step")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    moment_dtype: DType = Field("float32", description="how the first moment is stored")
