# SPDX-License-Identifier: Apache-2.0
"""`loss.*`: which loss; its own parameters are the keyword parameters of that function."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import KeyOf, Section

Weighting = Literal["token_mean", "sequence_mean", "fixed_length"]


class LMLossSection(Section):
    """Cross-entropy of the next token."""

    weights: Weighting = Field(
        default="token_mean", description="what counts alike over the global batch: tokens or rows"
    )


class RewardLossSection(Section, extra="allow"):
    """Other keys are keyword parameters of the loss, checked against its signature."""

    shorthand: ClassVar[str | None] = "name"

    name: Annotated[str, KeyOf("losses/reward.py", "REWARD_LOSSES")] = Field(
        default="pairwise", description="which loss"
    )


class PreferenceLossSection(Section, extra="allow"):
    """Other keys (beta, label_smoothing...) are keyword parameters of the loss."""

    shorthand: ClassVar[str | None] = "name"

    name: Annotated[str, KeyOf("losses/preference.py", "PREFERENCE_LOSSES")] = Field(
        default="dpo", description="which loss"
    )
