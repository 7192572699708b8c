# SPDX-License-Identifier: Apache-2.0
"""Offline preference losses: DPO and whatever else stands in PREFERENCE_LOSSES.

The step never sees a reference model: its log-probs of the whole set are computed once, before the
first step, and arrive in the batch. A loss gets one only if a positional parameter asks for it by
a name that begins with `ref_`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.signatures import keywords, statistics
from jaxrlhf.config.stages import DPOConfig
from jaxrlhf.data.batches import Batches
from jaxrlhf.data.encode import PairSet
from jaxrlhf.data.tokenizer import ids_digest
from jaxrlhf.errors import ConfigError
from jaxrlhf.losses.preference import PREFERENCE_LOSSES
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.ops.masking import weighted_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.distributed import to_host
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.stages.adapted import before_training, halves, open_policy
from jaxrlhf.stages.models import Model, open_model
from jaxrlhf.stages.pairs import completion_logprobs, real_pairs, summed
from jaxrlhf.stages.recipe import Recipe
from jaxrlhf.stages.reward import pair_metrics
from jaxrlhf.stages.rows import evaluation_batches, pair_rows, training_batches
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import check_fits, offline
from jaxrlhf.train.step import LossFn
from jaxrlhf.types import PairBatch, Params


def make_loss(
    config: ModelConfig, runtime: Runtime, loss: Callable[..., Any], settings: dict[str, Any]
) -> LossFn:
    """A loss of the table on summed completion log-probs; its positional parameters say on what."""
    needs = statistics(loss)

    def loss_fn(params: Params, frozen: Params, batch: PairBatch, key: jax.Array) -> Any:
        logprobs = real_pairs(completion_logprobs(params, config, runtime, batch), batch)
        lengths = batch.completion_mask.sum(-1)
        found = {
            "chosen": logprobs[:, 0],
            "rejected": logprobs[:, 1],
            "chosen_length": lengths[:, 0],
            "rejected_length": lengths[:, 1],
            "margin": batch.margin,
        }
        if batch.ref_logprobs is not None:
            reference = real_pairs(batch.ref_logprobs, batch)
            found |= {"ref_chosen": reference[:, 0], "ref_rejected": reference[:, 1]}
        losses, metrics = loss(*(found[name] for name in needs), **settings)
        metrics = {**metrics, "logps/chosen": logprobs[:, 0], "logps/rejected": logprobs[:, 1]}
        return weighted_sum(losses, batch.weights), summed(metrics, batch)

    return loss_fn


def make_logprobs(
    config: ModelConfig, runtime: Runtime, mesh: Mesh
) -> Callable[[Params, Batches], np.ndarray]:
    """(params, batches over a whole set) -> completion log-probs, float32 [n, 2]."""
    program = jit(lambda params, batch: completion_logprobs(params, config, runtime, batch), mesh)

    def logprobs(params: Params, batches: Batches) -> np.ndarray:
        found = [to_host(program(params, put_batch(batch, mesh))) for batch in batches]
        return batches.in_row_order(found)

    return logprobs


def needs_reference(loss: Callable[..., Any]) -> bool:
    """Whether a loss compares with a frozen reference."""
    return any(name.startswith("ref_") for name in statistics(loss))


def dpo(config: DPOConfig, mesh: Mesh, key: jax.Array, *, dry_run: bool = False) -> Recipe:
    """pairs (+ reference log-probs, once) -> batch_at(step) -> a loss of PREFERENCE_LOSSES.

    dry_run: without the reference's log-probs, so that nothing is computed; what comes of it can be
        described, not run.
    """
    model = open_policy(config, mesh, key)
    trained, frozen = halves(model, model.params)
    rows, held_out, notes = pair_rows(config.data, model, config.seed)
    model = talking(model, rows.templates)
    pairs_per_step = config.train.batch_plan(row_shards(mesh)).batch_size
    loss = PREFERENCE_LOSSES[config.loss.name]
    settings = keywords(loss, config.loss)
    logprobs = make_logprobs(model.config, model.runtime, mesh)

    if needs_reference(loss):
        reference = reference_of(config, model, mesh)
        ref_params = before_training(model) if reference is model else reference.params

        def with_reference(pairs: PairSet | None) -> PairSet | None:
            if pairs is None:
                return None
            if pairs.ref_logprobs is not None:  # the data may bring them along
                if config.reference is not None:
                    raise ConfigError(
                        f"reference = {config.reference}, but data brings reference log-probs of "
                        "its own (ref_chosen_logps, ref_rejected_logps): leave reference out, or "
                        "the columns"
                    )
                return pairs
            if dry_run:
                return pairs
            batches = evaluation_batches(pairs, config.data, pairs_per_step)
            return dataclasses.replace(pairs, ref_logprobs=logprobs(ref_params, batches))

        rows, held_out = with_reference(rows), with_reference(held_out)
        assert rows is not None
        del reference, ref_params

    batches, steps = training_batches(rows, config.data, config.train, pairs_per_step, config.seed)
    evaluate: Callable[[Params, int], dict[str, float]] | None = None
    if held_out is not None:
        evaluation = evaluation_batches(held_out, config.data, pairs_per_step)
        beta = float(settings.get("beta", 1.0))
        against = held_out.ref_logprobs

        def on_held_out(params: Params, step: int) -> dict[str, float]:
            found = logprobs(params, evaluation).astype(np.float64)
            rewards = beta * (found if against is None else found - against)
            return pair_metrics(rewards[:, 0], rewards[:, 1], held_out)

        evaluate = on_held_out

    return Recipe(
        kind="lm",
        architecture=model.config,
        params=trained,
        frozen=frozen,
        adapted=model.adapted,
        axes=model.axes(),
        loss_fn=make_loss(model.config, model.runtime, loss, settings),
        steps=steps,
        rows=pairs_per_step,
        epoch=len(rows) / pairs_per_step,
        advance=offline(batches.batch_at, frozen, key, mesh),
        evaluate=evaluate,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        show=("loss", "rewards/accuracies", "rewards/margins"),
        notes=notes,
    )


def reference_of(config: Any, model: Model, mesh: Mesh) -> Model:
    """The frozen reference of a stage: the model as it starts, or the one that is named."""
    if config.reference is None:
        return model
    found = open_model(
        config.model, mesh, path=config.reference, kind="lm", frozen=True, share=model
    )
    check_fits(
        "model",
        ids_digest(model.tokenizer),
        "reference",
        ids_digest(found.tokenizer),
    )
    return found
