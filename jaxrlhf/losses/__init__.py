# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions that return unreduced values and a dict of unreduced metrics.

What a stage adds up is `masking.weighted_sum(loss, weights)`, with weights that were normalised
over the global batch before it was split, so that accumulation and data parallelism stay exact.
The positional parameters of a loss name the statistics a stage computes; the keyword-only ones are
its settings in the configuration.
"""

from jaxrlhf.losses import lm, policy, preference, reward

__all__ = ["lm", "policy", "preference", "reward"]
