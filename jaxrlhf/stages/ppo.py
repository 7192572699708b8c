# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning against rewards.

    prompts -> rollout = sample(policy, prompts, key)         tokens, lengths
            -> scores  = judge(rollout)                       reward models, functions, or both
            -> exp     = build_experience(rollout, scores, old_logprobs, ref_logprobs, values)
            -> for batch in minibatches(exp, key):
                   state, metrics = train_step(state, frozen, batch, key)

One unit of the loop is one iteration of these arrows. Its keys are functions of (seed, step), so an
iteration that is killed in the middle is repeated exactly. The update never sees a reference or a
reward model: what they say arrives as arrays. Actor and critic are one tree of parameters; with
rl.critic = shared the value head stands on the actor's own trunk. With adapters, actor, critic,
reference and reward models on one base read the same frozen arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.signatures import keywords, statistics
from jaxrlhf.config.stages import PPOConfig
from jaxrlhf.data.batches import Batches
from jaxrlhf.data.encode import PromptSet
from jaxrlhf.data.tokenizer import decode_continuation
from jaxrlhf.errors import ConfigError, JaxrlhfError
from jaxrlhf.evaluation.text_metrics import describe_completions
from jaxrlhf.losses.policy import POLICY_LOSSES, clipped_value, entropy_bonus
from jaxrlhf.models.adapters.only import Only, parse_only
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.rows import head_exact_kl, head_logprobs, head_values, row_hidden
from jaxrlhf.ops.advantages import ESTIMATORS
from jaxrlhf.ops.masking import keep, masked_sum, weighted_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.distributed import is_primary, to_host
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import batch_sharding, put_batch, replicated
from jaxrlhf.rl.experience import build_experience, minibatches, needs_values
from jaxrlhf.rl.rollout import first_of_their_kind, roll_out
from jaxrlhf.rl.score import in_minibatches
from jaxrlhf.sampling.batches import capped, longest_prompt
from jaxrlhf.stages.adapted import (
    critic_of,
    halves,
    merged,
    open_policy,
    reference_params,
)
from jaxrlhf.stages.completions import (
    Completions,
    Judge,
    judge_completions,
    make_completer,
    make_judge,
    make_kl,
    stop_ids,
)
from jaxrlhf.stages.models import Model, axes_of, new_head, open_model, trunk
from jaxrlhf.stages.preference import reference_of
from jaxrlhf.stages.recipe import Advance, Recipe
from jaxrlhf.stages.rows import prompt_rows
from jaxrlhf.stages.talking import talking
from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.signals import crash_point
from jaxrlhf.train.state import TrainState
from jaxrlhf.train.step import LossFn, TrainStep
from jaxrlhf.types import Experience, Params, Rollout

Metrics = dict[str, tuple[Any, Any]]


def ppo(config: PPOConfig, mesh: Mesh, key: jax.Array) -> Recipe:
    """The arrows above, made of settings."""
    config = exactly_repeatable(config, mesh)
    parts = division(config, mesh)
    policy = open_policy(config, mesh, key)
    reference = reference_of(config, policy, mesh)
    judge = make_judge(config.reward, config.model, policy, mesh)
    gold = make_judge(config.gold, config.model, policy, mesh)
    actor, critic = make_actor_critic(config, policy, mesh, jax.random.fold_in(key, 1))
    trained, frozen = divided(policy, actor, critic)
    axes = {"actor": axes_of(actor, policy.config)}
    if critic is not None:
        axes["critic"] = axes_of(critic.params, critic.config)
    if reference is policy:
        reference = dataclasses.replace(policy, params=reference_params(policy))
    new_tokens = config.sampling.max_new_tokens
    prompts, held_out, notes = prompt_rows(
        config.data, policy, config.seed, max_new_tokens=new_tokens
    )
    longest = int(prompts.lengths.max())
    room = longest_prompt(policy.config, actor, new_tokens)
    # Nothing below needs where actor and critic begin, but what lives on holds the models.
    policy = talking(policy, prompts.templates).without_params()
    critic = None if critic is None else critic.without_params()

    batches = Batches(
        prompts,
        parts.prompts,
        seed=config.seed,
        shuffle=config.data.shuffle,
        length=capped(-(-longest // 8) * 8, longest, room),  # one shape for the whole run
    )
    group = config.rl.samples_per_prompt
    experience = make_experience(config, policy, reference, critic, mesh, parts.scored)
    sampler = make_rollout(config, policy, mesh)
    shuffled = make_minibatches(config, mesh)
    kl_coef = np.float32(config.rl.kl_coef)

    def make_advance(train_step: TrainStep) -> Advance:
        before = content_digest(reference.params)
        check_ratio = make_ratio_check(policy)

        def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
            sampling_key, update_key = jax.random.split(jax.random.fold_in(key, step + 2))
            batch = batches.batch_at(step)
            params = join(state.params, frozen)
            rollout = sampler(
                params["actor"],
                prompt_tokens=put_batch(batch.tokens, mesh),
                prompt_lengths=put_batch(batch.lengths, mesh),
                key=sampling_key,
                policy_step=state.step,
            )
            crash_point("rollout", step)
            scores = judge_rollout(judge, policy, rollout, batch, group)
            total = judge.total(scores)
            crash_point("scores", step)
            exp, metrics = experience(
                params, reference.params, rollout, put_batch(total, mesh), kl_coef
            )
            del params  # the step donates them
            found: Metrics = dict(metrics)
            for epoch in range(config.rl.epochs):
                epoch_key = jax.random.fold_in(update_key, epoch)
                for i, rows in enumerate(shuffled(exp, epoch_key)):
                    state, step_metrics = train_step(
                        state, frozen, rows, jax.random.fold_in(epoch_key, i)
                    )
                    if epoch == i == 0:
                        found["ratio/first_off"] = step_metrics["ratio/off"]
                    add_metrics(found, step_metrics)
                    passed = step * config.rl.epochs + epoch
                    crash_point("minibatch", passed * config.rl.minibatches + i)
            check_ratio(found["ratio/first_off"])
            if step + 1 == config.train.steps and content_digest(reference.params) != before:
                raise JaxrlhfError(
                    "ppo: the reference's weights are no longer those that the run began with: "
                    "every KL since they changed is wrong, and so is what was learnt from it"
                )
            for name, values in {**scores, "reward": total}.items():
                label = name if name == "reward" else f"reward/{name}"
                found[label] = (values.sum(dtype=np.float64), len(values))
            found["reward_std"] = (float(total.std()), 1)
            return state, found

        return advance

    evaluate = sample = None
    if held_out is not None:
        look = make_evaluation(config, policy, reference, judge, gold, held_out, mesh, key)
        evaluate, sample = look
    return Recipe(
        kind="lm",
        architecture=policy.config,
        params=trained,
        frozen=frozen,
        adapted=policy.adapted,
        axes=axes,
        loss_fn=make_loss(config, policy, critic),
        steps=config.train.steps or 0,
        updates=config.rl.epochs * config.rl.minibatches,
        rows=parts.rows,
        epoch=len(prompts) / parts.prompts,
        advance=make_advance,
        evaluate=evaluate,
        sample=sample,
        exported=("actor",),
        tokenizer=policy.tokenizer,
        hf_config=policy.hf_config,
        show=("reward", "kl", "objective"),
        notes=notes,
    )


def make_ratio_check(policy: Model) -> Callable[[tuple[Any, Any]], None]:
    """Returns a check of the first minibatch's (tokens whose ratio is not exactly 1, tokens), which
    warns once. It is made where exactness is promised, in float32 on CPUs: elsewhere two programs
    may round differently."""
    exact = policy.runtime.dtype == "float32" and jax.default_backend() == "cpu"
    warned = not (exact and is_primary())

    def check(found: tuple[Any, Any]) -> None:
        nonlocal warned
        if warned or not (off := float(found[0])):
            return
        warned = True
        print(
            f"ppo: warning: the ratio of {off:.0f} of {float(found[1]):.0f} tokens is not 1 before "
            "anything was learnt from them (ratio/first_off): the log-probs of the update are not "
            "those of the scoring pass",
            flush=True,
        )

    return check


class Division(NamedTuple):
    """How the episodes of an iteration are divided, over all devices."""

    prompts: int  # an iteration
    rows: int  # episodes a minibatch
    scored: int  # episodes that one pass scores or updates on


def division(config: PPOConfig, mesh: Mesh) -> Division:
    """The division that the settings ask for on this mesh.

    Raises:
        ConfigError: a part that the data shards cannot split evenly.
    """
    plan, rl = config.train.batch_plan(row_shards(mesh)), config.rl
    prompts, rows = plan.batch_size // rl.samples_per_prompt, plan.batch_size // rl.minibatches
    for what, count, key, n in (
        ("prompts an iteration", prompts, "rl.samples_per_prompt", rl.samples_per_prompt),
        ("episodes a minibatch", rows, "rl.minibatches", rl.minibatches),
    ):
        if count % plan.shards:
            raise ConfigError(
                f"train.batch_size = {plan.batch_size} / {key} = {n} is {count} {what}, which "
                f"{plan.shards} data shards (mesh data x fsdp) cannot share evenly: make "
                f"train.batch_size a multiple of {n * plan.shards}"
            )
    scored = min(rows, plan.microbatch_size * plan.shards)
    if rows % scored:
        raise ConfigError(
            f"train.microbatch_size = {plan.microbatch_size}: a minibatch of {rows} episodes is no "
            f"multiple of {scored} = microbatch_size x data shards"
        )
    return Division(prompts, rows, scored)


def make_rollout(config: PPOConfig, policy: Model, mesh: Mesh) -> Callable[..., Rollout]:
    """The compiled sampler: (actor, prompt_tokens=, prompt_lengths=, key=, policy_step=)."""
    return jax.jit(
        functools.partial(
            roll_out,
            config=policy.config,
            runtime=policy.runtime,
            samples_per_prompt=config.rl.samples_per_prompt,
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_ids=stop_ids(config.sampling, policy),
        ),
        out_shardings=batch_sharding(mesh),
    )


def make_minibatches(config: PPOConfig, mesh: Mesh) -> Callable[..., tuple[Experience, ...]]:
    """The compiled shuffle: (experience, key) -> one epoch's minibatches."""

    def shuffled(exp: Experience, key: jax.Array) -> tuple[Experience, ...]:
        rl, longest = config.rl, config.sampling.max_new_tokens
        return tuple(minibatches(exp, key, rl.minibatches, weighting=rl.weights, length=longest))

    return jax.jit(shuffled, out_shardings=batch_sharding(mesh))


def exactly_repeatable(config: PPOConfig, mesh: Mesh) -> PPOConfig:
    """The configuration with layers under one scan where a minibatch takes several passes.

    Scoring and update are then loops around the forward pass. XLA:CPU fuses unrolled layers with
    biases differently in the two (a rounding of 1e-7 in a few tokens, measured with gpt2), and the
    first ratio would not be exactly 1; the body of a scan is compiled alike in both.
    """
    plan = config.train.batch_plan(row_shards(mesh))
    passes = plan.batch_size // config.rl.minibatches > plan.microbatch_size * plan.shards
    if not passes or config.model.unroll == 1:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"unroll": 1})})


def make_actor_critic(
    config: PPOConfig, policy: Model, mesh: Mesh, key: jax.Array
) -> tuple[Params, Model | None]:
    """(the actor's parameters, the critic or None): rl.critic says what the critic begins as.

    Without values in the estimator nothing is added; a shared critic is a value head in the actor.
    """
    if not needs_values(config.rl.advantage):
        return policy.params, None
    if config.rl.critic == "shared":
        return {**policy.params, "value": new_head(policy, "value", key)}, None
    adapter = config.model.adapter is not None
    if config.rl.critic == "policy" and adapter:
        model, params = critic_of(policy, config.model, key, mesh)
        head = new_head(policy, "value", key)
        return policy.params, dataclasses.replace(model, params={**params, "value": head})
    if config.rl.critic == "policy":
        head = new_head(policy, "value", key)
        params = {**trunk(policy.params), "value": head}
        return policy.params, Model(**{**vars(policy), "params": params})
    [term] = [term for term in config.reward if term.kind == "model"]
    judge = open_model(
        config.model, mesh, path=term.source, kind="reward", frozen=adapter, share=policy
    )
    # A value is an expected score: the reward model's own head is where it begins.
    score = judge.params["score"]["kernel"][:, :1].astype(config.model.param_dtype)
    head = {"kernel": score, "bias": jnp.zeros((1,), score.dtype)}
    params = trunk(judge.params)
    judge = dataclasses.replace(judge, only=_only(config, judge))
    if adapter:
        judge, params = critic_of(judge, config.model, key, mesh)
    elif judge.adapted is not None:
        judge = merged(judge, config.model.param_dtype)
        params = trunk(judge.params)
    return policy.params, Model(**{**vars(judge), "params": {**params, "value": head}})


def _only(config: PPOConfig, model: Model) -> Only | None:
    """What trains of a critic that was opened on its own."""
    return parse_only(tuple(config.train.only), model.config) if config.train.only else None


def divided(policy: Model, actor: Params, critic: Model | None) -> tuple[Params, Params]:
    """(what trains, what is frozen) of actor and critic together."""
    models = {"actor": (policy, actor)}
    if critic is not None:
        models["critic"] = (critic, critic.params)
    parts = {name: halves(model, params) for name, (model, params) in models.items()}
    trained = {name: half for name, (half, _) in parts.items()}
    return trained, {name: half for name, (_, half) in parts.items() if half}


def make_loss(config: PPOConfig, policy: Model, critic: Model | None) -> LossFn:
    """Policy loss + value_coef x value loss - entropy_coef x entropy, on Experience."""
    loss = POLICY_LOSSES[config.rl.policy_loss]
    settings, needs = keywords(loss, config.rl), statistics(loss)
    value_settings = keywords(clipped_value, config.rl)
    with_values = needs_values(config.rl.advantage)
    temperature = config.sampling.temperature

    def loss_fn(params: Params, frozen: Params, batch: Experience, key: jax.Array) -> Any:
        mask = batch.completion_mask
        hidden = row_hidden(params["actor"], policy.config, policy.runtime, batch)
        entropic = bool(config.rl.entropy_coef)
        said = head_logprobs(
            params["actor"],
            policy.config,
            policy.runtime,
            hidden,
            batch.tokens,
            temperature=temperature,
            entropy=entropic,
        )
        logprobs, entropies = said if entropic else (said, None)
        found = {"logprobs": logprobs, "completion_mask": mask}
        stats: dict[str, Any] = {
            name: found.get(name, getattr(batch, name, None)) for name in needs
        }
        losses, metrics = loss(*stats.values(), **settings)
        if entropies is not None:
            bonus, more = entropy_bonus(entropies, mask, entropy_coef=config.rl.entropy_coef)
            losses, metrics = losses + bonus, {**metrics, **more}
        if with_values:
            if critic is None:
                values = head_values(params["actor"], hidden)
            else:
                trunk_hidden = row_hidden(params["critic"], critic.config, critic.runtime, batch)
                values = head_values(params["critic"], trunk_hidden)
            value_losses, more = clipped_value(
                values, batch.values, batch.returns, mask, **value_settings
            )
            losses, metrics = losses + config.rl.value_coef * value_losses, {**metrics, **more}
        off = (logprobs != batch.old_logprobs) & mask
        count = mask.sum()
        summed = {name: (keep(x, mask).sum(), count) for name, x in metrics.items()}
        summed["ratio/off"] = (off.sum().astype(jnp.float32), count)
        return weighted_sum(losses, batch.weights), summed

    return loss_fn


def make_experience(
    config: PPOConfig,
    policy: Model,
    reference: Model,
    critic: Model | None,
    mesh: Mesh,
    rows: int,
) -> Callable[..., tuple[Experience, Metrics]]:
    """The compiled scoring pass: (params, ref_params, rollout, scores, kl_coef) -> (experience,
    metrics). The coefficient is an argument, not a constant: a sweep over it compiles nothing anew.

    Everything is scored `rows` rows at a time, the shape of the update's own passes, by the one
    log-prob function: that is what makes the first ratio exactly 1.
    """
    rl, temperature = config.rl, config.sampling.temperature
    settings = keywords(ESTIMATORS[rl.advantage], rl)
    with_values = needs_values(rl.advantage)

    def said(params: Params, ref_params: Params, batch: Rollout) -> dict[str, jax.Array]:
        hidden = row_hidden(params["actor"], policy.config, policy.runtime, batch)
        ref_hidden = row_hidden(ref_params, reference.config, reference.runtime, batch)
        found = {
            "old": head_logprobs(
                params["actor"],
                policy.config,
                policy.runtime,
                hidden,
                batch.tokens,
                temperature=temperature,
            ),
            "ref": head_logprobs(
                ref_params,
                reference.config,
                reference.runtime,
                ref_hidden,
                batch.tokens,
                temperature=temperature,
            ),
        }
        if rl.kl_in_reward == "exact":
            found["exact_kl"] = head_exact_kl(
                params["actor"],
                ref_params,
                (policy.config, reference.config),
                policy.runtime,
                hidden,
                ref_hidden,
                temperature=temperature,
            )
        if with_values and critic is None:
            found["values"] = head_values(params["actor"], hidden)
        elif critic is not None:
            trunk_hidden = row_hidden(params["critic"], critic.config, critic.runtime, batch)
            found["values"] = head_values(params["critic"], trunk_hidden)
        return found

    def experience(
        params: Params, ref_params: Params, rollout: Rollout, scores: jax.Array, kl_coef: jax.Array
    ) -> tuple[Experience, Metrics]:
        found = in_minibatches(lambda batch: said(params, ref_params, batch), rollout, rows)
        mask = rollout.completion_mask
        exp = build_experience(
            rollout,
            scores,
            found["old"],
            found["ref"],
            found.get("values"),
            kl_coef=kl_coef,
            kl_in_reward=rl.kl_in_reward,
            exact_kl=found.get("exact_kl"),
            estimator=rl.advantage,
            estimator_kwargs=settings,
            whiten_advantages=rl.whiten_advantages,
            weighting=rl.weights,
        )
        n = rollout.lengths.shape[0]
        kl = masked_sum(found.get("exact_kl", found["old"] - found["ref"]), mask, axis=1)
        metrics: Metrics = {
            "kl": (kl.sum(), n),
            "objective": ((scores - kl_coef * kl).sum(), n),
            "completions/mean_length": (rollout.lengths.sum(), n),
            "completions/eos_rate": (rollout.finish_reason.sum(), n),
            "entropy_estimate": (-masked_sum(found["old"], mask), mask.sum()),
            "episodes": (jnp.asarray(n), 1),
            "tokens": (rollout.lengths.sum(), 1),
        }
        if (group := rl.samples_per_prompt) > 1:
            different = first_of_their_kind(rollout.tokens, mask, group)
            metrics["completions/distinct"] = (different.sum(), n)
        return exp, metrics

    rows_sharding, whole = batch_sharding(mesh), replicated(mesh)
    return jit(experience, mesh, out_shardings=(rows_sharding, whole))


def judge_rollout(
    judge: Judge, policy: Model, rollout: Rollout, batch: Any, group: int
) -> dict[str, np.ndarray]:
    """Scores of a rollout by name, float32 [B]; functions are given text."""
    tokens, prompt_lengths, lengths, reasons = (
        to_host(x)
        for x in (rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.finish_reason)
    )
    texts = []
    for row, start, length, stopped in zip(tokens, prompt_lengths, lengths, reasons, strict=True):
        said = row[start : start + length - int(stopped)]
        texts.append(decode_continuation(policy.tokenizer, row[:start], said))
    prompts = [prompt for prompt in batch.prompts for _ in range(group)]
    columns = {
        name: [value for value in values for _ in range(group)]
        for name, values in batch.columns.items()
    }
    return judge(prompts, texts, columns, rollout)


def add_metrics(total: Metrics, more: Metrics) -> None:
    """Adds (sum, count) pairs of one optimizer step to those of the iteration."""
    for name, (value, count) in more.items():
        if name in total and name not in ("tokens", "episodes"):
            before = total[name]
            total[name] = (before[0] + value, before[1] + count)
        else:
            total.setdefault(name, (value, count))


def make_evaluation(
    config: PPOConfig,
    policy: Model,
    reference: Model,
    judge: Judge,
    gold: Judge,
    prompts: PromptSet,
    mesh: Mesh,
    key: jax.Array,
) -> tuple[Callable[[Params, int], dict[str, float]], Callable[[Params, int], list[dict]]]:
    """(evaluate, sample): fresh completions of held-out prompts, always with the same key."""
    complete = make_completer(policy, config.sampling, mesh)
    kl = make_kl(policy, reference, mesh, temperature=config.sampling.temperature)
    eval_key = jax.random.fold_in(key, 1)
    latest: dict[str, Any] = {}

    def evaluate(params: Params, step: int) -> dict[str, float]:
        found = complete(params["actor"], prompts, 1, eval_key)
        scores = judge_completions(judge, found, mesh)
        total = judge.total(scores)
        nats = kl(params["actor"], found)
        truth = judge_completions(gold, found, mesh) if gold.scorers else {}
        latest.update(step=step, found=found, scores={**scores, **truth})
        metrics = {"reward": float(total.mean()), "kl": float(nats.mean())}
        metrics["objective"] = metrics["reward"] - config.rl.kl_coef * metrics["kl"]
        if truth:
            metrics["gold"] = float(gold.total(truth).mean())
        metrics |= {f"reward/{name}": float(values.mean()) for name, values in scores.items()}
        metrics |= {f"gold/{name}": float(values.mean()) for name, values in truth.items()}
        return metrics | describe_completions(
            found.texts, lengths=found.lengths.tolist(), finish_reasons=found.finish_reasons
        )

    def sample(params: Params, step: int) -> list[dict[str, Any]]:
        if latest.get("step") != step:
            evaluate(params, step)
        return sample_rows(latest["found"], latest["scores"], 8)

    return evaluate, sample


def sample_rows(
    found: Completions, scores: dict[str, np.ndarray], count: int
) -> list[dict[str, Any]]:
    """The first completions as rows of samples.jsonl."""
    return [
        {
            "prompt": found.prompts[i],
            "completion": found.texts[i],
            "scores": {name: float(values[i]) for name, values in scores.items()},
            "length": int(found.lengths[i]),
            "finish_reason": found.finish_reasons[i],
        }
        for i in range(min(count, len(found)))
    ]
