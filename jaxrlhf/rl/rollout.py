# SPDX-License-Identifier: Apache-2.0
"""Prompts to a Rollout: which rows an iteration samples, and with which keys.

The sampler itself is `sampling.sample`. Here temperature is its only filter: a policy that samples
with top-k, top-p or min-p is not the distribution whose log-probs the update differentiates.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.sampling.decode import sample
from jaxrlhf.types import Rollout


def first_of_their_kind(tokens: jax.Array, completion_mask: jax.Array, group: int) -> jax.Array:
    """bool [B]: rows whose completion is that of no row before it in its group.

    Args:
        tokens, completion_mask: [B, T], the completions of a prompt in `group` rows side by side.
    """
    said = jnp.where(completion_mask, tokens, -1).reshape(-1, group, tokens.shape[1])
    equal = (said[:, :, None] == said[:, None]).all(-1)  # [prompts, group, group]
    before = jnp.tril(jnp.ones((group, group), bool), -1)
    return ~(equal & before).any(-1).reshape(-1)


def roll_out(
    params: Any,
    config: ModelConfig,
    runtime: Runtime,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    policy_step: jax.Array | int = 0,
) -> Rollout:
    """`samples_per_prompt` completions of each [B, P] prompt, those of a prompt side by side.

    Raises ValueError for temperature 0: a greedy policy has no log-probs to differentiate.
    """
    if not temperature > 0:
        raise ValueError(
            f"sampling.temperature = {temperature}: learning from samples needs a positive one"
        )
    return sample(
        params,
        config,
        runtime,
        prompt_tokens,
        prompt_lengths,
        key,
        jnp.arange(prompt_tokens.shape[0] * samples_per_prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=stop_ids,
        samples_per_prompt=samples_per_prompt,
        policy_step=policy_step,
    )
