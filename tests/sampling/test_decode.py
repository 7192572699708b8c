# SPDX-License-Identifier: Apache-2.0
"""The sampler against full forward passes, transformers and the published text."""

import dataclasses
import json
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import heads
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.transformer import hidden_states, init_params
from jaxrlhf.models.weights import load_hf
from jaxrlhf.ops.logprobs import token_logprobs
from jaxrlhf.sampling import make_sampler, sample
from jaxrlhf.sampling.filters import candidates

V, B, P, N = 29, 4, 6, 7
RUNTIME = Runtime()
LLAMA = ModelConfig(
    vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24
)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    num_kv_heads=4,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    position="learned",
    max_positions=32,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
KEY = jax.random.key(7)


@cache
def model(name: str):
    params = init_params(jax.random.key(0), CONFIGS[name])

    # Far from uniform, or a wrong position would hardly show; not so far that nothing is drawn.
    params = jax.tree.map(lambda x: x * (3 if x.ndim == 3 else 30 if x.ndim == 2 else 1), params)
    for table in ("embed", "position_embed"):
        if table in params:
            params[table]["embedding"] *= 0.02 * CONFIGS[name].hidden_size ** 0.5
    return params


def prompts(seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (B, P), 0, V)
    return tokens, jnp.array([6, 1, 3, 4])


@partial(jax.jit, static_argnames=("name", "kwargs"))
def run(params, tokens, lengths, key, ids, name="llama", kwargs=()):
    return sample(
        params,
        CONFIGS[name],
        RUNTIME,
        tokens,
        lengths,
        key,
        ids,
        **{"max_new_tokens": N, **dict(kwargs)},
    )


def sampled(name="llama", seed=1, ids=None, **kwargs):
    tokens, lengths = prompts(seed)
    ids = jnp.arange(B) if ids is None else ids
    return run(model(name), tokens, lengths, KEY, ids, name, tuple(sorted(kwargs.items())))


def forward(name, rollout):
    fields = rollout.tokens, rollout.positions, rollout.segment_ids
    return jax.jit(lambda *xs: hidden_states(model(name), CONFIGS[name], RUNTIME, *xs))(*fields)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_decoding_are_those_of_a_full_forward_pass(name, temperature):
    rollout = sampled(name, temperature=temperature)
    kernel = heads.lm_head_kernel(model(name))
    want = token_logprobs(forward(name, rollout), kernel, rollout.tokens, temperature=temperature)
    mask = np.asarray(rollout.completion_mask)
    got = np.asarray(rollout.sampler_logprobs)
    np.testing.assert_allclose(got[mask], np.asarray(want)[mask], atol=1e-4)
    assert (got[~mask] == 0).all()
    assert got[mask].std() > 0.1


@pytest.mark.parametrize(
    "kwargs", [{"top_k": 5, "top_p": 0.8}, {"top_p": 0.6, "temperature": 1.3}, {"min_p": 0.1}]
)
def test_filtered_logprobs_are_renormalised_over_the_declared_support(kwargs):
    rollout = sampled(**kwargs)
    logits = heads.logits(model("llama"), LLAMA, forward("llama", rollout))
    logprobs, ids = map(np.asarray, candidates(logits.reshape(-1, V), **kwargs))
    tokens, got = np.asarray(rollout.tokens), np.asarray(rollout.sampler_logprobs)
    for b, t in np.argwhere(np.asarray(rollout.completion_mask)):
        row = b * (P + N) + t - 1
        [at] = np.flatnonzero(ids[row] == tokens[b, t])
        np.testing.assert_allclose(got[b, t], logprobs[row, at], atol=1e-4)


def test_rows_are_contiguous_and_masks_come_from_lengths():
    rollout = sampled()
    tokens, lengths = prompts()
    for b in range(B):
        n, total = int(lengths[b]), int(lengths[b] + rollout.lengths[b])
        np.testing.assert_array_equal(rollout.tokens[b, :n], tokens[b, :n])
        np.testing.assert_array_equal(rollout.tokens[b, total:], 0)
        np.testing.assert_array_equal(rollout.positions[b, :total], np.arange(total))
        np.testing.assert_array_equal(rollout.segment_ids[b], np.arange(P + N) < total)
        mask = (np.arange(P + N) >= n) & (np.arange(P + N) < total)
        np.testing.assert_array_equal(rollout.completion_mask[b], mask)
    assert rollout.finish_reason.tolist() == [0] * B
    assert rollout.lengths.tolist() == [N] * B


def test_a_sample_depends_on_its_row_id_not_on_its_place_or_neighbours():
    plain = sampled()
    order = jnp.array([2, 0, 3, 1])
    tokens, lengths = prompts()
    moved = run(model("llama"), tokens[order], lengths[order], KEY, order)
    jax.tree.map(np.testing.assert_array_equal, moved, jax.tree.map(lambda x: x[order], plain))
    other = tokens.at[1:].set(3)
    beside = run(model("llama"), other, lengths, KEY, jnp.arange(B))
    np.testing.assert_array_equal(beside.tokens[0], plain.tokens[0])
    np.testing.assert_array_equal(beside.sampler_logprobs[0], plain.sampler_logprobs[0])


def test_other_rows_keys_and_steps_draw_differently():
    same = jnp.full((B, P), 5), jnp.full(B, 3)
    a = run(model("llama"), *same, KEY, jnp.arange(B))
    b = run(model("llama"), *same, jax.random.key(8), jnp.arange(B))
    rows = {tuple(row) for r in (a, b) for row in np.asarray(r.tokens).tolist()}
    assert len(rows) == 2 * B


def test_what_stands_in_prompt_padding_does_not_matter():
    tokens, lengths = prompts()
    padding = jnp.arange(P) >= lengths[:, None]
    for garbage in (-1, 2**30):
        dirty = jnp.where(padding, garbage, tokens)
        got = run(model("llama"), dirty, lengths, KEY, jnp.arange(B))
        jax.tree.map(np.testing.assert_array_equal, got, sampled())


def test_a_row_ends_with_the_first_stop_token_and_counts_nothing_after_it():
    free = sampled()
    completions = [
        np.asarray(free.tokens[b])[np.asarray(free.completion_mask[b])].tolist() for b in range(B)
    ]
    # Also 0, the filling: stopping must not be confused with padding.
    for stops in [
        (completions[0][2], completions[1][4]),
        (completions[2][0],),
        (0,),
        tuple(range(V)),
    ]:
        cut = sampled(stop_ids=stops)
        for b, whole in enumerate(completions):
            first = next((i for i, token in enumerate(whole) if token in stops), None)
            want = whole if first is None else whole[: first + 1]
            mask = np.asarray(cut.completion_mask[b])
            assert np.asarray(cut.tokens[b])[mask].tolist() == want
            assert int(cut.lengths[b]) == len(want) == mask.sum()
            assert int(cut.finish_reason[b]) == (first is not None)
            start = int(cut.prompt_lengths[b]) + len(want)
            assert (np.asarray(cut.tokens[b])[start:] == 0).all()
            assert (np.asarray(cut.sampler_logprobs[b])[start:] == 0).all()


def test_the_loop_ends_when_every_row_has():
    steps = []

    def probe(params, tokens, lengths):
        real = jax.lax.while_loop

        def counted(cond, body, init):
            out = real(cond, body, init)
            steps.append(out[0])
            return out

        jax.lax.while_loop = counted
        try:
            r = sample(
                params, LLAMA, RUNTIME, tokens, lengths, KEY, jnp.arange(B),
                max_new_tokens=50, stop_ids=tuple(range(V)),
            )  # fmt: skip
        finally:
            jax.lax.while_loop = real
        return r.lengths, steps.pop()

    lengths, ran = jax.jit(probe)(model("llama"), *prompts())
    assert lengths.tolist() == [1] * B
    assert ran == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_no_step_copies_a_cache(rows):
    """The loop's body makes no array of a cache's shape but the caches with a column written."""
    tokens, lengths, ids = jnp.zeros((rows, P), int), jnp.full(rows, P), jnp.arange(rows)
    lowered = run.lower(model("llama"), tokens, lengths, KEY, ids)
    program = lowered.compile().as_text()
    shape = f"f32[{rows},{LLAMA.kv_heads},{P + N},{LLAMA.head_size}]"
    bodies = [
        program.split(f"\n%{name} ")[1].split("\n}")[0]
        for name in re.findall(r" while\(.*body=%([^,]+)", program)
    ]
    [loop] = [body for body in bodies if shape in body]
    made = [line for line in loop.splitlines() if f" = {shape}" in line]
    made = [line for line in made if " get-tuple-element(" not in line]
    assert len(made) == 2 * LLAMA.num_layers
    assert all("dynamic-update-slice" in line for line in made)


def test_filler_rows_sample_nothing_and_keep_nobody_waiting():
    tokens, lengths = prompts()
    got = run(model("llama"), tokens, lengths.at[1].set(0), KEY, jnp.arange(B))
    assert got.lengths.tolist() == [N, 0, N, N]
    assert not got.completion_mask[1].any()
    np.testing.assert_array_equal(got.tokens[0], sampled().tokens[0])


def test_several_samples_of_a_prompt_equal_the_prompt_written_out():
    tokens, lengths = prompts()
    ids = jnp.arange(3 * B)
    got = run(model("llama"), tokens, lengths, KEY, ids, "llama", (("samples_per_prompt", 3),))
    tokens, lengths = jnp.repeat(tokens, 3, 0), jnp.repeat(lengths, 3, 0)
    want = run(model("llama"), tokens, lengths, KEY, ids)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.sampler_logprobs, want.sampler_logprobs, atol=1e-5)


def test_first_tokens_follow_the_softmax_of_the_model():
    from scipy.stats import chisquare

    n = 4096
    tokens, lengths = jnp.full((n, 1), 5), jnp.ones(n, int)
    kwargs = (("max_new_tokens", 2), ("temperature", 1.5))
    rollout = run(model("llama"), tokens, lengths, KEY, jnp.arange(n), "llama", kwargs)
    one = jnp.array([[5]])
    hidden = hidden_states(model("llama"), LLAMA, RUNTIME, one, one * 0, one * 0 + 1)
    logits = heads.logits(model("llama"), LLAMA, hidden)[0, 0]
    probs = np.asarray(jax.nn.softmax(logits / 1.5), np.float64)
    drawn = np.asarray(rollout.tokens)
    counts = np.bincount(drawn[:, 1], minlength=V)
    used = probs * n > 5
    cells = np.append(counts[used], counts[~used].sum())
    expected = np.append(probs[used], probs[~used].sum()) * n
    assert chisquare(cells, expected * n / expected.sum()).pvalue > 1e-4


def test_greedy_repeats_itself_whatever_the_key_and_says_log_prob_0():
    a = sampled(temperature=0.0)
    b = sampled(temperature=0.0, ids=jnp.arange(B) + 100)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.sampler_logprobs == 0).all()
    logits = heads.logits(model("llama"), LLAMA, forward("llama", a))
    best = np.asarray(logits.argmax(-1))
    for row, t in np.argwhere(np.asarray(a.completion_mask)):
        assert int(a.tokens[row, t]) == best[row, t - 1]


def test_learned_positions_are_not_run_past():
    with pytest.raises(ValueError, match="32 positions"):
        sampled("gpt2", max_new_tokens=40)


def test_published_greedy_text_of_the_real_model(stories):
    expected = json.loads((stories / "expected.json").read_text())["greedy"]
    loaded = load_hf(stories, kind="lm")
    sampler = make_sampler(loaded.config, RUNTIME, max_new_tokens=200, temperature=0.0)
    [got] = sampler(loaded.params, [expected["prompt_ids"]], KEY)
    assert got.token_ids == expected["token_ids"]
    assert got.finish_reason == "length"


@pytest.mark.torch
@pytest.mark.parametrize("which", ["stories", "gpt2"])
def test_greedy_equals_transformers(which, stories, tmp_path):
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if which == "gpt2":
        config = hf.GPT2Config(
            vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=None, eos_token_id=None, initializer_range=0.4,
        )  # fmt: skip
        hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    folder = stories if which == "stories" else tmp_path
    loaded = load_hf(folder, kind="lm")
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    asked = [
        [1, *rng.integers(3, loaded.config.vocab_size, rng.integers(0, 12)).tolist()]
        for _ in range(50)
    ]
    n = 64
    sampler = make_sampler(loaded.config, RUNTIME, max_new_tokens=n, temperature=0.0)
    ours = sampler(loaded.params, asked, KEY)
    compared = 0
    for prompt, got in zip(asked, ours, strict=True):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                max_new_tokens=n, min_new_tokens=None, do_sample=False, eos_token_id=None,
                pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        want = out.sequences[0, len(prompt) :].tolist()
        top = torch.stack(out.logits)[:, 0].topk(2).values
        ties = (top[:, 0] - top[:, 1] < 1e-3).nonzero()
        until = int(ties[0]) if len(ties) else n  # beyond a tie the two may rightly part
        assert got.token_ids[:until] == want[:until]
        compared += until
    assert compared > 0.8 * n * len(asked)
