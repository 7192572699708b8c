# SPDX-License-Identifier: Apache-2.0
"""Text from a model: filters of the distribution, one decode program, prompts in buckets."""

from jaxrlhf.sampling.batches import Sampled, make_sampler
from jaxrlhf.sampling.decode import sample

__all__ = ["Sampled", "make_sampler", "sample"]
