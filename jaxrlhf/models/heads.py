# SPDX-License-Identifier: Apache-2.0
"""What is read off hidden states: next-token logits, and scalars (rewards, values).

Outputs are float32 whatever the hidden states are. Training never calls `logits` on whole rows: it
uses ops/logprobs.py with `lm_head_kernel`, a chunk of positions at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.layers import apply_weights
from jaxrlhf.ops.placement import place
from jaxrlhf.ops.softcap import softcap

Params = dict[str, Any]


def lm_head_kernel(params: Params) -> jax.Array:
    """The output matrix [D, V]: the head's own, or the transposed embedding where tied."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed"]["embedding"].T


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Next-token logits, float32 [..., V], of hidden [..., D]."""
    kernel = place(lm_head_kernel(params).astype(hidden.dtype), None, "visit_vocab")
    contract = (((hidden.ndim - 1,), (0,)), ((), ()))
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    between = (None,) * (hidden.ndim - 2)
    hidden = place(hidden, "visit_batch", *between, None)
    found = jax.lax.dot_general(hidden, kernel, contract, preferred_element_type=accumulate)
    found = softcap(place(found, "visit_batch", *between, "visit_vocab"), config.logit_softcap)
    return place(found, "batch", *between, None)


def scalar(params: Params, hidden: jax.Array, name: str = "score") -> jax.Array:
    """A scalar head's outputs, float32 [..., R], of hidden [..., D]. `name`: "score" or "value"."""
    return apply_weights(params[name], hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)))


def last_token_index(segment_ids: jax.Array) -> jax.Array:
    """Index of each row's last real token, int32 [B]; 0 for a row of nothing but padding."""
    columns = jnp.arange(segment_ids.shape[-1])
    return jnp.max(jnp.where(segment_ids > 0, columns, 0), axis=-1)


def last_token_score(
    params: Params, hidden: jax.Array, segment_ids: jax.Array, name: str = "score"
) -> jax.Array:
    """Scores of whole rows, float32 [B, R]: the head at the last token that is not padding."""
    index = last_token_index(segment_ids)
    last = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
    return scalar(params, last, name)
