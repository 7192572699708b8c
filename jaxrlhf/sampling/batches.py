# SPDX-License-Identifier: Apache-2.0
"""Any number of prompts of any length through few compiled shapes, results in the order given."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.adapters.virtual import virtual_tokens
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.parallel.distributed import to_host
from jaxrlhf.sampling.decode import FINISH_REASONS, sample
from jaxrlhf.sampling.filters import check_settings
from jaxrlhf.types import Params

SHORTEST = 32  # the smallest bucket; the others are its doublings, and each is a program


class Sampled(NamedTuple):
    """One completion: its tokens (the stop token included), their log-probs, why it ended."""

    token_ids: list[int]
    logprobs: list[float]  # of the distribution sampled from, nats
    finish_reason: str  # "stop" or "length"


def bucket(length: int, limit: int | None = None) -> int:
    """The bucket that prompts of `length` tokens are padded to: a doubling of SHORTEST, but not
    above `limit` (`longest_prompt`)."""
    size = SHORTEST
    while size < length:
        size *= 2
    return capped(size, length, limit)


def capped(size: int, length: int, limit: int | None) -> int:
    """The padded length `size` of prompts of `length` tokens, not above `limit` if they fit it."""
    return size if limit is None else max(min(size, limit), length)


def longest_prompt(config: ModelConfig, params: Params, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt that leave the model room for its completion; None = any number."""
    if config.row_limit is None:
        return None
    return config.row_limit - max_new_tokens - virtual_tokens(params)


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, length] right-padded with 0, lengths int32 [B])."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def make_sampler(
    config: ModelConfig,
    runtime: Runtime,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    batch_size: int = 64,
    row_multiple: int = 1,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
) -> Callable[..., list[Sampled]]:
    """Returns `sampler(params, prompts, key, row_ids=None) -> list[Sampled]`.

    Prompts (token ids, at least one each) are grouped by bucket of length and run `batch_size` at a
    time, the last batch filled up with rows that sample nothing. A completion depends on its
    prompt, the key and its row id (default: its place in `prompts`), not on the batches formed, up
    to the rounding of differently shaped matmuls.

    Args:
        batch_size: the most rows at a time; fewer prompts run in the next power of two.
        row_multiple: rows of a batch are a multiple of it: the shards that `put` cuts them into.
        put: moves a [B, ...] or [B] host array to the devices (shards its rows on a mesh).
    """
    check_settings(temperature, top_k, top_p, min_p)
    if batch_size < 1 or row_multiple < 1 or batch_size % row_multiple:
        raise ValueError(
            f"batch_size = {batch_size}: a positive multiple of row_multiple = {row_multiple}"
        )

    @jax.jit
    def program(params: Params, tokens, lengths, key, row_ids):
        return sample(
            params,
            config,
            runtime,
            tokens,
            lengths,
            key,
            row_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_ids=tuple(stop_ids),
        )

    def sampler(
        params: Params,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        row_ids: Sequence[int] | None = None,
    ) -> list[Sampled]:
        if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
            raise ValueError(f"prompts {empty[:8]} have no tokens: begin them with the BOS token")
        ids = list(range(len(prompts))) if row_ids is None else list(row_ids)
        limit = longest_prompt(config, params, max_new_tokens)
        by_bucket: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_bucket.setdefault(bucket(len(prompt), limit), []).append(i)
        results: dict[int, Sampled] = {}
        for length, members in sorted(by_bucket.items()):
            size = row_multiple
            while size < len(members):
                size *= 2
            size = min(size, batch_size)
            for first in range(0, len(members), size):
                rows = members[first : first + size]
                fill = size - len(rows)
                tokens, lengths = pad_prompts([prompts[i] for i in rows] + [()] * fill, length)
                batch_ids = np.array([ids[i] for i in rows] + [0] * fill, np.int32)
                rollout = program(params, put(tokens), put(lengths), key, put(batch_ids))
                sampled, masks, logprobs, reasons = (
                    to_host(x)
                    for x in (
                        rollout.tokens,
                        rollout.completion_mask,
                        rollout.sampler_logprobs,
                        rollout.finish_reason,
                    )
                )
                for row, i in enumerate(rows):
                    mask = masks[row]
                    results[i] = Sampled(
                        sampled[row][mask].tolist(),
                        logprobs[row][mask].tolist(),
                        FINISH_REASONS[int(reasons[row])],
                    )
        return [results[i] for i in range(len(prompts))]

    return sampler
