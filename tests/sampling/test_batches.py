# SPDX-License-Identifier: Apache-2.0
"""Buckets: few shapes, results in the order asked for."""

import dataclasses

import jax
import pytest

from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import init_params
from jaxrlhf.sampling import make_sampler
from jaxrlhf.sampling.batches import bucket, longest_prompt, pad_prompts

CONFIG = ModelConfig(vocab_size=29, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24)
PROMPTS = [[1] * 40, [2, 3], [4], [5] * 9, [6, 7, 8]]


def test_buckets_are_few_and_stay_below_the_limit():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 200)] == [32, 32, 64, 64, 128, 256]
    assert bucket(20, limit=24) == 24
    assert len({bucket(n) for n in range(1, 1000)}) == 6


def test_padding_keeps_tokens_and_lengths():
    tokens, lengths = pad_prompts([[3, 4], []], 4)
    assert tokens.tolist() == [[3, 4, 0, 0], [0] * 4]
    assert lengths.tolist() == [2, 0]


def test_results_are_in_order_and_do_not_depend_on_the_batches():
    params = init_params(jax.random.key(0), CONFIG)
    params = jax.tree.map(lambda x: 10 * x, params)
    key = jax.random.key(1)
    wide = make_sampler(CONFIG, Runtime(), max_new_tokens=6, stop_ids=(3,), batch_size=8)
    narrow = make_sampler(CONFIG, Runtime(), max_new_tokens=6, stop_ids=(3,), batch_size=2)
    a, b = wide(params, PROMPTS, key), narrow(params, PROMPTS, key)
    assert [r.token_ids for r in a] == [r.token_ids for r in b]
    for one, other in zip(a, b, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert len(one.logprobs) == len(one.token_ids)
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == 3)
    back = wide(params, PROMPTS[::-1], key, row_ids=[4, 3, 2, 1, 0])
    assert [r.token_ids for r in back[::-1]] == [r.token_ids for r in a]
    assert wide(params, [], key) == []


def test_an_empty_prompt_and_a_bad_batch_size_are_refused():
    sampler = make_sampler(CONFIG, Runtime(), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompts \[1\] have no tokens"):
        sampler({}, [[1], []], jax.random.key(0))
    with pytest.raises(ValueError, match="row_multiple = 3"):
        make_sampler(CONFIG, Runtime(), max_new_tokens=2, batch_size=4, row_multiple=3)


@pytest.mark.parametrize(
    "scaling",
    [
        (("rope_type", "dynamic"), ("factor", 2.0)),
        (
            ("rope_type", "longrope"),
            ("original_max_position_embeddings", 100),
            ("long_factor", (2.0,) * 4),
            ("short_factor", (1.0,) * 4),
        ),
    ],
    ids=lambda scaling: scaling[0][1],
)
def test_prompts_up_to_the_original_length_are_sampled(scaling):
    """70 + 8 of 100 positions: the bucket of 128 ends where the completion still fits."""
    config = dataclasses.replace(CONFIG, max_positions=100, rope_scaling=scaling)
    params = init_params(jax.random.key(0), config)
    assert longest_prompt(config, params, 8) == 92
    assert bucket(70, limit=92) == 92
    [found] = make_sampler(config, Runtime(), max_new_tokens=8)(
        params, [[1] * 70], jax.random.key(1)
    )
    assert len(found.token_ids) == 8
    assert longest_prompt(CONFIG, params, 8) is None
