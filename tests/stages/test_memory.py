# SPDX-License-Identifier: Apache-2.0
"""What a training step holds at once: never the logits of all positions, [B, T, V]."""

import math

import jax
import pytest

from jaxrlhf.config.stages import STAGES
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.planning import aot
from jaxrlhf.stages.programs import stage_programs

# A vocabulary so wide that nothing else comes near the size of its logits.
MODEL = ModelConfig(vocab_size=2003, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24)
LENGTH, CHUNK = 128, 32
SLOW = pytest.mark.slow


def largest(stage, **more):
    """(most numbers in one array of any program of the stage, rows it works on at once)."""
    rows = 4
    given = {
        "model": {"path": "none", "logprob_chunk": CHUNK},
        "data": {"train": ["none"], "max_length": LENGTH},
        "train": {"steps": 10, "batch_size": rows},
    } | more
    mesh = make_mesh(devices=jax.devices()[:1])
    config = STAGES[stage].model_validate(given)
    with use_mesh(mesh):
        programs = stage_programs(config, MODEL, mesh)
        found = aot.compile_programs(
            {name: programs[name] for name in ("train_step", "scorer") if name in programs}
        )
    sizes = [math.prod(b.shape) for program in found.values() for b in aot.buffers(program)]
    return max(sizes), rows * (2 if stage == "dpo" else 1)


PPO = {
    "reward": ["none"],
    "sampling": {"max_new_tokens": 64},
    "rl": {"minibatches": 1, "entropy_coef": 0.01, "kl_in_reward": "exact"},
}


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", {}), pytest.param("dpo", {}, marks=SLOW), pytest.param("ppo", PPO, marks=SLOW)],
)
def test_the_logits_of_all_positions_never_exist(stage, more):
    biggest, rows = largest(stage, **more)
    chunk = rows * CHUNK * MODEL.vocab_size
    assert biggest >= chunk, "the chunk of logits is there, so this test would see them all"
    assert biggest <= 1.01 * chunk


@SLOW
def test_without_chunks_they_would():
    whole, rows = largest("sft", model={"path": "none", "logprob_chunk": LENGTH})
    assert whole >= rows * (LENGTH - 1) * MODEL.vocab_size
