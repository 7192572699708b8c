# SPDX-License-Identifier: Apache-2.0
"""The best checkpoint: by which figure, which way, and that it is what a run results in."""

import pytest
from tiny import metrics, run

from jaxrlhf.config.train import TrainSection
from jaxrlhf.errors import ConfigError
from jaxrlhf.stages.best import criterion
from jaxrlhf.stages.rundir import read_summary
from jaxrlhf.train.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("stage", "given", "wanted"),
    [
        ("sft", {}, (None, "max")),
        ("sft", {"keep_best": "nats_per_token"}, ("nats_per_token", "min")),
        ("sft", {"keep_best": "eval_loss"}, ("nats_per_token", "min")),  # as TRL calls it
        ("dpo", {"keep_best": "loss"}, ("pair_loss", "min")),
        ("reward", {"keep_best": "eval/accuracy"}, ("accuracy", "max")),
        ("ppo", {"keep_best": "reward"}, ("reward", "max")),
        ("ppo", {"keep_best": "gold/helpful"}, ("gold/helpful", "max")),
        ("ppo", {"keep_best": "kl", "best_is": "min"}, ("kl", "min")),
        ("reward", {"keep_best": "accuracy", "best_is": "min"}, ("accuracy", "min")),
    ],
)
def test_a_figure_goes_its_own_way_unless_another_is_said(stage, given, wanted):
    assert criterion(stage, TrainSection(**given)) == wanted


@pytest.mark.parametrize(
    ("figure", "hint"), [("kl", "give train.best_is=max or min"), ("acuracy", "mean accuracy")]
)
def test_a_way_that_is_not_known_is_asked_for(figure, hint):
    with pytest.raises(ConfigError, match=rf"keep_best = {figure}: .*{hint}"):
        criterion("sft", TrainSection(keep_best=figure))


def test_the_lowest_loss_is_the_result(tiny, models, tmp_path):
    """At a rate that overshoots: the loss rises in the end."""
    more = {"train.keep_best": "loss", "train.eval_every": 4, "train.keep_last": 1}
    keys = tiny.base | more | {"optim.learning_rate": 0.3, "train.steps": 8}
    assert run("pretrain", tmp_path, **keys).exit_code == 0
    losses = {line["step"]: line["nats_per_token"] for line in metrics(tmp_path, "eval")[1:]}
    best = min(losses, key=losses.__getitem__)
    assert best != 8, losses
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [best, 8]
    summary = read_summary(tmp_path)
    assert summary is not None
    assert summary["content"] == checkpoints.manifest(best)["content"]["params"]
