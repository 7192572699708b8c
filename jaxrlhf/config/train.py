# SPDX-License-Identifier: Apache-2.0
"""`train.*`: how long, in which batches, and what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import (
    FREE,
    GROW,
    RESULT,
    OpenShare,
    Positive,
    PositiveFloat,
    Section,
    as_list,
)
from jaxrlhf.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Rows of one optimizer step: batch_size = microbatch_size x accumulation x shards."""

    batch_size: int
    microbatch_size: int
    accumulation: int
    shards: int

    def __str__(self) -> str:
        return (
            f"batch_size {self.batch_size} = {self.microbatch_size} rows per shard and pass x "
            f"{self.accumulation} passes x {self.shards} data shards"
        )


def _figure(value: Any) -> Any:
    """The name of an evaluation's figure, without the prefix that TRL and metrics.jsonl give it."""
    if not isinstance(value, str):
        return value
    return value.removeprefix("eval_").removeprefix("eval/")


class TrainSection(Section):
    """Length of the run, batches, evaluation and checkpoints; in ppo a step is an iteration."""

    steps: Annotated[Positive, GROW] | None = Field(
        default=None, description="optimizer steps (in ppo: iterations); null = given by epochs"
    )
    epochs: Annotated[PositiveFloat, GROW] | None = Field(
        default=None, description="passes over data.train; null = given by steps, or 1"
    )
    batch_size: Positive | None = Field(
        default=64,
        description="rows per optimizer step, over all devices (in ppo: episodes an iteration)",
    )
    microbatch_size: Positive | None = Field(
        default=None, description="rows per data shard and pass; null = all of its rows in one pass"
    )
    accumulation: Positive | None = Field(
        default=None,
        description="passes per step; null = derived from batch_size and microbatch_size",
    )
    eval_every: Annotated[Positive, FREE] | None = Field(
        default=None, description="steps between evaluations; null = only at the end"
    )
    save_every: Annotated[Positive, FREE] | None = Field(
        default=None, description="steps between checkpoints; null = ten a run"
    )
    log_every: Annotated[Positive, FREE] = Field(
        default=1, description="steps between lines of metrics, each the mean since the last"
    )
    sample_every: Annotated[Positive, FREE] | None = Field(
        default=None, description="steps between lines of samples; null = with every evaluation"
    )
    keep_last: Annotated[Positive, FREE] = Field(default=2, description="newest checkpoints kept")
    keep_best: Annotated[str, BeforeValidator(_figure), RESULT] | None = Field(
        default=None,
        description="a figure of the evaluations (loss: the stage's own): each is saved, the best "
        "checkpoint by it is kept and is the result",
    )
    best_is: Annotated[Literal["max", "min"], RESULT] | None = Field(
        default=None,
        description="whether a larger or a smaller keep_best is better; null = as is known of it",
    )
    only: Annotated[list[str], BeforeValidator(as_list)] = Field(
        default_factory=list,
        description="what trains of the model's own parameters: last N (layers), heads, regular "
        "expressions on their paths (layers/mlp, embed); [] = all",
    )
    ema_decay: OpenShare | None = Field(
        default=None, description="keep a moving average of the weights with this decay per step"
    )
    max_nonfinite: Annotated[Positive, FREE] = Field(
        default=3,
        description="stop after so many steps in a row whose loss or gradient is not finite",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derived_batch(cls, data: Any) -> Any:
        """With rows a pass and passes a step given, the batch follows once the mesh is known."""
        if (
            isinstance(data, dict)
            and "batch_size" not in data
            and data.get("accumulation") is not None
            and data.get("microbatch_size") is not None
        ):
            return {**data, "batch_size": None}
        return data

    def contradictions(self) -> Iterator[str]:
        if self.steps is not None and self.epochs is not None:
            yield f"steps = {self.steps} and epochs = {self.epochs}: give one of them"
        rows, passes = self.microbatch_size, self.accumulation
        if self.batch_size is None:
            if rows is None or passes is None:
                yield "batch_size may be null only with microbatch_size and accumulation"
        elif self.batch_size % ((rows or 1) * (passes or 1)):
            parts = [("microbatch_size", rows), ("accumulation", passes)]
            given = " x ".join(f"{key} = {n}" for key, n in parts if n is not None)
            yield f"batch_size = {self.batch_size} must be a multiple of {given}"

    def batch_plan(self, shards: int) -> BatchPlan:
        """The arithmetic of a step once the mesh is known; `shards` = mesh data x fsdp."""
        rows, passes, total = self.microbatch_size, self.accumulation, self.batch_size
        if total is None:
            assert rows is not None
            assert passes is not None
            total = rows * passes * shards
        if rows is None:
            rows = total // ((passes or 1) * shards)
        if passes is None:
            passes = total // (rows * shards) if rows else 0
        if not rows or rows * passes * shards != total:
            raise ConfigError(
                f"train.batch_size = {total} cannot be split: {rows} rows per shard and pass x "
                f"{passes} passes x {shards} data shards = {rows * passes * shards}; "
                f"make batch_size a multiple of {max(rows, 1) * shards}"
            )
        return BatchPlan(total, rows, passes, shards)
