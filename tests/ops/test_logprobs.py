# SPDX-License-Identifier: Apache-2.0
"""Chunked log-probs, entropies and exact KL against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.ops.logprobs import exact_kl, token_logprobs

B, T, D, V = 3, 10, 8, 23


def case(seed: int = 0):
    k = jax.random.split(jax.random.key(seed), 5)
    return (
        jax.random.normal(k[0], (B, T, D)),
        jax.random.normal(k[1], (D, V)),
        jax.random.randint(k[2], (B, T), 0, V),
        jax.random.normal(k[3], (B, T, D)),
        jax.random.normal(k[4], (D, V)),
    )


def numpy_log_softmax(hidden, kernel, temperature):
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_kl_match_numpy(chunk, temperature):
    hidden, kernel, tokens, ref_hidden, ref_kernel = case()
    p = numpy_log_softmax(hidden, kernel, temperature)
    q = numpy_log_softmax(ref_hidden, ref_kernel, temperature)
    want, entropy, kl = np.zeros((B, T)), np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):
            want[b, t] = p[b, t - 1, tokens[b, t]]
            entropy[b, t] = -(np.exp(p[b, t - 1]) * p[b, t - 1]).sum()
            kl[b, t] = (np.exp(p[b, t - 1]) * (p[b, t - 1] - q[b, t - 1])).sum()
    kwargs = {"temperature": temperature, "chunk": chunk}
    got, got_entropy = token_logprobs(hidden, kernel, tokens, entropy=True, **kwargs)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_entropy, entropy, atol=1e-5)
    got_kl = exact_kl(hidden, kernel, ref_hidden, ref_kernel, **kwargs)
    np.testing.assert_allclose(got_kl, kl, atol=1e-5)
    alone = token_logprobs(hidden, kernel, tokens, **kwargs)
    np.testing.assert_array_equal(alone, got)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_exact_kl_is_0_for_equal_models_and_never_negative(seed):
    hidden, kernel, _, ref_hidden, _ = case(seed)
    assert (exact_kl(hidden, kernel, hidden, kernel, chunk=4) == 0).all()
    near = hidden + 1e-3 * ref_hidden
    assert exact_kl(hidden, kernel, near, kernel, chunk=4).min() >= 0


def test_gradients_do_not_depend_on_the_chunk_and_match_the_plain_formula():
    hidden, kernel, tokens, _, _ = case(1)
    weights = jax.random.normal(jax.random.key(9), (B, T))

    def plain(hidden, kernel):
        logp = jax.nn.log_softmax(hidden @ kernel / 0.7)
        picked = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        return (picked * weights[:, 1:]).sum()

    want = jax.grad(plain, (0, 1))(hidden, kernel)
    for chunk in (3, 128):

        def ours(hidden, kernel, chunk=chunk):
            logp = token_logprobs(hidden, kernel, tokens, temperature=0.7, chunk=chunk)
            return (logp * weights).sum()

        for a, b in zip(jax.grad(ours, (0, 1))(hidden, kernel), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_hidden_states_still_give_float32_log_softmax():
    hidden, kernel, tokens, _, _ = case(2)
    low = hidden.astype(jnp.bfloat16)
    got = token_logprobs(low, kernel, tokens)
    assert got.dtype == jnp.float32
    rounded = low.astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(got, token_logprobs(*rounded, tokens), atol=1e-4)


@pytest.mark.parametrize("garbage", [-1, V, 2**30])
def test_an_id_outside_the_vocabulary_stays_in_its_slot(garbage):
    hidden, kernel, tokens, _, _ = case(3)
    clean = token_logprobs(hidden, kernel, tokens)
    dirty = token_logprobs(hidden, kernel, tokens.at[:, -1].set(garbage))
    np.testing.assert_array_equal(clean[:, :-1], dirty[:, :-1])
    assert np.isfinite(dirty).all()


def test_no_array_of_all_logits_exists_in_the_gradient_program():
    wide, long = 97, 64  # numbers that occur nowhere else
    hidden, kernel = jnp.zeros((B, long, D)), jnp.zeros((D, wide))
    tokens = jnp.zeros((B, long), int)

    def loss(hidden, kernel, tokens):
        return token_logprobs(hidden, kernel, tokens, chunk=8).sum()

    gradient = jax.grad(loss, (0, 1))
    text = jax.jit(gradient).lower(hidden, kernel, tokens).compile().as_text()
    assert f"{B},8,{wide}]" in text  # a chunk's logits
    assert f"{B},{long},{wide}]" not in text
    assert f"{long // 8},{B},8,{wide}]" not in text  # nor stacked by the loop
    equations = jax.make_jaxpr(gradient)(hidden, kernel, tokens).eqns
    loops = [equation for equation in equations if equation.primitive.name == "scan"]
    assert loops
    for loop in loops:  # nor does anything of a chunk's size live as long as the loop
        assert all(each.aval.shape != (B, 8, wide) for each in loop.invars)


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"temperature": -1.0}, {"chunk": 0}])
def test_settings_without_a_meaning_are_refused(kwargs):
    hidden, kernel, tokens, _, _ = case()
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        token_logprobs(hidden, kernel, tokens, **kwargs)
