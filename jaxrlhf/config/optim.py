# SPDX-License-Identifier: Apache-2.0
"""`optim.*`: the optimizer and its schedule; schedules run in optimizer steps."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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
        default=0.0,
        description="decoupled, on matrices and embeddings (not on norms, biases, virtual tokens)",
    )
    clip_norm: PositiveFloat | None = Field(
        default=1.0,
        description="largest global norm of the accumulated gradient; null = no clipping",
    )
    rate_factors: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="factors on the learning rate by parameter path, e.g. {critic: 5}; the longest "
        "path that leads to a parameter counts",
    )
    # Of one optimizer or the other; train.optim says which, a setting nobody reads is an error.
    b1: Share | None = Field(default=None, description="adamw: decay of the first moment (0.9)")
    b2: Share | None = Field(default=None, description="adamw: decay of the second moment (0.999)")
    eps: PositiveFloat | None = Field(
        default=None, description="adamw: added to the root of the second moment (1e-8)"
    )
    moment_dtype: DType | None = Field(
        default=None, description="adamw, sgd: how the first moment is stored (float32)"
    )
    momentum: Share | None = Field(default=None, description="sgd: heavy-ball momentum (0)")
    decay_rate: Share | None = Field(
        default=None, description="adafactor: exponent of its second moment's decay (0.8)"
    )

    def settings(self) -> dict[str, Any]:
        """Those of the optimizer's own settings that were given."""
        names = ("b1", "b2", "eps", "moment_dtype", "momentum", "decay_rate")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
