# SPDX-License-Identifier: Apache-2.0
"""Estimates of KL(policy || reference) from the log-probs of tokens sampled by the policy.

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html. With x ~ p and r = q(x) / p(x):

    k1 = -log r              unbiased, high variance, may be negative
    k2 = (log r)^2 / 2       biased, low variance, never negative
    k3 = (r - 1) - log r     unbiased, never negative

**The estimate of the value is not the estimate of the gradient.** Where the number is used matters
(each line is checked by exact enumeration in tests/ops/test_kl.py):

    k1 in the reward (a constant there)   its policy gradient is that of KL(p || q)
    k2 in the loss (differentiated)       the gradient of KL(p || q)
    k3 in the loss                        the gradient of KL(q || p): the other direction
    k1 in the loss                        zero: E[grad log p] = 0

This package penalises in the reward; k3 is what the metric `kl` logs where the exact sum over the
vocabulary (`ops.logprobs.exact_kl`) is not at hand.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbs = Float[Array, "*shape"]


def k1(logprobs: LogProbs, ref_logprobs: LogProbs) -> LogProbs:
    """log p - log q, nats per token: unbiased, and what the KL penalty in the reward uses."""
    return logprobs - ref_logprobs


def k2(logprobs: LogProbs, ref_logprobs: LogProbs) -> LogProbs:
    """(log p - log q)^2 / 2, nats per token: as a loss it has the gradient of KL(p || q)."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: LogProbs, ref_logprobs: LogProbs) -> LogProbs:
    """q/p - 1 - log(q/p), nats per token: unbiased and never negative, for logging.

    Overflows where the reference is e^88 times likelier than the policy (float32), as it should: a
    token sampled there is a fault.
    """
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
