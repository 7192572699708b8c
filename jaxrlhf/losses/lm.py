# SPDX-License-Identifier: Apache-2.0
"""Language-model losses on per-token log-probs [B, T]."""

from jaxtyping import Array, Bool, Float

from jaxrlhf.ops.masking import keep

PerToken = Float[Array, "B T"]


def next_token(
    logprobs: PerToken, completion_mask: Bool[Array, "B T"]
) -> tuple[PerToken, dict[str, PerToken]]:
    """Cross-entropy of the next token, nats per token: -logprobs where trained, 0 elsewhere.

    Args:
        logprobs: [B, T] of token t given the tokens before it; anything outside the mask.
        completion_mask: [B, T], True on the tokens that are trained.
    """
    loss = keep(-logprobs, completion_mask)
    return loss, {"nll": loss}


LM_LOSSES = {"next_token": next_token}
