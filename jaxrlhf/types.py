# SPDX-License-Identifier: Apache-2.0
"""The pytrees that flow between data, models, losses and stages.

Dimension key, used everywhere in this package:

    B batch rows   T positions  S cache columns     P prompt positions  C completion positions
    D model width  N heads      K key/value heads   H head size  F mlp width  V vocabulary
    L layers

Alignment: a per-token array is [B, T] and slot t speaks of token t. `logprobs[:, t]` is of token t
given the tokens before it, `values[:, t]` is the value before token t was chosen; slot 0 is unused.
Rows are right-padded; `segment_ids` is 0 on padding and 1, 2... on the documents of a row, and
`positions` restart at 0 with each document. Masks come from spans recorded when a row was built or
sampled; nothing here is ever derived by comparing token ids.
"""

from typing import Any

import flax.struct
import jax

Params = Any  # nested dict of arrays
Array = jax.Array | Any  # jax or numpy, on its way to the device


@flax.struct.dataclass
class LMBatch:
    """Rows of text for a language-model loss."""

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T]
    segment_ids: Array  # int32 [B, T], 0 = padding
    completion_mask: Array  # bool [B, T], True where the token is trained or scored
    weights: Array | None = None  # float32 [B, T], sums to 1 over the global batch


@flax.struct.dataclass
class PairBatch:
    """Compared completions; index 0 of the second axis is the chosen row, 1 the rejected one."""

    tokens: Array  # int32 [B, 2, T]
    positions: Array  # int32 [B, 2, T]
    segment_ids: Array  # int32 [B, 2, T], 0 = padding
    completion_mask: Array  # bool [B, 2, T]
    weights: Array  # float32 [B], sums to 1 over the global batch; 0 = a filler pair
    margin: Array  # float32 [B], how much better chosen is; 0 where unknown
    ref_logprobs: Array | None = None  # float32 [B, 2], completion log-probs of the reference


@flax.struct.dataclass
class Rollout:
    """What the sampler produced: contiguous right-padded rows of prompt + completion."""

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T]
    segment_ids: Array  # int32 [B, T], 0 = padding
    completion_mask: Array  # bool [B, T]
    prompt_lengths: Array  # int32 [B]
    lengths: Array  # int32 [B], completion tokens, the stop token included
    sampler_logprobs: Array  # float32 [B, T], of the distribution really sampled from
    finish_reason: Array  # int32 [B], 0 = length, 1 = stop
    policy_step: Array  # int32 [B], optimizer step of the params that sampled


@flax.struct.dataclass
class Experience:
    """A rollout with everything a policy update needs; all [B, T] unless said."""

    tokens: Array  # int32
    positions: Array  # int32
    segment_ids: Array  # int32
    completion_mask: Array  # bool
    old_logprobs: Array  # float32, scored on the params that sampled, temperature applied
    ref_logprobs: Array  # float32
    values: Array  # float32
    rewards: Array  # float32
    advantages: Array  # float32
    returns: Array  # float32
    weights: Array  # float32, sums to 1 over the global minibatch
