# SPDX-License-Identifier: Apache-2.0
"""`sampling.*`: how completions are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import Float, Natural, NonNegative, Positive, Section


def _stops(value: Any) -> Any:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return [value]
    return value


class SamplingSection(Section):
    temperature: NonNegative = Field(
        default=1.0, description="logits are divided by it; 0 = greedy"
    )
    top_k: Natural = Field(default=0, description="only the k most probable tokens; 0 = all")
    top_p: Annotated[Float, Gt(0), Le(1)] = Field(
        default=1.0, description="only the most probable tokens up to this mass; 1 = all"
    )
    min_p: Annotated[Float, Ge(0), Lt(1)] = Field(
        default=0.0, description="only tokens at least this share as probable as the best; 0 = all"
    )
    max_new_tokens: Positive = Field(default=128, description="longest completion, tokens")
    stop: Annotated[list[int | str], BeforeValidator(_stops)] | None = Field(
        default=None,
        description="tokens or ids that end a completion; null = the model's own and, of chats, "
        "their template's end of turn; [] = none",
    )
    batch_size: Positive | None = Field(
        default=None,
        description="rows sampled at a time, over all devices; null = 64, or the batch in ppo",
    )

    def filters(self) -> list[str]:
        """The filters that are on, as `key = value`: RL samples without any."""
        off: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [f"{k} = {getattr(self, k)}" for k, v in off.items() if getattr(self, k) != v]


class RLSamplingSection(SamplingSection):
    """As above; filters are refused: the sampler would not be the policy that is trained."""

    def contradictions(self) -> Iterator[str]:
        if on := self.filters():
            yield (
                f"{', '.join(on)}: reinforcement learning samples with temperature only; a "
                "filtered sampler is another distribution than the policy whose log-probs train"
            )
        if self.temperature == 0:
            yield "temperature = 0: a greedy sampler does not explore; use e.g. 1"


class ChatSamplingSection(SamplingSection):
    """As above, a little cooler."""

    temperature: NonNegative = Field(
        default=0.7, description="logits are divided by it; 0 = greedy"
    )
