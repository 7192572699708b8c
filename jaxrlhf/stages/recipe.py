# SPDX-License-Identifier: Apache-2.0
"""What a training stage tells the one runner: everything by which stages differ."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.stages.models import Adapted
from jaxrlhf.train.state import TrainState
from jaxrlhf.train.step import LossFn, TrainStep
from jaxrlhf.types import Params

# (state, step) -> (state, metrics): one unit of the loop
Advance = Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass
class Recipe:
    """A stage, ready to run. The runner adds optimizer, mesh placement, loop, checkpoints, export.

    Attributes:
        kind: what results: a language model or a reward model.
        architecture: of the model that results.
        params, axes: what trains, and the logical axis names of every leaf (or of more).
        loss_fn: (trainable, frozen, batch, key) -> (loss, metrics).
        steps: units of the loop planned: optimizer steps, or iterations of an online method.
        rows: rows of one optimizer step over all devices.
        epoch: units of the loop that one pass over the data takes.
        advance: given the compiled train step, what one unit of the loop does.
        updates: optimizer steps per unit.
        frozen: the other half of the tree, which the loss reads and nothing changes. `loss_fn`,
            `evaluate`, `sample` and what is exported see both halves as one tree.
        adapted: the base that an adapter trains on.
        prepare: statistics of the global batch, before it is split (see `make_train_step`).
        evaluate: held-out metrics of parameters.
        sample: rows for samples.jsonl of parameters at a step.
        exported: the subtree of `params` that is the resulting model ((), or ("actor",)).
        tokenizer, hf_config, pad_token_id: saved beside the result.
        show: metrics that come first on the progress line.
        notes: lines shown before the run: counts of data, what was truncated, the arithmetic.
    """

    kind: Literal["lm", "reward"]
    architecture: ModelConfig
    params: Params
    axes: Params
    loss_fn: LossFn
    steps: int
    rows: int
    epoch: float
    advance: Callable[[TrainStep], Advance]
    updates: int = 1
    frozen: Params = dataclasses.field(default_factory=dict)
    adapted: Adapted | None = None
    prepare: Callable[[Any], Any] | None = None
    evaluate: Callable[[Params, int], dict[str, float]] | None = None
    sample: Callable[[Params, int], list[dict[str, Any]]] | None = None
    exported: tuple[str, ...] = ()
    tokenizer: Any = None
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    pad_token_id: int | None = None
    show: tuple[str, ...] = ("loss",)
    notes: list[str] = dataclasses.field(default_factory=list)
