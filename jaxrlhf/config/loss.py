# SPDX-License-Identifier: Apache-2.0
"""`loss.*`: which loss; its own parameters are the keyword parameters of that function."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import Section

Weighting = Literal["token_mean", "sequence_mean", "fixed_length"]


class LMLossSection(Section):
    """Cross-entropy of the next token."""

    weights: Weighting = Field(
        default="token_mean", description="what counts alike over the global batch: tokens or rows"
    )


class RewardLossSection(Section, extra="allow"):
    """Other keys are keyword parameters of the loss, checked against its signature."""

    shorthand: ClassVar[str | None] = "name"

    name: str = Field(default="pairwise", description="a key of losses.reward.REWARD_LOSSES")


class PreferenceLossSection(Section, extra="allow"):
    """Other keys (beta, label_smoothing...) are keyword parameters of the loss."""

    shorthand: ClassVar[str | None] = "name"

    name: str = Field(default="dpo", description="a key of losses.preference.PREFERENCE_LOSSES")
