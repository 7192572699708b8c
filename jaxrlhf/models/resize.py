# SPDX-License-Identifier: Apache-2.0
"""A larger vocabulary for a model that is there: new rows of the embedding and of the head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig

Params = dict[str, Any]


def enlarge_vocabulary(
    params: Params, config: ModelConfig, size: int
) -> tuple[Params, ModelConfig]:
    """The model with `size` rows of its embedding, and outputs of its head if that is its own.

    Every new row is the mean of the old ones: a new token then starts as likely as an average one,
    and no old probability moves by more than its share, where small random rows have a logit near
    zero, above most of the others. Source: Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models". The mean is taken in float32 and rounded once.

    Args:
        params: of any heads; `embed/embedding` [V, embed], `lm_head` kernel [embed, V], bias [V].

    Raises:
        ValueError: `size` is smaller than the vocabulary.
    """
    more = size - config.vocab_size
    if more < 0:
        raise ValueError(f"{size} rows are fewer than the {config.vocab_size} there are")
    if more == 0:
        return params, config

    def grown(leaf: jax.Array, axis: int) -> jax.Array:
        mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True).astype(leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(mean, more, axis=axis)], axis=axis)

    found = dict(params)
    found["embed"] = params["embed"] | {"embedding": grown(params["embed"]["embedding"], 0)}
    if "lm_head" in params:
        # The vocabulary is the last axis of the kernel and of the bias.
        found["lm_head"] = {key: grown(leaf, -1) for key, leaf in params["lm_head"].items()}
    return found, dataclasses.replace(config, vocab_size=size)
