# SPDX-License-Identifier: Apache-2.0
"""A Rollout to what models say of it: log-probs, KL, values, scores.

Old log-probs come from a scoring pass of the one log-prob function over the parameters that
sampled: neither the sampler's (another program, rounding otherwise) nor a stop_gradient of the new
ones (which would hide every fault). For a first ratio of exactly 1 they are scored in the shape of
the update's microbatches: `in_minibatches` around any of the functions here does that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models import heads
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import hidden_states
from jaxrlhf.ops import logprobs as log_probabilities
from jaxrlhf.types import Experience, LMBatch, Rollout

Rows = Rollout | Experience | LMBatch


def hidden_of(params: Any, config: ModelConfig, runtime: Runtime, rows: Rows) -> jax.Array:
    """Hidden states [B, T, D] of any rows with tokens, positions and segment ids."""
    return hidden_states(params, config, runtime, rows.tokens, rows.positions, rows.segment_ids)


def score_logprobs(
    params: Any, config: ModelConfig, runtime: Runtime, rows: Rows, *, temperature: float = 1.0
) -> jax.Array:
    """Log-probs [B, T] of the rows' tokens at the temperature they were sampled with."""
    return log_probabilities.token_logprobs(
        hidden_of(params, config, runtime, rows),
        heads.lm_head_kernel(params),
        rows.tokens,
        temperature=temperature,
        chunk=runtime.logprob_chunk,
    )


def score_exact_kl(
    params: Any,
    ref_params: Any,
    config: ModelConfig,
    ref_config: ModelConfig,
    runtime: Runtime,
    rows: Rows,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """KL(policy || reference) [B, T], nats, of the distribution each token was drawn from."""
    return log_probabilities.exact_kl(
        hidden_of(params, config, runtime, rows),
        heads.lm_head_kernel(params),
        hidden_of(ref_params, ref_config, runtime, rows),
        heads.lm_head_kernel(ref_params),
        temperature=temperature,
        chunk=runtime.logprob_chunk,
    )


def of_next_token(values: jax.Array) -> jax.Array:
    """What [B, T] says at token t - 1 moves to slot t, the state before token t; slot 0 is 0."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def score_values(params: Any, config: ModelConfig, runtime: Runtime, rows: Rows) -> jax.Array:
    """Values [B, T] of the state before each token, from a critic's `value` head."""
    hidden = hidden_of(params, config, runtime, rows)
    return of_next_token(heads.scalar(params, hidden, "value")[..., 0])


def score_rewards(params: Any, config: ModelConfig, runtime: Runtime, rows: Rows) -> jax.Array:
    """A reward model's score [B] of each whole row, read at its last real token."""
    hidden = hidden_of(params, config, runtime, rows)
    return heads.last_token_score(params, hidden, rows.segment_ids)[:, 0]


def in_minibatches(score: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`score(rows)` computed `size` rows at a time, in order, as one loop in one program.

    Args:
        score: a function of a pytree of arrays [B, ...] with results [B, ...].
        size: rows at a time; the update's rows per microbatch. It must divide B (ValueError).
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if total % size:
        raise ValueError(f"{total} rows cannot be scored {size} at a time: not a whole number")
    # [B, ...] to [B / size, size, ...] so that each device of a mesh keeps its own rows.
    split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), rows)
    out = jax.lax.map(score, split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(total, *x.shape[2:]), out)


def combine_scores(scores: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum [B] of named scores [B]. Every score has a weight and the other way round.

    Raises ValueError naming what has no partner: a reward that silently counts 0 (or 1) is a
    reward that nobody chose.
    """
    if set(scores) != set(weights) or not scores:
        raise ValueError(
            f"scores {sorted(scores)} and reward weights {sorted(weights)} must name the same"
            " rewards, at least one"
        )
    first, *others = sorted(scores)
    total = weights[first] * jnp.asarray(scores[first], jnp.float32)
    for name in others:
        total += weights[name] * jnp.asarray(scores[name], jnp.float32)
    return total
