# SPDX-License-Identifier: Apache-2.0
"""The first ratio of every minibatch is exactly 1, through the real model and the real step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.losses.policy import clipped_value, ppo_clip
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.rows import head_logprobs, head_values, row_hidden, row_logprobs
from jaxrlhf.models.transformer import init_params
from jaxrlhf.ops.masking import weighted_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.rl.experience import build_experience, minibatches
from jaxrlhf.rl.rollout import roll_out
from jaxrlhf.rl.score import in_minibatches
from jaxrlhf.train.state import TrainState
from jaxrlhf.train.step import make_train_step
from jaxrlhf.types import LMBatch

LLAMA = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48
)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    num_kv_heads=4,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    position="learned",
    max_positions=64,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=False,
)
EPISODES = 16
# config, temperature, accumulation, runtime, entropy in the loss, learning rate
CASES = {
    "plain": (LLAMA, 1.0, 1, Runtime(), False, 1e-2),
    "accumulated, cool": (LLAMA, 0.7, 4, Runtime(logprob_chunk=8), True, 1e-2),
    "remat, unrolled": (
        LLAMA,
        0.7,
        2,
        Runtime(remat=True, unroll=True, logprob_chunk=8),
        True,
        0.0,
    ),
    "gpt2, remat": (GPT2, 0.7, 1, Runtime(remat=True), True, 0.0),
    # Layers with biases, accumulated, stay under a scan (stages.ppo.exactly_repeatable): unrolled,
    # a few tokens differ by a rounding.
    "gpt2, accumulated": (GPT2, 1.0, 2, Runtime(fuse=False), False, 1e-2),
}


@pytest.mark.slow  # tests/stages/test_ppo.py sees to the same in a whole run
@pytest.mark.parametrize("case", CASES)
def test_the_ratio_is_exactly_1_before_the_first_update_and_always_at_rate_0(case):
    config, temperature, accum, runtime, entropy, rate = CASES[case]
    params = init_params(jax.random.key(0), config, heads=("lm", "value"))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    parts = 2
    microbatch = EPISODES // parts // accum

    prompts = jax.random.randint(jax.random.key(1), (EPISODES, 5), 0, 61)
    lengths = jax.random.randint(jax.random.key(2), (EPISODES,), 1, 6)
    rollout = jit(
        lambda p: roll_out(
            p, config, runtime, prompts, lengths, jax.random.key(3),
            max_new_tokens=12, temperature=temperature, stop_ids=(7, 8, 9),
        )
    )(params)  # fmt: skip

    def score(rows):
        hidden = row_hidden(params, config, runtime, rows)
        said = head_logprobs(params, config, runtime, hidden, rows.tokens, temperature=temperature)
        return said, head_values(params, hidden)

    old, values = jit(lambda r: in_minibatches(score, r, microbatch))(rollout)
    scores = jax.random.normal(jax.random.key(4), (EPISODES,))
    exp = build_experience(rollout, scores, old, old, values)

    def loss_fn(trainable, frozen, rows, key):
        hidden = row_hidden(trainable, config, runtime, rows)
        out = head_logprobs(
            trainable,
            config,
            runtime,
            hidden,
            rows.tokens,
            temperature=temperature,
            entropy=entropy,
        )
        new, entropies = out if entropy else (out, jnp.zeros_like(old[:1]))
        new_values = head_values(trainable, hidden)
        mask = rows.completion_mask
        policy, metrics = ppo_clip(new, rows.old_logprobs, rows.advantages, mask)
        value, _ = clipped_value(new_values, rows.values, rows.returns, mask)
        total = weighted_sum(policy + 0.1 * value - 0.01 * entropies, rows.weights)
        off = {
            "ratio": (mask & (metrics["ratio"] != 1)).sum(),
            "clip": metrics["clip_ratio"].sum(),
            "kl": abs(metrics["approx_kl"]).sum(),
            "values": (mask & (new_values != rows.values)).sum(),
        }
        return total, {name: (x.astype(jnp.float32), mask.sum()) for name, x in off.items()}

    tx = optax.adam(1.0)
    step = jit(make_train_step(loss_fn, tx, accum=accum))
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), extra={})
    for epoch in range(2):
        for i, batch in enumerate(minibatches(exp, jax.random.key(epoch), parts)):
            state, metrics = step(state, {}, batch, jax.random.key(0), rate)
            if rate == 0 or (epoch == 0 and i == 0):
                for name in ("ratio", "clip", "kl", "values"):
                    assert float(metrics[name][0]) == 0, (name, epoch, i)
            elif epoch == 1:
                assert float(metrics["ratio"][0]) > 0  # the test can tell
    assert int(exp.completion_mask.sum()) > 60
    assert np.isfinite(float(metrics["loss"][0]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_forward_pass_gives_the_same_bits_with_a_gradient_as_without(architecture):
    """Of a size at which XLA:CPU begins to hand groups of operations to a library."""
    config = dataclasses.replace(
        architecture, hidden_size=96, num_layers=1, mlp_dim=192, max_positions=112
    )
    runtime, shape = Runtime(unroll=True), (64, 112)
    params = init_params(jax.random.key(0), config)
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(7), x.shape), params
    )
    tokens = jax.random.randint(jax.random.key(1), shape, 0, 61)
    rows = LMBatch(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(112), shape),
        segment_ids=jnp.ones(shape, jnp.int32),
        completion_mask=jnp.ones(shape, bool),
        weights=None,
    )

    def forward(params):
        return row_logprobs(params, config, runtime, rows)

    def with_gradient(params):
        def loss(params):
            logprobs = forward(params)
            return jnp.sin(logprobs).sum(), logprobs

        return jax.value_and_grad(loss, has_aux=True)(params)

    alone = np.asarray(jit(forward)(params))
    (_, beside), _ = jit(with_gradient)(params)
    assert np.ptp(alone) > 1
    np.testing.assert_array_equal(alone, beside)
