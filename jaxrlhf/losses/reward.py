# SPDX-License-Identifier: Apache-2.0
"""Losses of reward models: pure functions of the scores of compared completions. B pairs."""

import jax
from jaxtyping import Array, Float

PerPair = Float[Array, "B"]


def pairwise(
    chosen: PerPair,
    rejected: PerPair,
    margin: PerPair,
    *,
    margin_scale: float = 1.0,
    center_coef: float = 0.0,
) -> tuple[PerPair, dict[str, PerPair]]:
    """Bradley-Terry: the chosen completion scores higher, by `margin` if that is known.

        loss = -log sigmoid(chosen - rejected - margin_scale * margin)
               + center_coef * (chosen + rejected)^2

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (without the K-wise factor, which is a
    weight); margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; centring: Eisenstein et
    al. 2023, arXiv:2312.09244, section 5.

    Args:
        chosen, rejected: [B] scores. Only their difference matters unless `center_coef` > 0.
        margin: [B] how much better chosen is, in units of the score; 0 where unknown.
        margin_scale: 0 ignores the margins.
        center_coef: pulls the two scores' mean to 0, so that scores of different models or prompts
            can be compared; 0 leaves the offset free.
    """
    difference = chosen - rejected
    loss = -jax.nn.log_sigmoid(difference - margin_scale * margin)
    loss += center_coef * (chosen + rejected) ** 2
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": difference,
        "rewards/accuracies": (difference > 0) + 0.5 * (difference == 0),
    }
    return loss, metrics


REWARD_LOSSES = {"pairwise": pairwise}
