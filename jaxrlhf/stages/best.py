# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a run is its best: the figure it is chosen by, and which way that goes."""

from typing import Literal

from jaxrlhf.config.schema import nearest
from jaxrlhf.config.train import TrainSection
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation.results import METRICS, better

# What `train.keep_best=loss` means: the figure of a stage's evaluation that is its loss.
LOSSES = {
    "pretrain": "nats_per_token",
    "sft": "nats_per_token",
    "reward": "pair_loss",
    "dpo": "pair_loss",
}


def criterion(command: str, train: TrainSection) -> tuple[str | None, Literal["max", "min"]]:
    """(figure, "max" or "min") by which a stage's checkpoints are ranked; (None, "max") = not.

    That the evaluations have the figure is seen at the first of them.

    Raises:
        ConfigError: which values are better is neither known nor said.
    """
    if train.keep_best is None:
        return None, "max"
    figure = LOSSES.get(command, "loss") if train.keep_best == "loss" else train.keep_best
    if train.best_is is not None:
        return figure, train.best_is
    if way := better(figure):
        return figure, "max" if way == "higher" else "min"
    known = tuple(name for name in METRICS if better(name))
    close = nearest(figure, known)
    hint = f"did you mean {close}? Else give" if close else "give"
    raise ConfigError(
        f"train.keep_best = {figure}: nothing says whether a larger or a smaller one is better; "
        f"{hint} train.best_is=max or min (known of {', '.join(known)})"
    )
