# SPDX-License-Identifier: Apache-2.0
"""Compared completions as flat rows: shared by reward models and preference losses."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.rows import row_logprobs
from jaxrlhf.ops.masking import keep, masked_sum
from jaxrlhf.types import LMBatch, PairBatch, Params


def flat_rows(batch: PairBatch) -> LMBatch:
    """The 2 B rows of B pairs: chosen and rejected of a pair side by side, on one device."""

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    return LMBatch(
        flat(batch.tokens),
        flat(batch.positions),
        flat(batch.segment_ids),
        flat(batch.completion_mask),
    )


def completion_logprobs(
    params: Params, config: ModelConfig, runtime: Runtime, batch: PairBatch
) -> jax.Array:
    """Summed completion log-probs, float32 [B, 2]: chosen, rejected."""
    rows = flat_rows(batch)
    logprobs = row_logprobs(params, config, runtime, rows)
    return masked_sum(logprobs, rows.completion_mask, axis=1).reshape(-1, 2)


def real_pairs(x: jax.Array, batch: PairBatch) -> jax.Array:
    """[B, 2] statistics with 0 in the rows of filler pairs, which weigh nothing."""
    return keep(x, jnp.broadcast_to(batch.weights[:, None] != 0, x.shape))


def summed(metrics: Mapping[str, jax.Array], batch: PairBatch) -> dict[str, Any]:
    """Per-pair metrics [B] to (sum, count) over the real pairs, and how many tokens there were."""
    real = batch.weights != 0
    found: dict[str, Any] = {
        name: (keep(jnp.asarray(value, jnp.float32), real).sum(), real.sum())
        for name, value in metrics.items()
    }
    found["tokens"] = ((batch.segment_ids > 0).sum(), 1)
    return found
