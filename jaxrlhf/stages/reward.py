# SPDX-License-Identifier: Apache-2.0
"""Reward models from comparisons."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.signatures import keywords, statistics
from jaxrlhf.config.stages import RewardConfig
from jaxrlhf.data.batches import Batches
from jaxrlhf.data.encode import PairSet
from jaxrlhf.errors import ModelError
from jaxrlhf.evaluation.calibration import judge_pairs
from jaxrlhf.losses.reward import REWARD_LOSSES
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.rows import row_scores
from jaxrlhf.ops.masking import weighted_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.distributed import to_host
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.stages.adapted import halves, open_trained
from jaxrlhf.stages.models import Model, axes_of, new_head, trunk
from jaxrlhf.stages.pairs import flat_rows, real_pairs, summed
from jaxrlhf.stages.recipe import Recipe
from jaxrlhf.stages.rows import evaluation_batches, pair_rows, training_batches
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import offline
from jaxrlhf.train.step import LossFn
from jaxrlhf.types import PairBatch, Params


def unused_token(model: Model) -> int:
    """An id for padding that never occurs as a real token, for exports of reward models.

    The tokenizer's own padding token, else its unknown token, else an id it never produces.

    Raises:
        ModelError: every id of the vocabulary may occur in text.
    """
    tokenizer, ends = model.tokenizer, set(model.stop_ids)
    taken = {tokenizer.bos_token_id, *ends}
    for found in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if found is not None and found not in taken and found < model.config.vocab_size:
            return found
    known = set(tokenizer.get_vocab().values())
    for found in range(model.config.vocab_size - 1, -1, -1):
        if found not in known:
            return found
    raise ModelError(
        "a reward model needs an id for padding that never occurs in text, and the tokenizer has "
        "no pad or unk token and no free id: add a pad token to it"
    )


def pair_scores(
    params: Params, config: ModelConfig, runtime: Runtime, batch: PairBatch
) -> jax.Array:
    """Scores of compared completions, float32 [B, 2]: chosen, rejected."""
    return row_scores(params, config, runtime, flat_rows(batch)).reshape(-1, 2)


def make_loss(
    config: ModelConfig, runtime: Runtime, loss: Callable[..., Any], settings: dict[str, Any]
) -> LossFn:
    """A loss of the table on the scores of pairs; its positional parameters say what it needs."""
    needs = statistics(loss)

    def loss_fn(params: Params, frozen: Params, batch: PairBatch, key: jax.Array) -> Any:
        scores = real_pairs(pair_scores(params, config, runtime, batch), batch)
        found = {"chosen": scores[:, 0], "rejected": scores[:, 1], "margin": batch.margin}
        losses, metrics = loss(*(found[name] for name in needs), **settings)
        return weighted_sum(losses, batch.weights), summed(metrics, batch)

    return loss_fn


def make_scorer(
    model_config: ModelConfig, runtime: Runtime, batches: Batches, mesh: Mesh
) -> Callable[[Params], np.ndarray]:
    """params -> scores of every pair of a set, float32 [n, 2]."""
    program = jit(lambda params, batch: pair_scores(params, model_config, runtime, batch), mesh)

    def scores(params: Params) -> np.ndarray:
        found = [to_host(program(params, put_batch(batch, mesh))) for batch in batches]
        return batches.in_row_order(found)

    return scores


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray, pairs: PairSet) -> dict[str, float]:
    """Accuracy, calibration and length bias of scores [n] on held-out pairs."""
    metrics, _, _ = judge_pairs(
        chosen,
        rejected,
        chosen_lengths=pairs.chosen.lengths,
        rejected_lengths=pairs.rejected.lengths,
        clusters=pairs.groups,
        samples=1,  # intervals are for the evaluation at the end
    )
    return metrics


def reward(config: RewardConfig, mesh: Mesh, key: jax.Array) -> Recipe:
    """pairs -> batch_at(step) -> scores at the last token -> a loss on their difference."""
    first = jax.random.fold_in(key, 0)
    model = open_trained(config.model, mesh, key=first, heads=("score",), only=config.train.only)
    params = model.params
    if model.kind == "lm":
        # From zero: at first nothing is preferred, and no random direction is to be unlearnt.
        score = jax.tree.map(jnp.zeros_like, new_head(model, "score", key))
        params = {**trunk(params), "score": score}
    trained, frozen = halves(model, params)
    rows, held_out, notes = pair_rows(config.data, model, config.seed)
    model = talking(model, rows.templates)
    pairs_per_step = config.train.batch_plan(row_shards(mesh)).batch_size
    batches, steps = training_batches(rows, config.data, config.train, pairs_per_step, config.seed)
    loss = REWARD_LOSSES[config.loss.name]
    evaluate: Callable[[Params, int], dict[str, float]] | None = None
    if held_out is not None:
        scorer = make_scorer(
            model.config,
            model.runtime,
            evaluation_batches(held_out, config.data, pairs_per_step),
            mesh,
        )

        def on_held_out(params: Params, step: int) -> dict[str, float]:
            chosen, rejected = scorer(params).astype(np.float64).T
            return pair_metrics(chosen, rejected, held_out)

        evaluate = on_held_out

    return Recipe(
        kind="reward",
        architecture=model.config,
        params=trained,
        frozen=frozen,
        adapted=model.adapted,
        axes=axes_of(params, model.config),
        loss_fn=make_loss(model.config, model.runtime, loss, keywords(loss, config.loss)),
        steps=steps,
        rows=pairs_per_step,
        epoch=len(rows) / pairs_per_step,
        advance=offline(batches.batch_at, frozen, key, mesh),
        evaluate=evaluate,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        pad_token_id=unused_token(model),
        show=("loss", "rewards/accuracies"),
        notes=notes,
    )
