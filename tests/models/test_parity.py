# SPDX-License-Identifier: Apache-2.0
"""Against transformers on torch, live: what we write it reads, what it computes we compute."""

import jax
import numpy as np
import pytest
from make_oracles import CASES, inputs, make_model
from model_rows import CONFIGS, RUNTIME, batch, logits, params, scores

from jaxrlhf.models.experts import balance_loss
from jaxrlhf.models.transformer import hidden_states_and_routing
from jaxrlhf.models.weights import load_hf, save_hf

pytestmark = pytest.mark.torch

LM = [name for name, (_, kind, _) in CASES.items() if kind == "lm"]
# In transformers the longest row of a batch decides how these turn in all of them; here each row
# is as it is alone.
BY_LENGTH = ("llama-dynamic-rope", "phi3-longrope")


@pytest.mark.parametrize("name", [name for name in LM if name not in BY_LENGTH])
def test_our_right_padded_rows_equal_its_left_padded_batch(name, tmp_path):
    import torch

    theirs = make_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, kind="lm")
    rows = inputs(seed=5)
    got = logits(ours.params, ours.config, RUNTIME, *batch(rows))
    tokens, positions, segments = batch(rows, left=True)
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(segments, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i, : len(row)], want[i, -len(row) :], atol=1e-4)


def one_of_each_family():
    """The last variant of every family: the first ones are read in the tests with oracles."""
    return {family: name for name, (family, kind, _) in CASES.items() if kind == "lm"}.values()


@pytest.mark.parametrize("name", one_of_each_family())
def test_it_loads_what_we_write(name, tmp_path):
    import torch
    import transformers

    make_model(name).save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs", kind="lm")
    # Other weights than those that were read: what is loaded below is what we wrote.
    tree = jax.tree.map(lambda leaf: leaf * 1.25, ours.params)
    save_hf(tmp_path / "ours", tree, ours.config, hf_config=ours.hf_config)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = sorted(inputs(seed=6), key=len)  # dynamic rope remembers the longest it has seen
    got = logits(tree, ours.config, RUNTIME, *batch(rows))
    for i, row in enumerate(rows):
        with torch.no_grad():
            want = theirs(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(got[i, : len(row)], want, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_scores_our_reward_models_alike_alone_and_batched(name, tmp_path):
    import torch
    import transformers

    tree, config = params(name), CONFIGS[name]
    hf = {"eos_token_id": 2, "pad_token_id": 2}  # as many models have it, and we must not keep
    save_hf(tmp_path, tree, config, kind="reward", pad_token_id=0, hf_config=hf)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    rows = inputs(seed=7)
    assert all(row[-1] == 2 for row in rows)
    got = np.asarray(scores(tree, config, RUNTIME, *batch(rows)))
    tokens, _, segments = batch(rows, pad=0)
    with torch.no_grad():
        together = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(segments, dtype=torch.long),
        ).logits.numpy()
        alone = [theirs(torch.tensor([row])).logits[0].numpy() for row in rows]
    np.testing.assert_allclose(got, together, atol=1e-4)
    np.testing.assert_allclose(got, alone, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-normed"])
def test_the_load_balancing_loss_is_that_of_transformers(name, tmp_path):
    import torch

    theirs = make_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, kind="lm")
    tokens, positions, segments = batch(inputs(seed=9))
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(segments, dtype=torch.long),
            output_router_logits=True,
        ).aux_loss
    _, routing = hidden_states_and_routing(
        ours.params, ours.config, RUNTIME, tokens, positions, segments
    )
    got = balance_loss(routing, (segments > 0).sum())
    np.testing.assert_allclose(got, float(want), rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_gradients_of_the_loss_agree(name, tmp_path):
    import torch

    theirs = make_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, kind="lm")
    row = inputs(seed=8, rows=1)
    tokens = torch.tensor(row)
    theirs(tokens, labels=tokens).loss.backward()

    def loss(tree):
        all_logits = logits(tree, ours.config, RUNTIME, *batch(row))[0, :-1]
        logprobs = jax.nn.log_softmax(all_logits)
        return -logprobs[np.arange(len(row[0]) - 1), np.array(row[0][1:])].mean()

    grads = jax.grad(loss)(ours.params)
    save_hf(tmp_path / "grads", grads, ours.config)
    from safetensors.numpy import load_file

    got = load_file(tmp_path / "grads" / "model.safetensors")
    for parameter in theirs.parameters():  # as weights, they are saved under the files' names
        assert parameter.grad is not None
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    assert wanted.keys() == got.keys()
    for key, want in wanted.items():
        np.testing.assert_allclose(got[key], want, atol=1e-4 * max(1.0, np.abs(want).max()))
