# SPDX-License-Identifier: Apache-2.0
"""Maths on arrays: no models, no jit, no configuration objects."""

from jaxrlhf.ops import advantages, kl, logprobs, masking, rewards

__all__ = ["advantages", "kl", "logprobs", "masking", "rewards"]
