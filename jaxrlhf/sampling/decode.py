# SPDX-License-Identifier: Apache-2.0
"""One program from prompts to a Rollout: prefill, then a loop that ends when every row has.

Layout: prompts [B, P] are right-padded, one cache buffer per layer has P + N columns, and step t
writes column P + t of every row (one scalar index, so in place) while the token's position goes on
from its own prompt's length; the gap between is masked. At the end rows are compacted once into
contiguous right-padded ones. What is real is known from lengths, never by comparing ids with a
padding id: padding may well be a stop token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models import heads
from jaxrlhf.models.adapters.virtual import virtual_tokens
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import decode_step, prefill, split_layers
from jaxrlhf.sampling.filters import candidates, check_settings, draw
from jaxrlhf.types import Rollout

LENGTH, STOP = 0, 1  # finish reasons
FINISH_REASONS = ("length", "stop")


def row_keys(key: jax.Array, row_ids: jax.Array) -> jax.Array:
    """One key a row [B]: what a row draws depends on its id alone, not on where it stands."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)


def compact(
    prompts: jax.Array, prompt_lengths: jax.Array, completions: jax.Array, lengths: jax.Array
) -> jax.Array:
    """[B, P] and [B, N] to contiguous rows [B, P + N] of prompt + completion, 0 after them."""
    P, N = prompts.shape[1], completions.shape[1]
    column = jnp.arange(P + N)
    start, end = prompt_lengths[:, None], (prompt_lengths + lengths)[:, None]
    source = jnp.where(column < start, column, P + column - start)
    both = jnp.concatenate([prompts, completions], axis=1)
    rows = jnp.take_along_axis(both, jnp.clip(source, 0, P + N - 1), axis=1)
    return jnp.where(column < end, rows, 0)


def sample(
    params: Any,
    config: ModelConfig,
    runtime: Runtime,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: tuple[int, ...] = (),
    samples_per_prompt: int = 1,
    policy_step: jax.Array | int = 0,
) -> Rollout:
    """Completions of right-padded prompts. Not jitted: all but the arrays is static.

    Args:
        prompt_tokens: int32 [B, P]; anything stands after a row's length.
        prompt_lengths: int32 [B]. 0 marks a filler row: it samples nothing and ends nothing late.
        key: the iteration's key.
        row_ids: int32 [B * samples_per_prompt], which row of the whole job each sample is. A sample
            is a function of (params, prompt, key, row id), whatever rows are beside it.
        max_new_tokens: N, at least 1.
        temperature, top_k, top_p, min_p: see `filters.candidates`; temperature 0 is greedy.
        stop_ids: a row ends with the first of these, which stays part of it.
        samples_per_prompt: completions of each prompt, next to each other in the result; the prompt
            is read once.
        policy_step: recorded in the rollout.

    Returns:
        Rollout of B * samples_per_prompt rows, P + N positions; `sampler_logprobs` are those of the
        distribution sampled from: filtered and renormalised, and 0 when greedy.
    """
    check_settings(temperature, top_k, top_p, min_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: at least 1")
    P, N = prompt_tokens.shape[1], max_new_tokens
    ahead = virtual_tokens(params)
    virtual = f"{ahead} virtual tokens, " if ahead else ""
    if config.position == "learned" and config.max_positions < ahead + P + N:
        raise ValueError(
            f"{virtual}prompts of {P} and max_new_tokens = {N} exceed the model's "
            f"{config.max_positions} positions, which are learned: shorten one of them"
        )
    if config.rope_limit is not None and config.rope_limit < ahead + P + N:
        raise ValueError(
            f"{virtual}prompts of {P} and max_new_tokens = {N} exceed {config.rope_limit} "
            f"positions, beyond which a {config.family} model with rope_type "
            f"{dict(config.rope_scaling)['rope_type']!r} reads rows anew: shorten one of them"
        )
    params = split_layers(params, config, runtime)  # once, not in every step of the loop
    column = jnp.arange(P)
    in_prompt = column < prompt_lengths[:, None]
    hidden, cache = prefill(
        params,
        config,
        runtime,
        prompt_tokens,
        jnp.where(in_prompt, column, 0),
        in_prompt.astype(jnp.int32),
        P + N,
    )
    last = jnp.maximum(prompt_lengths - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    if samples_per_prompt > 1:
        hidden, cache, prompt_tokens, prompt_lengths = jax.tree.map(
            lambda x: jnp.repeat(x, samples_per_prompt, axis=0),
            (hidden, cache, prompt_tokens, prompt_lengths),
        )
    B = prompt_tokens.shape[0]
    keys = row_keys(key, row_ids)
    columns = jnp.arange(P + N)
    # Prompt, and the generated columns: decode_step leaves out those not yet written.
    cache_mask = (columns < prompt_lengths[:, None]) | (columns >= P)
    stops = jnp.asarray(stop_ids, jnp.int32).reshape(-1)

    def draw_token(step, hidden, state):
        logits = heads.logits(params, config, hidden)
        logprobs, ids = candidates(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        if temperature == 0:
            choice = jnp.zeros(B, jnp.int32)
        else:
            choice = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, step), logprobs)
        token = jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]
        logprob = jnp.take_along_axis(logprobs, choice[:, None], axis=1)[:, 0]
        active = ~state["done"]
        stopped = active & (token[:, None] == stops).any(-1)

        def put(buffer, value):
            value = jnp.where(active, value, 0).astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, value[:, None], step, axis=1)

        return {
            "tokens": put(state["tokens"], token),
            "logprobs": put(state["logprobs"], logprob),
            "lengths": state["lengths"] + active,
            "finish": jnp.where(stopped, STOP, state["finish"]),
            "done": state["done"] | stopped,
            "last": jnp.where(active, token, 0),
        }

    def unfinished(carry):
        step, state, _ = carry
        return (step < N) & ~state["done"].all()

    def advance(carry):
        step, state, cache = carry
        hidden, cache = decode_step(
            params,
            config,
            runtime,
            state["last"],
            # A finished row goes on at its last position: its result is thrown away.
            jnp.minimum(prompt_lengths + step - 1, prompt_lengths + state["lengths"]),
            cache,
            P + step - 1,
            cache_mask,
        )
        return step + 1, draw_token(step, hidden, state), cache

    start = {
        "tokens": jnp.zeros((B, N), jnp.int32),
        "logprobs": jnp.zeros((B, N), jnp.promote_types(hidden.dtype, jnp.float32)),
        "lengths": jnp.zeros(B, jnp.int32),
        "finish": jnp.full(B, LENGTH, jnp.int32),
        "done": prompt_lengths == 0,
        "last": jnp.zeros(B, jnp.int32),
    }
    carry = (jnp.int32(1), draw_token(jnp.int32(0), hidden, start), cache)
    _, state, _ = jax.lax.while_loop(unfinished, advance, carry)

    lengths = state["lengths"]
    real = columns < (prompt_lengths + lengths)[:, None]
    return Rollout(
        tokens=compact(prompt_tokens, prompt_lengths, state["tokens"], lengths),
        positions=jnp.where(real, columns, 0),
        segment_ids=real.astype(jnp.int32),
        completion_mask=real & (columns >= prompt_lengths[:, None]),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        sampler_logprobs=compact(
            jnp.zeros(prompt_tokens.shape, state["logprobs"].dtype),
            prompt_lengths,
            state["logprobs"],
            lengths,
        ),
        finish_reason=state["finish"],
        policy_step=jnp.full(B, policy_step, jnp.int32),
    )
