# SPDX-License-Identifier: Apache-2.0
"""`rl.*`: what every online method shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import KeyOf, NonNegative, Positive, Section
from jaxrlhf.config.loss import Weighting


class RLSection(Section, extra="allow"):
    """Other keys (gae_lambda, clip_eps...) are keyword parameters of the chosen functions.

    They are checked against the signatures of the estimator, the policy loss and the value loss
    once the stage is imported; the errors of both passes are shown together.
    """

    advantage: Annotated[str, KeyOf("ops/advantages.py", "ESTIMATORS")] = Field(
        default="gae", description="estimator of advantages; group is GRPO's"
    )
    policy_loss: Annotated[str, KeyOf("losses/policy.py", "POLICY_LOSSES")] = Field(
        default="ppo_clip", description="which loss the policy learns by"
    )
    samples_per_prompt: Positive = Field(
        default=1, description="completions of each prompt in a batch"
    )
    epochs: Positive = Field(default=4, description="passes over each batch of experience")
    minibatches: Positive = Field(default=4, description="optimizer steps per pass")
    kl_coef: NonNegative = Field(
        default=0.05, description="penalty per nat of KL towards the reference, inside the reward"
    )
    kl_in_reward: Literal["k1", "exact"] = Field(
        default="k1",
        description="log-ratio of the sampled token, or the KL of the whole distribution",
    )
    whiten_advantages: bool = Field(
        default=True, description="mean 0 and variance 1 over the batch's completion tokens"
    )
    value_coef: NonNegative = Field(default=0.1, description="weight of the value loss")
    entropy_coef: NonNegative = Field(default=0.0, description="weight of the entropy bonus")
    critic: Literal["policy", "reward", "shared"] = Field(
        default="policy",
        description="where values come from: a copy of the policy, a copy of the reward model, or "
        "a head on the policy's own trunk",
    )
    weights: Weighting = Field(default="token_mean", description="what counts alike in a minibatch")
