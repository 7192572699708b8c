# SPDX-License-Identifier: Apache-2.0
"""A larger vocabulary: new rows are means, old ones stay, and transformers reads the result."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import CONFIGS

from jaxrlhf.models.resize import enlarge_vocabulary
from jaxrlhf.models.transformer import init_params

NAMES = ("llama", "gpt2")


def untied(name):
    return dataclasses.replace(CONFIGS[name], tie_embeddings=False)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_new_rows_are_the_mean_and_old_ones_stay(name, dtype):
    config = untied(name)
    params = init_params(jax.random.key(0), config, heads=("lm", "value"), param_dtype=dtype)
    size = config.vocab_size + 5
    grown, larger = enlarge_vocabulary(params, config, size)
    assert larger == dataclasses.replace(config, vocab_size=size)
    for path, axis in (("embed/embedding", 0), ("lm_head/kernel", 1)):
        outer, leaf = path.split("/")
        old, new = (np.asarray(tree[outer][leaf], np.float64) for tree in (params, grown))
        mean = old.mean(axis=axis, keepdims=True)
        kept, added = np.split(new, [config.vocab_size], axis=axis)
        np.testing.assert_array_equal(kept, old)
        want = np.asarray(jnp.asarray(mean, dtype), np.float64)
        bound = 1e-7 if dtype == "float32" else 2.0**-8 * np.abs(want).max()
        np.testing.assert_allclose(added, np.broadcast_to(want, added.shape), atol=bound)
    assert grown["layers"] is params["layers"], "nothing else is touched or copied"
    assert grown["value"] is params["value"]


def test_no_old_probability_moves_by_more_than_the_new_tokens_take():
    config = untied("llama")
    head = init_params(jax.random.key(1), config)["lm_head"]["kernel"]
    hidden = jax.random.normal(jax.random.key(2), (7, config.hidden_size)) * 3
    params = {"embed": {"embedding": head.T}, "lm_head": {"kernel": head}}
    grown, _ = enlarge_vocabulary(params, config, config.vocab_size + 3)
    before = np.asarray(jax.nn.log_softmax(hidden @ head), np.float64)
    after = np.asarray(jax.nn.log_softmax(hidden @ grown["lm_head"]["kernel"]), np.float64)
    # The mean logit is at most the logarithm of the mean exponential (Jensen), so k new tokens
    # take at most the share k / (V + k).
    least = math.log(config.vocab_size / (config.vocab_size + 3))
    moved = after[:, : config.vocab_size] - before
    assert (moved <= 1e-5).all()
    assert (moved >= least - 1e-5).all()
    assert (moved < -1e-6).all(), "the new tokens do take something"


def test_fewer_rows_are_refused():
    config = CONFIGS["llama"]
    params = init_params(jax.random.key(0), config)
    same, unchanged = enlarge_vocabulary(params, config, config.vocab_size)
    assert same is params
    assert unchanged is config
    with pytest.raises(ValueError, match="fewer than"):
        enlarge_vocabulary(params, config, config.vocab_size - 1)
