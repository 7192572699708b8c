# SPDX-License-Identifier: Apache-2.0
"""Next-token training: pretraining on text and supervised fine-tuning on demonstrations."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.config.stages import PretrainConfig, SFTConfig
from jaxrlhf.losses.lm import next_token
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.rows import row_logprobs, row_logprobs_and_balance
from jaxrlhf.ops.masking import WEIGHTS, fixed_length_weights, weighted_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.stages.adapted import halves, open_policy
from jaxrlhf.stages.recipe import Recipe
from jaxrlhf.stages.rows import evaluation_batches, lm_rows, training_batches
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import offline
from jaxrlhf.train.step import LossFn
from jaxrlhf.types import LMBatch, Params


def make_weights(name: str, length: int) -> Any:
    """A weight function by name: [B, T] mask of the global batch -> [B, T] weights."""
    return (
        functools.partial(fixed_length_weights, length=length)
        if name == "fixed_length"
        else (WEIGHTS[name])
    )


def make_loss(config: ModelConfig, runtime: Runtime) -> LossFn:
    """Cross-entropy of the next token, weighted as the batch says; for a model with experts also
    router_aux_coef x the load-balancing loss of each pass, in proportion to its weights."""
    balanced = bool(config.num_experts and config.router_aux_coef)

    def loss_fn(params: Params, frozen: Params, batch: LMBatch, key: jax.Array) -> Any:
        if balanced:
            logprobs, balance = row_logprobs_and_balance(params, config, runtime, batch)
        else:
            logprobs, balance = row_logprobs(params, config, runtime, batch), None
        losses, metrics = next_token(logprobs, batch.completion_mask)
        assert batch.weights is not None
        trained = batch.completion_mask.sum()
        loss = weighted_sum(losses, batch.weights)
        summed = {
            "nats_per_token": (metrics["nll"].sum(), trained),
            "tokens": ((batch.segment_ids > 0).sum(), 1),
        }
        if balance is not None:
            loss += config.router_aux_coef * balance * batch.weights.sum()
            summed["router/balance"] = (balance * trained, trained)
        return loss, summed

    return loss_fn


def make_sums(config: ModelConfig, runtime: Runtime) -> Any:
    """(params, batch) -> summed cross-entropy of its trained tokens, and how many they are."""

    def sums(params: Params, batch: LMBatch) -> tuple[jax.Array, jax.Array]:
        logprobs = row_logprobs(params, config, runtime, batch)
        nll = next_token(logprobs, batch.completion_mask)[0].sum()
        return nll, batch.completion_mask.sum()

    return sums


def make_evaluation(config: ModelConfig, runtime: Runtime, batches: Any, mesh: Mesh) -> Any:
    """(params, step) -> nats per token and perplexity over all of `batches`."""
    sums = jit(make_sums(config, runtime), mesh)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        found = [sums(params, put_batch(batch, mesh)) for batch in batches]
        nll, tokens = (sum(float(part[i]) for part in found) for i in (0, 1))
        mean = nll / tokens
        return {"nats_per_token": mean, "perplexity": math.exp(mean) if mean < 709 else math.inf}

    return evaluate


def sft(config: SFTConfig | PretrainConfig, mesh: Mesh, key: jax.Array) -> Recipe:
    """rows -> batch_at(step) -> next-token loss, weighted over the global batch."""
    model = open_policy(config, mesh, key)
    trained, frozen = halves(model, model.params)
    rows, held_out, notes = lm_rows(config.data, model, config.seed)
    model = talking(model, rows.templates)
    rows_per_step = config.train.batch_plan(row_shards(mesh)).batch_size
    batches, steps = training_batches(rows, config.data, config.train, rows_per_step, config.seed)
    weights = make_weights(config.loss.weights, config.data.max_length)
    evaluate = None
    if held_out is not None:
        evaluation = evaluation_batches(held_out, config.data, rows_per_step)
        evaluate = make_evaluation(model.config, model.runtime, evaluation, mesh)
    return Recipe(
        kind="lm",
        architecture=model.config,
        params=trained,
        frozen=frozen,
        adapted=model.adapted,
        axes=model.axes(),
        loss_fn=make_loss(model.config, model.runtime),
        steps=steps,
        rows=rows_per_step,
        epoch=len(rows) / rows_per_step,
        advance=offline(batches.batch_at, frozen, key, mesh),
        prepare=lambda batch: batch.replace(weights=weights(batch.completion_mask)),
        evaluate=evaluate,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        notes=notes,
    )
