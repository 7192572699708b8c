# SPDX-License-Identifier: Apache-2.0
"""Preference losses: pure functions of sequence log-probabilities.

Dimension key: B pairs. Losses return per-pair values [B]; summing is the stage's business, so
accumulation and data parallelism stay exact. A filler pair (weight 0) must come with finite
statistics: `masking.keep(x, weights != 0)`.
"""

from typing import Annotated

import jax
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float

PerPair = Float[Array, "B"]


def dpo(
    chosen: PerPair,
    rejected: PerPair,
    ref_chosen: PerPair,
    ref_rejected: PerPair,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0,
) -> tuple[PerPair, dict[str, PerPair]]:
    """Direct Preference Optimization.

        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss   = -(1 - eps) * log sigmoid(margin) - eps * log sigmoid(-margin)

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; eps > 0 is the
    "conservative DPO" of Mitchell 2023.

    Args:
        chosen, rejected: [B] completion log-probabilities under the policy, summed
            over unmasked tokens (not averaged: DPO is defined on the sum).
        ref_chosen, ref_rejected: [B] the same under the frozen reference.
        beta: strength of the pull towards the reference, above 0; larger stays closer.
        label_smoothing: eps, the assumed rate of flipped labels, in [0, 0.5).
    """
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    loss -= label_smoothing * jax.nn.log_sigmoid(-margin)
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),
    }
    return loss, metrics


PREFERENCE_LOSSES = {"dpo": dpo}
