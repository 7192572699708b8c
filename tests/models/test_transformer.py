# SPDX-License-Identifier: Apache-2.0
"""Properties that hold whatever the weights: causality, independence, cache, equal computations."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import (
    CONFIGS,
    MOST,
    RUNTIME,
    assert_same_bits,
    batch,
    hidden,
    params,
    random_rows,
)

from jaxrlhf.errors import ModelError
from jaxrlhf.models import heads
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import (
    abstract_params,
    decode_step,
    hidden_states,
    init_params,
    logical_axes,
    prefill,
    split_layers,
)

every = pytest.mark.parametrize("name", MOST)


@every
def test_changing_a_token_changes_nothing_before_it(name):
    tokens, positions, segments = batch(random_rows(0, (12, 12)))
    config = CONFIGS[name]
    before = np.asarray(hidden(params(name), config, RUNTIME, tokens, positions, segments))
    every_layer = config.window is not None and not config.window_layers
    reach = config.num_layers * (config.window - 1) + 1 if every_layer else 12
    for t in (1, 5, 7, 11):  # inside a block, at its start, at the end
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % 37
        after = np.asarray(hidden(params(name), config, RUNTIME, other, positions, segments))
        assert_same_bits(before[:, :t], after[:, :t])
        assert (before[:, t : t + reach] != after[:, t : t + reach]).any(-1).all()
        assert_same_bits(before[:, t + reach :], after[:, t + reach :])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_causality_every_token_sees_its_segment(name):
    tokens, positions, segments = batch(random_rows(0, (12, 12)))

    @jax.jit
    def run(tokens):
        return hidden_states(
            params(name), CONFIGS[name], RUNTIME, tokens, positions, segments, causal=False
        )

    other = tokens.copy()
    other[:, -1] = (other[:, -1] + 1) % 37
    assert (np.asarray(run(tokens)) != np.asarray(run(other))).any(-1).all()


@every
def test_neighbours_and_their_order_do_not_matter(name):
    tokens, positions, segments = batch(random_rows(1, (12, 4, 9)))
    out = np.asarray(hidden(params(name), CONFIGS[name], RUNTIME, tokens, positions, segments))
    order = [2, 0, 1]
    turned = hidden(
        params(name), CONFIGS[name], RUNTIME, tokens[order], positions[order], segments[order]
    )
    assert_same_bits(out[order], np.asarray(turned))


@every
def test_padding_neither_its_amount_nor_its_side_matters(name):
    rows = random_rows(2, (9, 4))
    run = lambda b: np.asarray(hidden(params(name), CONFIGS[name], RUNTIME, *b))  # noqa: E731
    alone = [run(batch([row]))[0] for row in rows]
    for length in (9, 12):
        out = run(batch(rows, length))
        left = run(batch(rows, length, left=True))
        for i, row in enumerate(rows):
            np.testing.assert_allclose(out[i, : len(row)], alone[i], atol=1e-5)
            np.testing.assert_allclose(left[i, length - len(row) :], alone[i], atol=1e-5)


@every
def test_what_stands_in_padding_does_not_matter(name):
    tree, config = params(name), CONFIGS[name]
    tokens, positions, segments = batch(random_rows(3, (12, 5)))

    @jax.jit
    def value_and_grad(tokens, positions):
        def loss(tree):
            out = hidden_states(tree, config, RUNTIME, tokens, positions, segments)
            return jnp.square(jnp.where(segments[..., None] > 0, out, 0)).sum()

        return jax.value_and_grad(loss)(tree)

    want = value_and_grad(tokens, positions)
    for garbage in (-1, 36, 2**31 - 1, -(2**31)):
        other_tokens = np.where(segments > 0, tokens, garbage)
        other_positions = np.where(segments > 0, positions, garbage)
        assert_same_bits(want, value_and_grad(other_tokens, other_positions))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))


@every
def test_rows_of_nothing_but_padding_stay_finite(name):
    zeros = np.zeros((2, 7), np.int32)
    assert np.isfinite(hidden(params(name), CONFIGS[name], RUNTIME, zeros, zeros, zeros)).all()


@every
def test_a_token_outside_the_vocabulary_is_not_taken_for_another(name):
    tokens, positions, segments = batch(random_rows(0, (12, 12)))
    for bad in (37, -1):
        wrong = tokens.copy()
        wrong[0, 6] = bad
        out = np.asarray(hidden(params(name), CONFIGS[name], RUNTIME, wrong, positions, segments))
        assert np.isnan(out[0, 6:]).all()
        assert np.isfinite(out[1]).all()


@every
def test_packed_documents_are_computed_as_if_alone(name):
    tree, config = params(name), CONFIGS[name]
    first, second = random_rows(4, (7, 5))
    tokens = np.array([[*first, *second, 0, 0]], np.int32)
    positions = np.array([[*range(7), *range(5), 0, 0]], np.int32)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 2], np.int32)
    packed = np.asarray(hidden(tree, config, RUNTIME, tokens, positions, segments))[0]
    for at, row in ((slice(0, 7), first), (slice(7, 12), second)):
        alone = np.asarray(hidden(tree, config, RUNTIME, *batch([row])))[0]
        np.testing.assert_allclose(packed[at], alone, atol=1e-5)
    # The second document does not see the first: bitwise, in values and in gradients.
    other = tokens.copy()
    other[:, :7] = (other[:, :7] + 3) % 37
    again = np.asarray(hidden(tree, config, RUNTIME, other, positions, segments))[0]
    assert_same_bits(packed[7:], again[7:])

    @jax.jit
    def gradient(tree):
        def loss(tree):
            return hidden_states(tree, config, RUNTIME, tokens, positions, segments)[0, 7:12].sum()

        return jax.grad(loss)(tree)["embed"]["embedding"]

    table = np.asarray(gradient(tree))
    only_first = sorted(set(first) - set(second))
    assert only_first
    assert not table[only_first].any()
    assert table[second].any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ways_of_computing_agree(name):
    tree, config = params(name), CONFIGS[name]
    rows = batch(random_rows(5, (12, 8)))

    def value_and_grad(runtime):
        @jax.jit
        def run(tree):
            def loss(tree):
                return jnp.square(hidden_states(tree, config, runtime, *rows)).mean()

            return jax.value_and_grad(loss)(tree)

        return run(tree)

    want, want_grads = value_and_grad(RUNTIME)
    for change in (
        {"unroll": True},
        {"remat": True},
        {"remat": True, "unroll": True},
        {"fuse": False},
        {"attention_block": 0},
    ):
        got, grads = value_and_grad(dataclasses.replace(RUNTIME, **change))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_decoding_equals_whole_rows(name, split):
    tree, config = params(name), CONFIGS[name]
    rows, prompts, width, steps = random_rows(6, (9, 12, 7)), (3, 6, 1), 6, 6
    whole = np.asarray(hidden(tree, config, RUNTIME, *batch(rows)))
    prompt = batch([row[:n] for row, n in zip(rows, prompts, strict=True)], width)
    tokens = np.array([row[n : n + steps] for row, n in zip(rows, prompts, strict=True)])
    lengths = np.array(prompts)
    columns = np.arange(width + steps + 2)
    # Everything after the prompts is open in the mask: columns not yet written must not count.
    mask = (columns < lengths[:, None]) | (columns >= width)

    @jax.jit
    def run(tree):
        tree = split_layers(tree, config, RUNTIME) if split else tree
        first, cache = prefill(tree, config, RUNTIME, *prompt, len(columns))
        out = []
        for t in range(steps):
            step, cache = decode_step(
                tree, config, RUNTIME, tokens[:, t], lengths + t, cache, width + t, mask
            )
            out.append(step)
        return first, jnp.stack(out, 1), cache

    first, out, cache = run(tree)
    # Rounding only: over twelve seeds at most 3e-6 of the largest value.
    close = partial(np.testing.assert_allclose, atol=5e-6 * np.abs(whole).max())
    for i, n in enumerate(prompts):
        close(first[i, :n], whole[i, :n])
        close(out[i], whole[i, n : n + steps])
    assert len(cache) == config.num_layers
    assert cache[0]["k"].shape == (3, config.kv_heads, len(columns), config.head_size)
    assert not np.asarray(cache[0]["k"])[:, :, width + steps :].any()


def test_a_cache_shorter_than_the_prompt_is_refused():
    with pytest.raises(ValueError, match="cache_length = 4"):
        prefill(params("llama"), CONFIGS["llama"], RUNTIME, *batch(random_rows(0, (6,))), 4)


@every
def test_bfloat16_stays_near_float32_and_heads_answer_in_float32(name):
    tree, config = params(name), CONFIGS[name]
    rows = batch(random_rows(7, (12, 8)))
    exact = np.asarray(hidden(tree, config, RUNTIME, *rows))
    low = hidden(tree, config, dataclasses.replace(RUNTIME, dtype="bfloat16"), *rows)
    assert low.dtype == jnp.bfloat16
    error = np.asarray(low, np.float32) - exact
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)
    assert heads.logits(tree, config, low).dtype == jnp.float32
    assert heads.scalar(tree, low, "value").dtype == jnp.float32


def test_the_score_is_read_at_the_last_real_token_alone():
    tree, config = params("llama"), CONFIGS["llama"]
    rows = random_rows(8, (12, 5, 1))
    tokens, positions, segments = batch(rows)
    states = np.asarray(hidden(tree, config, RUNTIME, tokens, positions, segments))
    got = heads.last_token_score(tree, jnp.asarray(states), segments)
    kernel = np.asarray(tree["score"]["kernel"], np.float64)
    want = [states[i, len(row) - 1].astype(np.float64) @ kernel for i, row in enumerate(rows)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    empty = heads.last_token_score(tree, jnp.asarray(states), np.zeros_like(segments))
    assert np.isfinite(empty).all()


@every
def test_axes_are_named_for_every_dimension(name):
    shapes = abstract_params(CONFIGS[name], heads=("lm", "score", "value"))
    axes = logical_axes(CONFIGS[name], heads=("lm", "score", "value"))
    known = {"layers", "embed", "heads", "kv_heads", "mlp", "vocab", "experts", None}
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(shapes) == jax.tree.structure(
        jax.tree.map(lambda _: 0, axes, is_leaf=is_axes)
    )
    for shape, names in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_axes), strict=True
    ):
        assert len(shape.shape) == len(names)
        assert set(names) <= known
    assert axes["layers"]["attention"]["o"]["kernel"] == ("layers", "heads", "embed")


def test_a_fresh_model_predicts_nearly_uniformly_and_layers_differ():
    config = dataclasses.replace(CONFIGS["llama"], tie_embeddings=False)
    tree = init_params(jax.random.key(0), config)
    rows = batch(random_rows(9, (12, 12)))
    logits = heads.logits(tree, config, hidden(tree, config, RUNTIME, *rows))
    loss = -jax.nn.log_softmax(logits).mean()
    assert abs(float(loss) - np.log(37)) < 0.2
    kernel = tree["layers"]["attention"]["q"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_impossible_models_are_refused_with_every_reason():
    with pytest.raises(ModelError, match=r"(?s)vocab_size = 0.*norm = 'batch'"):
        ModelConfig(vocab_size=0, norm="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="does not divide"):
        ModelConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(ModelError, match="no multiple"):
        ModelConfig(hidden_size=30, num_heads=4)
    with pytest.raises(ModelError, match="even head size"):
        ModelConfig(head_dim=5)
    with pytest.raises(ModelError, match=r"did you mean 'num_heads'"):
        ModelConfig.from_dict({"num_head": 4})
    with pytest.raises(ModelError, match="dtype = 'int8'"):
        Runtime(dtype="int8")
    scaled = dataclasses.replace(
        CONFIGS["llama"], rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    assert ModelConfig.from_dict(scaled.to_dict()) == scaled
    assert hash(scaled) != hash(CONFIGS["llama"])
