# SPDX-License-Identifier: Apache-2.0
"""Truth that transformers on torch wrote (make_oracles.py), read without torch; a real model."""

import hashlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import RUNTIME, batch, logits, scores

from jaxrlhf.models import heads
from jaxrlhf.models.transformer import decode_step, hidden_states, prefill, split_layers
from jaxrlhf.models.weights import load_hf

FOLDER = Path(__file__).resolve().parents[1] / "oracles" / "models"
NAMES = sorted(path.name for path in FOLDER.iterdir())


# Between them all switches but those of positions, which have tests of their own.
QUICK = ("llama", "gpt2", "mixtral")


def variants(kind: str) -> list:
    """Cases of a kind; of some families the first by name, and the rest as slow ones."""
    seen, cases = set(), []
    for name in NAMES:
        config = json.loads((FOLDER / name / "config.json").read_text())
        if ("SequenceClassification" in config["architectures"][0]) == (kind == "reward"):
            more = config["model_type"] in seen or config["model_type"] not in QUICK
            cases.append(pytest.param(name, marks=[pytest.mark.slow] if more else []))
            seen.add(config["model_type"])
    return cases


def expected(name: str) -> dict:
    return json.loads((FOLDER / name / "expected.json").read_text())


@partial(jax.jit, static_argnums=(1, 2, 4))
def greedy(tree, config, runtime, prompt, count):
    """`count` greedy tokens after one prompt [P], through the cache."""
    tree = split_layers(tree, config, runtime)
    tokens, width = prompt[None], prompt.shape[0]
    rows = (tokens, jnp.arange(width)[None], jnp.ones_like(tokens))
    states, cache = prefill(tree, config, runtime, *rows, width + count)
    open_columns = jnp.ones((1, width + count), bool)

    def step(carry, t):
        token, cache = carry
        state, cache = decode_step(
            tree, config, runtime, token, (width + t)[None], cache, width + t, open_columns
        )
        return (
            jnp.argmax(heads.logits(tree, config, state), -1).astype(token.dtype),
            cache,
        ), token[0]

    first = jnp.argmax(heads.logits(tree, config, states[:, -1]), -1).astype(prompt.dtype)
    return jax.lax.scan(step, (first, cache), jnp.arange(count))[1]


@pytest.mark.parametrize("name", variants("lm"))
def test_logits_and_greedy_tokens_of_language_models(name):
    model, want = load_hf(FOLDER / name, kind="lm"), expected(name)
    rows = batch(want["input_ids"])
    got = logits(model.params, model.config, RUNTIME, *rows)
    for i, row in enumerate(want["logits"]):
        np.testing.assert_allclose(got[i, : len(row)], row, atol=1e-4)
    prompt = jnp.array(want["input_ids"][0][:5])
    # What turns by the length of its row is sampled up to that length.
    count = min(len(want["greedy"]), (model.config.rope_limit or 99) - len(prompt))
    tokens = greedy(model.params, model.config, RUNTIME, prompt, count)
    assert tokens.tolist() == want["greedy"][:count]


@pytest.mark.parametrize("name", variants("reward"))
def test_scores_of_reward_models(name):
    model, want = load_hf(FOLDER / name, kind="reward"), expected(name)
    assert "lm_head" not in model.params
    got = scores(model.params, model.config, RUNTIME, *batch(want["input_ids"]))
    np.testing.assert_allclose(got, want["logits"], atol=1e-4)
    for row, score in zip(want["input_ids"], want["logits"], strict=True):
        alone = scores(model.params, model.config, RUNTIME, *batch([row]))
        np.testing.assert_allclose(alone[0], score, atol=1e-4)


def test_the_real_model_gives_its_published_logits(stories):
    model = load_hf(stories)
    want = json.loads((stories / "expected.json").read_text())["logits"]
    got = np.asarray(
        logits(model.params, model.config, RUNTIME, *batch([want["input_ids"]]))[0], np.float64
    )
    np.testing.assert_allclose(got[:, :16], want["values"], atol=1e-4)
    np.testing.assert_allclose(got[:, 400:416], want["values_entries_400_to_415"], atol=1e-4)
    assert got.argmax(-1).tolist() == want["argmax"]
    np.testing.assert_allclose(np.log(np.exp(got).sum(-1)), want["logsumexp"], atol=1e-4)


def test_the_real_model_gives_its_published_greedy_tokens(stories):
    model = load_hf(stories)
    want = json.loads((stories / "expected.json").read_text())["greedy"]
    prompt = jnp.array(want["prompt_ids"])
    tokens = greedy(model.params, model.config, RUNTIME, prompt, len(want["token_ids"]))
    assert tokens.tolist() == want["token_ids"]


def test_the_real_model_gives_its_published_loss(stories, shared):
    tokenizers = pytest.importorskip("tokenizers")
    model = load_hf(stories)
    want = json.loads((stories / "expected.json").read_text())["cross_entropy"]
    text = (shared / "data" / "gpt2-tokenizer" / "tinystories_sample.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == want["file_sha256"]
    parts = [part.strip() for part in text.decode().split("<|endoftext|>")]
    tokenizer = tokenizers.Tokenizer.from_file(str(stories / "tokenizer.json"))
    rows = [tokenizer.encode(part).ids for part in parts if part]
    tokens, positions, segments = batch(rows)

    @jax.jit
    def token_losses(params):
        states = hidden_states(params, model.config, RUNTIME, tokens, positions, segments)
        logprobs = jax.nn.log_softmax(heads.logits(params, model.config, states[:, :-1]))
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]

    losses = np.asarray(token_losses(model.params), np.float64)
    each = [losses[i, : len(row) - 1] for i, row in enumerate(rows)]
    assert sum(map(len, each)) == want["predicted_tokens"]
    np.testing.assert_allclose(np.concatenate(each).mean(), want["mean_nats_per_token"], atol=1e-4)
    for loss, story in zip(each, want["per_story"], strict=True):
        np.testing.assert_allclose(loss.mean(), story["mean_nats_per_token"], atol=1e-4)
