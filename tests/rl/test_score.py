# SPDX-License-Identifier: Apache-2.0
"""Scoring: alignment, order, padding."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import heads
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.rows import head_exact_kl, head_values, row_hidden, row_logprobs, row_scores
from jaxrlhf.models.transformer import init_params
from jaxrlhf.rl.rollout import roll_out
from jaxrlhf.rl.score import in_minibatches
from jaxrlhf.stages.training import stage_key

CONFIG = ModelConfig(vocab_size=29, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24)
RUNTIME = Runtime()


@cache
def params(seed=0):
    drawn = init_params(jax.random.key(seed), CONFIG, heads=("lm", "score", "value"))
    drawn["value"]["kernel"] = jax.random.normal(jax.random.key(5), (16, 1))
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, drawn)


@cache
def rows():
    prompts = jax.random.randint(jax.random.key(1), (3, 4), 0, 29)
    lengths = jnp.array([4, 1, 2])
    program = partial(
        roll_out, config=CONFIG, runtime=RUNTIME, samples_per_prompt=2, max_new_tokens=5,
        stop_ids=(3, 4, 5, 6),
    )  # fmt: skip
    return jax.jit(program)(
        params(), prompt_tokens=prompts, prompt_lengths=lengths, key=jax.random.key(2),
        policy_step=3,
    )  # fmt: skip


def scored(score, params, rows, **settings):
    """`score(params, CONFIG, RUNTIME, rows)`, compiled: op by op the model is slow."""
    return jax.jit(lambda p, r: score(p, CONFIG, RUNTIME, r, **settings))(params, rows)


def test_a_rollout_has_groups_side_by_side_and_its_policy_step():
    r = rows()
    assert r.prompt_lengths.tolist() == [4, 4, 1, 1, 2, 2]
    for a, b in ((0, 1), (2, 3), (4, 5)):
        n = int(r.prompt_lengths[a])
        np.testing.assert_array_equal(r.tokens[a, :n], r.tokens[b, :n])
    assert r.policy_step.tolist() == [3] * 6
    # Two completions of a few tokens may well be the same; those of all groups, hardly.
    different = [(r.tokens[a] != r.tokens[b]).any() for a, b in ((0, 1), (2, 3), (4, 5))]
    assert sum(map(bool, different)) >= 2


def test_keys_are_a_function_of_seed_and_stage():
    keys = [stage_key(*args) for args in ((0, "ppo"), (0, "sft"), (1, "ppo"))]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 3
    again = jax.random.key_data(stage_key(0, "ppo"))
    assert (again == jax.random.key_data(keys[0])).all()


def test_greedy_rollouts_are_refused():
    with pytest.raises(ValueError, match="positive"):
        roll_out(
            {}, CONFIG, RUNTIME, jnp.zeros((1, 1), int), jnp.ones(1, int), jax.random.key(0),
            max_new_tokens=1, temperature=0.0,
        )  # fmt: skip


def test_values_and_logprobs_stand_at_the_token_they_speak_of():
    r, p = rows(), params()
    hidden = scored(row_hidden, p, r)
    value = heads.scalar(p, hidden, "value")[..., 0]
    logp = jax.nn.log_softmax(heads.logits(p, CONFIG, hidden) / 0.7)
    got_values = head_values(p, hidden)
    got = scored(row_logprobs, p, r, temperature=0.7)
    for b, t in np.argwhere(np.asarray(r.completion_mask)):
        np.testing.assert_allclose(got_values[b, t], value[b, t - 1], atol=1e-5)
        np.testing.assert_allclose(got[b, t], logp[b, t - 1, r.tokens[b, t]], atol=1e-5)
    assert (got_values[:, 0] == 0).all()


def test_exact_kl_to_itself_is_exactly_0_and_to_another_positive():
    r, p, q = rows(), params(), params(1)
    hidden, other_hidden = scored(row_hidden, p, r), scored(row_hidden, q, r)
    same = head_exact_kl(p, p, (CONFIG, CONFIG), RUNTIME, hidden, hidden, temperature=0.7)
    both = (CONFIG, CONFIG)
    other = head_exact_kl(p, q, both, RUNTIME, hidden, other_hidden, temperature=0.7)
    assert (same == 0).all()
    assert (np.asarray(other)[np.asarray(r.completion_mask)] > 0).all()


def test_a_score_does_not_depend_on_padding_or_batch():
    r, p = rows(), params()
    together = scored(row_scores, p, r)
    for b in (1, 4):
        n = int(r.prompt_lengths[b] + r.lengths[b])
        alone = jax.tree.map(lambda x: x[b : b + 1, :n] if x.ndim == 2 else x[b : b + 1], r)  # noqa: B023
        np.testing.assert_allclose(scored(row_scores, p, alone)[0], together[b], atol=1e-5)


def test_scoring_in_parts_keeps_the_order_of_rows():
    x = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6)}
    for size in (1, 2, 3, 6):
        got = in_minibatches(lambda part: (part["a"] * 2, part["b"]), x, size)
        np.testing.assert_array_equal(got[0], x["a"] * 2)
        np.testing.assert_array_equal(got[1], x["b"])
    with pytest.raises(ValueError, match="6 rows cannot be scored 4 at a time"):
        in_minibatches(lambda part: part["b"], x, 4)
