# SPDX-License-Identifier: Apache-2.0
"""The programs a training stage runs on its devices, with the shapes they are called with.

Built from settings and an architecture alone: no data, no weights. They are the stage's own
functions, so what is compiled, measured or compared here is what a run executes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config.signatures import keywords
from jaxrlhf.config.stages import DPOConfig, PPOConfig, RewardConfig, TrainingConfig
from jaxrlhf.losses.preference import PREFERENCE_LOSSES
from jaxrlhf.losses.reward import REWARD_LOSSES
from jaxrlhf.models.adapters.only import parse_only
from jaxrlhf.models.adapters.spec import Adapter, resolve
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.quantization import quantize
from jaxrlhf.models.rows import row_scores
from jaxrlhf.models.transformer import abstract_params
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import batch_sharding, replicated, shardings, state_shardings
from jaxrlhf.planning.aot import Program, abstract
from jaxrlhf.rl.experience import needs_values
from jaxrlhf.stages import preference, reward, sft
from jaxrlhf.stages.adapted import abstract_adapted, on_halves, spec_of
from jaxrlhf.stages.models import Model, axes_of, make_runtime
from jaxrlhf.stages.pairs import completion_logprobs
from jaxrlhf.stages.ppo import (
    division,
    exactly_repeatable,
    make_experience,
    make_loss,
    make_minibatches,
    make_rollout,
)
from jaxrlhf.stages.reward import pair_scores
from jaxrlhf.stages.training import optimizer, passes
from jaxrlhf.train.state import init_state
from jaxrlhf.train.step import LossFn, jit_train_step, make_train_step
from jaxrlhf.types import Experience, LMBatch, PairBatch, Params, Rollout


def stage_programs(
    config: TrainingConfig, architecture: ModelConfig, mesh: Mesh
) -> dict[str, Program]:
    """Every large program of a stage: `train_step`, `scorer`, and in ppo `sampler`, `minibatches`
    and `judge` (a reward model of the policy's architecture).

    Rows have `data.max_length` positions; in ppo prompts take what `sampling.max_new_tokens` leaves
    of it. Raises ConfigError where the batch does not fit the mesh. Lower or call them in the scope
    of `parallel.rules.use_mesh`.
    """
    if isinstance(config, PPOConfig):
        config = exactly_repeatable(config, mesh)
    build = _Builder(config, architecture, make_runtime(config.model, architecture, mesh), mesh)
    if isinstance(config, PPOConfig):
        return build.ppo(config)
    if isinstance(config, DPOConfig):
        return build.dpo(config)
    if isinstance(config, RewardConfig):
        return build.reward(config)
    return build.sft(config)


@dataclasses.dataclass(frozen=True)
class _Builder:
    config: TrainingConfig
    architecture: ModelConfig
    runtime: Runtime
    mesh: Mesh

    @property
    def rows(self) -> int:
        """Of one batch: rows, pairs or episodes."""
        return self.config.train.batch_plan(row_shards(self.mesh)).batch_size

    def shape(self, *sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        """An array of rows, split as batches are."""
        return jax.ShapeDtypeStruct(
            sizes, jnp.dtype(dtype), sharding=batch_sharding(self.mesh) if sizes else self.whole
        )

    @property
    def whole(self) -> jax.sharding.NamedSharding:
        return replicated(self.mesh)

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self.whole)

    def params(self, *heads: str, frozen: bool = False) -> tuple[Params, Params]:
        """(shapes, axis names) of a model with these heads; "lm" comes tied or not."""
        adapter = None if frozen else self.adapter(*heads)
        kept = frozen or adapter is not None
        dtype = self.runtime.dtype if kept else self.runtime.param_dtype
        shapes = abstract_params(self.architecture, heads=heads, param_dtype=dtype)
        if kept and self.config.model.quantize:
            shapes = quantize(shapes, self.config.model.quantize)
        if adapter is not None:
            shapes = abstract_adapted(adapter, shapes, self.runtime.param_dtype, self.architecture)
        return shapes, axes_of(shapes, self.architecture)

    def adapter(self, *heads: str) -> Adapter | None:
        """What trains of a model with these heads; None = all of it."""
        section = self.config.model.adapter
        if section is None:
            return None
        new = tuple(head for head in heads if head == "score")
        return resolve(spec_of(section), self.architecture, heads=new)

    def placed(self, *heads: str, frozen: bool = False) -> Params:
        """Shapes of a model with these heads where they live."""
        shapes, axes = self.params(*heads, frozen=frozen)
        return abstract(shapes, shardings(axes, shapes, self.mesh)[0])

    def token_rows(self, *lead: int) -> dict[str, Any]:
        """Tokens, positions, segment ids and mask [*lead, T]."""
        size = (*lead, self.config.data.max_length)
        names = ("tokens", "positions", "segment_ids")
        mask = self.shape(*size, dtype="bool")
        return {name: self.shape(*size) for name in names} | {"completion_mask": mask}

    def pairs(self, *, with_reference: bool) -> PairBatch:
        n = self.rows
        weight = self.shape(n, dtype="float32")
        ref = self.shape(n, 2, dtype="float32") if with_reference else None
        return PairBatch(**self.token_rows(n, 2), weights=weight, margin=weight, ref_logprobs=ref)

    def train_step(
        self, loss_fn: LossFn, model: tuple[Params, Params], batch: Any, rows: int, prepare=None
    ) -> Program:
        """The compiled step of the runner on a state that has yet to exist."""
        params, axes = model
        trained, frozen = self.halves(params)
        config, ema = self.config, self.config.train.ema_decay
        tx, _ = optimizer(config.optim, config.train.steps or 1)
        state = jax.eval_shape(lambda p: init_state(p, tx, ema=ema is not None), trained)
        where, _ = state_shardings(axes, state, self.mesh)
        section = config.model.adapter
        step = make_train_step(
            on_halves(loss_fn, 0.0 if section is None else section.dropout),
            tx,
            accum=passes(config, rows, self.mesh),
            prepare=prepare,
            ema_decay=ema,
        )
        jitted = jit_train_step(step, where, self.mesh)
        frozen = abstract(frozen, shardings(axes, frozen, self.mesh)[0])
        rate = self.shape(dtype="float32")
        return Program(jitted, (abstract(state, where), frozen, batch, self.key, rate))

    def halves(self, params: Params) -> tuple[Params, Params]:
        """(what trains, what is frozen) of a model, or of an actor and a critic."""
        if "embed" not in params:
            parts = {name: self.halves(tree) for name, tree in params.items()}
            trained = {name: half for name, (half, _) in parts.items()}
            return trained, {name: half for name, (_, half) in parts.items() if half}
        if self.config.train.only:
            return parse_only(tuple(self.config.train.only), self.architecture).split(params)
        adapter = self.adapter(*(name for name in ("score",) if name in params))
        return (params, {}) if adapter is None else adapter.split(params)

    def sft(self, config: Any) -> dict[str, Program]:
        batch = LMBatch(**self.token_rows(self.rows))
        weights = sft.make_weights(config.loss.weights, config.data.max_length)
        loss_fn = sft.make_loss(self.architecture, self.runtime)

        def prepare(batch: LMBatch) -> LMBatch:
            return dataclasses.replace(batch, weights=weights(batch.completion_mask))

        scorer = jit(sft.make_sums(self.architecture, self.runtime), self.mesh)
        return {
            "train_step": self.train_step(loss_fn, self.params("lm"), batch, self.rows, prepare),
            "scorer": Program(scorer, (self.placed("lm"), batch)),
        }

    def reward(self, config: RewardConfig) -> dict[str, Program]:
        batch, loss = self.pairs(with_reference=False), REWARD_LOSSES[config.loss.name]
        settings = keywords(loss, config.loss)
        loss_fn = reward.make_loss(self.architecture, self.runtime, loss, settings)
        scorer = jit(lambda p, b: pair_scores(p, self.architecture, self.runtime, b), self.mesh)
        return {
            "train_step": self.train_step(loss_fn, self.params("score"), batch, self.rows),
            "scorer": Program(scorer, (self.placed("score"), batch)),
        }

    def dpo(self, config: DPOConfig) -> dict[str, Program]:
        loss = PREFERENCE_LOSSES[config.loss.name]
        batch = self.pairs(with_reference=preference.needs_reference(loss))
        settings = keywords(loss, config.loss)
        loss_fn = preference.make_loss(self.architecture, self.runtime, loss, settings)
        scorer = jit(
            lambda p, b: completion_logprobs(p, self.architecture, self.runtime, b), self.mesh
        )
        return {
            "train_step": self.train_step(loss_fn, self.params("lm"), batch, self.rows),
            "scorer": Program(scorer, (self.placed("lm"), batch)),
        }

    def ppo(self, config: PPOConfig) -> dict[str, Program]:
        model = Model({}, self.architecture, self.runtime, "lm", None, "", {"eos_token_id": 0})
        shared = config.rl.critic == "shared"
        separate = needs_values(config.rl.advantage) and not shared
        heads = ("lm", "value") if needs_values(config.rl.advantage) and shared else ("lm",)
        models = {"actor": self.params(*heads)}
        if separate:
            models["critic"] = self.params("value")
        params = {name: shapes for name, (shapes, _) in models.items()}
        axes = {name: named for name, (_, named) in models.items()}
        critic = model if separate else None

        episodes, length = self.rows, config.data.max_length
        prompts, rows, scored = division(config, self.mesh)
        prompt_length = length - config.sampling.max_new_tokens
        number, floats = self.shape(episodes), self.shape(episodes, length, dtype="float32")
        rollout = Rollout(
            **self.token_rows(episodes),
            prompt_lengths=number,
            lengths=number,
            sampler_logprobs=floats,
            finish_reason=number,
            policy_step=number,
        )

        def experience(rows: int) -> Experience:
            floats = self.shape(rows, length, dtype="float32")
            names = [f.name for f in dataclasses.fields(Experience)]
            return Experience(**dict.fromkeys(names, floats) | self.token_rows(rows))

        both = abstract(params, shardings(axes, params, self.mesh)[0])
        loss_fn = make_loss(config, model, critic)
        judge = jit(lambda p, r: row_scores(p, self.architecture, self.runtime, r), self.mesh)
        return {
            "train_step": self.train_step(loss_fn, (params, axes), experience(rows), rows),
            "sampler": Program(
                make_rollout(config, model, self.mesh),
                (both["actor"],),
                {
                    "prompt_tokens": self.shape(prompts, prompt_length),
                    "prompt_lengths": self.shape(prompts),
                    "key": self.key,
                    "policy_step": self.shape(),
                },
            ),
            "scorer": Program(
                make_experience(config, model, model, critic, self.mesh, scored),
                (
                    both,
                    self.placed("lm", frozen=config.model.adapter is not None),
                    rollout,
                    self.shape(episodes, dtype="float32"),
                    self.shape(dtype="float32"),
                ),
            ),
            "minibatches": Program(
                make_minibatches(config, self.mesh), (experience(episodes), self.key)
            ),
            "judge": Program(judge, (self.placed("score", frozen=True), rollout)),
        }
