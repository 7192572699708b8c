# SPDX-License-Identifier: Apache-2.0
"""What a model says about whole rows: log-probs, scores, values. Pure; whoever owns a program jits.

`rows` is anything with tokens, positions and segment_ids [B, T]: a batch, a rollout, experience.
"""

from typing import Any, Literal, Protocol, overload

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.experts import balance_loss
from jaxrlhf.models.heads import last_token_score, lm_head_kernel, scalar
from jaxrlhf.models.transformer import hidden_states, hidden_states_and_routing
from jaxrlhf.ops.logprobs import exact_kl, token_logprobs

Params = dict[str, Any]


class Rows(Protocol):
    """Right-padded rows [B, T] with explicit positions; segment 0 is padding."""

    @property
    def tokens(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def segment_ids(self) -> Any: ...


def row_hidden(params: Params, config: ModelConfig, runtime: Runtime, rows: Rows) -> jax.Array:
    """Hidden states [B, T, D] of rows."""
    return hidden_states(params, config, runtime, rows.tokens, rows.positions, rows.segment_ids)


@overload
def row_logprobs(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    rows: Rows,
    *,
    temperature: float = ...,
    entropy: Literal[False] = ...,
) -> jax.Array: ...
@overload
def row_logprobs(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    rows: Rows,
    *,
    temperature: float = ...,
    entropy: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def row_logprobs(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    rows: Rows,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """log p(token t | tokens before t), float32 [B, T]; with `entropy` also the entropies, nats."""
    hidden = row_hidden(params, config, runtime, rows)
    return head_logprobs(
        params, config, runtime, hidden, rows.tokens, temperature=temperature, entropy=entropy
    )


def row_logprobs_and_balance(
    params: Params, config: ModelConfig, runtime: Runtime, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """As `row_logprobs`, and the load-balancing loss of a model with experts (a scalar)."""
    hidden, routing = hidden_states_and_routing(
        params, config, runtime, rows.tokens, rows.positions, rows.segment_ids
    )
    balance = balance_loss(routing, (jnp.asarray(rows.segment_ids) > 0).sum())
    return head_logprobs(params, config, runtime, hidden, rows.tokens), balance


def head_logprobs(
    params: Params,
    config: ModelConfig,
    runtime: Runtime,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Any:
    """As `row_logprobs`, from hidden states that are already there."""
    kernel = lm_head_kernel(params)
    settings: Any = {
        "temperature": temperature,
        "cap": config.logit_softcap,
        "chunk": runtime.logprob_chunk,
    }
    if entropy:
        return token_logprobs(hidden, kernel, tokens, entropy=True, **settings)
    return token_logprobs(hidden, kernel, tokens, **settings)


def head_exact_kl(
    params: Params,
    ref_params: Params,
    configs: tuple[ModelConfig, ModelConfig],
    runtime: Runtime,
    hidden: jax.Array,
    ref_hidden: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """KL(policy || reference), nats, float32 [B, T], of the distribution token t was drawn from.

    From the hidden states of both models, whose `configs` stand in the same order; slot 0 is 0.
    """
    return exact_kl(
        hidden,
        lm_head_kernel(params),
        ref_hidden,
        lm_head_kernel(ref_params),
        temperature=temperature,
        caps=(configs[0].logit_softcap, configs[1].logit_softcap),
        chunk=runtime.logprob_chunk,
    )


def row_scores(params: Params, config: ModelConfig, runtime: Runtime, rows: Rows) -> jax.Array:
    """A reward model's scores of whole rows, float32 [B]: its first output at the last token."""
    hidden = row_hidden(params, config, runtime, rows)
    return last_token_score(params, hidden, jnp.asarray(rows.segment_ids))[:, 0]


def head_values(params: Params, hidden: jax.Array) -> jax.Array:
    """Values, float32 [B, T]: slot t is the value of the state before token t; slot 0 is 0."""
    values = scalar(params, hidden, "value")[..., 0]
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))
