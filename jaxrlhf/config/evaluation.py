# SPDX-License-Identifier: Apache-2.0
"""`eval.*`: how figures of an evaluation are estimated."""

from __future__ import annotations

from pydantic import Field

from jaxrlhf.config.base import (
    Coefficients,
    Counts,
    Natural,
    NonNegative,
    OpenShare,
    Positive,
    PositiveFloat,
    Section,
)


class EvaluationSection(Section):
    samples_per_prompt: Positive = Field(default=1, description="completions drawn for each prompt")
    distinct_samples: Positive = Field(
        default=1,
        description="completions of each prompt that distinct-n is counted over; it falls with "
        "the amount of text, so it must be the same wherever models are compared",
    )
    best_of: Counts = Field(
        default_factory=list,
        description="best-of-n of the proxy for these n, each at most samples_per_prompt",
    )
    tilt: Coefficients = Field(
        default_factory=list,
        description="KL coefficients for which the best reachable reward - coef x KL is estimated "
        "from the samples",
    )
    kl_coef: NonNegative | None = Field(
        default=None, description="also give the objective: proxy - kl_coef x KL to the reference"
    )
    beta: PositiveFloat = Field(
        default=0.1,
        description="of the implicit reward beta x log(model / reference) on comparisons",
    )
    baselines: bool = Field(
        default=False,
        description="beside the accuracy on comparisons also that of a bag of words learnt from "
        "data.train, the floor of every reward model",
    )
    bootstrap: Positive = Field(default=1000, description="resamples behind each interval")
    confidence: OpenShare = Field(default=0.95, description="coverage of the intervals")
    calibration_bins: Positive = Field(default=10, description="bins of the reliability table")
    samples: Natural = Field(
        default=16, description="prompts whose completions are shown in the report"
    )
