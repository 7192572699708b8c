# SPDX-License-Identifier: Apache-2.0
"""What is measured: the product's own programs on made-up rows, and the FLOPs a model needs there.

FLOPs counted ("model FLOPs"): 2 per multiply-add of the matrix products of layers and head, and of
the attention scores and sums over the causal half. Training counts three forward passes. Nothing
else counts: no recomputation, no norms, softmaxes, rotations or optimizer; a program that does such
work twice gets a lower share, not more FLOPs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.stages import (
    DPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainingConfig,
)
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.transformer import abstract_params
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.planning.aot import compile_programs
from jaxrlhf.sampling.batches import make_sampler
from jaxrlhf.stages.models import make_runtime
from jaxrlhf.stages.programs import stage_programs

RATE = np.float32(1e-5)  # of the optimizer steps

MODELS = {
    "tiny": ModelConfig(vocab_size=512, hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024),
    "small": ModelConfig(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, mlp_dim=1536),
    "quickstart": ModelConfig(
        vocab_size=369, hidden_size=64, num_layers=3, num_heads=4, mlp_dim=192
    ),
    "smoke": ModelConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Rows and lengths of the workloads."""

    sft: tuple[int, int] = (8, 256)  # rows, positions
    pairs: tuple[int, int] = (8, 256)  # of the reward model: pairs, positions
    dpo: tuple[int, int] = (4, 256)
    ppo: tuple[int, int, int] = (16, 64, 64)  # episodes, prompt, completion
    updates: tuple[int, int] = (1, 1)  # of ppo: epochs, minibatches
    decode: tuple[int, int] = (64, 64)  # prompt, completion
    batches: tuple[int, ...] = (1, 16, 64)  # of decode


SHAPES = {
    "tiny": Shapes(),
    "small": Shapes(),
    "quickstart": Shapes(
        sft=(32, 96), pairs=(64, 96), dpo=(64, 96), ppo=(128, 48, 48), updates=(1, 4)
    ),
    "smoke": Shapes(
        sft=(2, 16), pairs=(2, 16), dpo=(2, 16), ppo=(4, 8, 8), decode=(8, 4), batches=(1, 2)
    ),
}


def forward_flops(
    model: ModelConfig, rows: int, length: int, *, head: int | None = None, start: int = 0
) -> float:
    """One forward pass over positions [start, length) of `rows` rows.

    Args:
        head: positions a row whose logits are needed; None = all of them, 0 = no head at all.
    """
    D, F, H = model.hidden_size, model.mlp_dim, model.head_size
    heads = model.num_heads * H
    layer = D * (heads + 2 * model.kv_heads * H) + heads * D + D * F * (3 if model.gated_mlp else 2)
    positions = length - start
    keys = (length * (length + 1) - start * (start + 1)) / 2  # attended to, over all positions
    body = model.num_layers * (layer * positions + 2 * heads * keys)
    return 2.0 * rows * (body + D * model.vocab_size * (positions if head is None else head))


@dataclasses.dataclass
class Workload:
    """`run()` does one step of it and waits; `flops` are those of one step."""

    run: Callable[[], None]
    flops: float
    tokens: int


def _settings(rows: int, length: int) -> dict[str, Any]:
    return {
        "model": "benchmark",
        "data": {"train": "benchmark", "max_length": length},
        "train": {"batch_size": rows, "steps": 1000},
    }


def _random_params(shapes: Any) -> Any:
    """Parameters of these shapes: scales one, biases zero, everything else small and random."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.asarray(np.full(shape.shape, float(name == "scale"), shape.dtype))
        spread = shape.shape[-1 if name == "embedding" else -2] ** -0.5
        return jnp.asarray((spread * rng.standard_normal(shape.shape)).astype(shape.dtype))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _state(shapes: Any) -> Any:
    """A train state at step 0."""
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)
    return zeros.replace(params=_random_params(shapes.params))


def _rows(shapes: Any, vocab_size: int) -> Any:
    """Full rows of random tokens in place of the shapes of a batch; every token trains."""
    rng, found = np.random.default_rng(1), {}
    for field in dataclasses.fields(shapes):
        shape = getattr(shapes, field.name)
        if shape is None:
            continue
        value = np.zeros(shape.shape, shape.dtype)
        if field.name == "tokens":
            value = rng.integers(0, vocab_size, shape.shape)
        elif field.name == "positions":
            value = np.broadcast_to(np.arange(shape.shape[-1]), shape.shape)
        elif field.name in ("segment_ids", "completion_mask"):
            value = np.ones(shape.shape)
        elif field.name == "weights":
            value = np.full(shape.shape, 1 / shape.shape[0])
        found[field.name] = jnp.asarray(value.astype(shape.dtype))
    return shapes.replace(**found)


def _compile(config: TrainingConfig, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(programs, the same compiled)."""
    mesh = make_mesh()
    with use_mesh(mesh):
        programs = stage_programs(config, model, mesh)
        return programs, compile_programs(programs)


def _offline(config: TrainingConfig, model: ModelConfig, reference: bool) -> Callable[[], None]:
    """Optimizer steps on one batch; with `reference` also the reference's pass over it."""
    programs, compiled = _compile(config, model)
    shapes, _, batch_shapes, *_ = programs["train_step"].args
    state, key = _state(shapes), jax.random.key(0)
    batch = _rows(batch_shapes, model.vocab_size)
    frozen = jax.tree.map(jnp.copy, state.params) if reference else None

    def run() -> None:
        nonlocal state, batch
        if reference:
            scored = compiled["scorer"](frozen, batch)
            batch = batch.replace(ref_logprobs=scored)
        state, metrics = compiled["train_step"](state, {}, batch, key, RATE)
        jax.block_until_ready((state, metrics))

    return run


def sft(name: str) -> Workload:
    """One optimizer step of next-token training."""
    model, (rows, length) = MODELS[name], SHAPES[name].sft
    run = _offline(SFTConfig(**_settings(rows, length)), model, False)
    return Workload(run, 3 * forward_flops(model, rows, length), rows * length)


def reward(name: str) -> Workload:
    """One optimizer step of a reward model on pairs."""
    model, (pairs, length) = MODELS[name], SHAPES[name].pairs
    run = _offline(RewardConfig(**_settings(pairs, length)), model, False)
    return Workload(run, 3 * forward_flops(model, 2 * pairs, length, head=0), 2 * pairs * length)


def dpo(name: str) -> Workload:
    """One optimizer step on pairs, and the reference's pass over the same pairs."""
    model, (pairs, length) = MODELS[name], SHAPES[name].dpo
    run = _offline(DPOConfig(**_settings(pairs, length)), model, True)
    return Workload(run, 4 * forward_flops(model, 2 * pairs, length), 2 * pairs * length)


def ppo(name: str) -> Workload:
    """One iteration: sampling, the passes of policy, reference and critic, and the updates.

    Rewards are given numbers, as from a function: no pass of a reward model.
    """
    model, shape = MODELS[name], SHAPES[name]
    (episodes, prompt, new), (epochs, parts) = shape.ppo, shape.updates
    settings = _settings(episodes, prompt + new)
    config = PPOConfig(
        **settings,
        reward=["benchmark:given"],
        rl={"epochs": epochs, "minibatches": parts, "critic": "policy"},
        sampling={"max_new_tokens": new, "stop": []},
    )
    mesh = make_mesh()
    with use_mesh(mesh):
        programs = stage_programs(config, model, mesh)
        del programs["judge"]
        compiled = compile_programs(programs)
    state = _state(programs["train_step"].args[0])
    reference = jax.tree.map(jnp.copy, state.params["actor"])
    prompts = jax.random.randint(jax.random.key(1), (episodes, prompt), 0, model.vocab_size)
    scores = jax.random.normal(jax.random.key(2), (episodes,))
    lengths = jnp.full(episodes, prompt, jnp.int32)
    key = jax.random.key(0)

    def run() -> None:
        nonlocal state
        rollout = compiled["sampler"](
            state.params["actor"],
            prompt_tokens=prompts,
            prompt_lengths=lengths,
            key=key,
            policy_step=state.step,
        )
        experience, _ = compiled["scorer"](
            state.params, reference, rollout, scores, jnp.float32(config.rl.kl_coef)
        )
        for epoch in range(epochs):
            for rows in compiled["minibatches"](experience, jax.random.fold_in(key, epoch)):
                state, metrics = compiled["train_step"](state, {}, rows, key, RATE)
        jax.block_until_ready((state, metrics))

    total = prompt + new
    language = forward_flops(model, episodes, total)
    critic = forward_flops(model, episodes, total, head=0)
    sampling = forward_flops(model, episodes, total - 1, head=new)
    flops = sampling + 2 * language + critic + 3 * epochs * (language + critic)
    return Workload(run, flops, episodes * total)


def decode(name: str, batch: int, new: int | None = None) -> Workload:
    """Completions of `batch` prompts through the product's sampler."""
    model, (prompt, usual) = MODELS[name], SHAPES[name].decode
    new = new or usual
    runtime = make_runtime(SFTConfig(**_settings(batch, prompt)).model, model, make_mesh())
    sampler = make_sampler(model, runtime, max_new_tokens=new, batch_size=batch)
    params = _random_params(abstract_params(model))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (batch, prompt)).tolist()
    key = jax.random.key(0)

    def run() -> None:
        sampler(params, prompts, key)

    flops = forward_flops(model, batch, prompt + new - 1, head=new)
    return Workload(run, flops, batch * new)


def weight_bytes(name: str) -> int:
    """Bytes of weights that one decoding step reads: all matrices, in float32."""
    model = MODELS[name]
    D, F, H = model.hidden_size, model.mlp_dim, model.head_size
    layer = 2 * D * (model.num_heads + model.kv_heads) * H + 3 * D * F
    return 4 * (model.num_layers * layer + D * model.vocab_size)


WORKLOADS: dict[str, Callable[[str], Workload]] = {
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "ppo": ppo,
}
