# SPDX-License-Identifier: Apache-2.0
"""Perplexity from summed log-probabilities; whoever owns the model adds them up."""

import math

import numpy as np

from jaxrlhf.evaluation.intervals import bootstrap_mean
from jaxrlhf.evaluation.results import Interval


def perplexity(
    logprob_sums,
    token_counts,
    *,
    byte_counts=None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Loss per token over a corpus, its exponential, and intervals over documents.

        nats_per_token = -sum(logprob_sums) / sum(token_counts),  perplexity = exp(nats_per_token)

    Args:
        logprob_sums: [N] natural log-probability of each document's scored tokens, summed.
        token_counts: [N] how many tokens that was; a document with none (empty, all masked) counts
            for nothing.
        byte_counts: [N] UTF-8 bytes of the scored text; adds `bits_per_byte`, the only one of these
            that may be compared between tokenizers.

    Returns:
        metrics and intervals of this `level` under the names of `results.METRICS`. Documents, not
        tokens, are resampled: tokens of one document are not independent.
    """
    sums = np.asarray(logprob_sums, np.float64)
    tokens = np.asarray(token_counts, np.float64)
    if sums.shape != tokens.shape or not tokens.sum() > 0:
        raise ValueError(f"{sums.shape} sums, {tokens.shape} counts, {tokens.sum()} tokens in all")
    kept = tokens > 0
    sums, tokens = sums[kept], tokens[kept]
    nats = float(-sums.sum() / tokens.sum())
    options = {"samples": samples, "level": level, "seed": seed}
    low, high = bootstrap_mean(-sums / tokens, tokens, **options)
    metrics = {"nats_per_token": nats, "perplexity": _exp(nats)}
    intervals = {"nats_per_token": (low, high), "perplexity": (_exp(low), _exp(high))}
    if byte_counts is not None:
        size = np.asarray(byte_counts, np.float64)[kept]
        metrics["bits_per_byte"] = float(-sums.sum() / size.sum() / math.log(2))
        intervals["bits_per_byte"] = bootstrap_mean(-sums / size / math.log(2), size, **options)
    return metrics, intervals


def _exp(x: float) -> float:
    """exp that says inf instead of raising: a ruined model still gets its report."""
    return math.exp(x) if x < 709 else math.inf
