# SPDX-License-Identifier: Apache-2.0
"""Soft prompts and prefixes against PEFT on torch, live: folders both ways, the same logits."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_oracles import inputs, make_model
from model_rows import CONFIGS, RUNTIME, batch, logits, params, scores

from jaxrlhf.models.adapters.peft import load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.weights import load_hf, save_hf

pytestmark = pytest.mark.torch

ALIKE = 1e-4
KINDS = ("soft_prompt", "prefix")


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def theirs_on(rows, model, skip=0):
    import torch

    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0, skip:].numpy() for row in rows]


def compare(tree, config, rows, want):
    got = logits(tree, config, RUNTIME, *batch(rows))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i, : len(row)], want[i], atol=ALIKE)


def adapted(name, kind, head=()):
    """(config, base, whole tree with random leaves, adapter)."""
    config = CONFIGS[name]
    other = "lm_head" if head else "score"
    base = {k: x for k, x in params(name).items() if k not in ("value", other)}
    spec = AdapterSpec(kind=kind, virtual_tokens=4)
    adapter = resolve(spec, config, heads=head)
    shapes = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), adapter, base, "float32", config=config)
    )
    rng = np.random.default_rng(3)
    leaves = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    return config, base, join(leaves, base), adapter


# gemma3 has windows, and scales the embeddings of tokens but not of virtual ones.
@pytest.mark.parametrize("name", ["llama", slow("gpt2"), slow("gemma3")])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_ours_does(kind, name, tmp_path):
    import peft
    import transformers

    config, base, whole, adapter = adapted(name, kind)
    save_hf(tmp_path / "base", base, config, hf_config={"bos_token_id": 1, "eos_token_id": 2})
    where = str(tmp_path / "base")
    save_adapter(tmp_path / "adapter", whole, adapter, config, kind="lm", base=where)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager")
    rows = inputs(seed=3)
    plain = theirs_on(rows, model)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    want = theirs_on(rows, theirs, skip=4 if kind == "soft_prompt" else 0)
    assert max(abs(a - b).max() for a, b in zip(want, plain, strict=True)) > 0.05  # it does much
    compare(whole, config, rows, want)
    assert adapter.count() == sum(p.numel() for p in theirs.prompt_encoder.parameters())


@pytest.mark.parametrize("name", [slow("llama"), "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_we_compute_what_pefts_does(kind, name, tmp_path):
    import peft
    import torch

    model = make_model(name)
    model.save_pretrained(tmp_path / "base")
    method = {"soft_prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    torch.manual_seed(5)
    settings = method(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(model, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_hf(tmp_path / "base")
    found = load_adapter(tmp_path / "adapter", ours.config, ours.params, kind="lm")
    rows = inputs(seed=4)
    want = theirs_on(rows, theirs, skip=3 if kind == "soft_prompt" else 0)
    compare(found.adapter.on(ours.params, found.leaves), ours.config, rows, want)


@pytest.mark.parametrize("kind", ["soft_prompt", slow("prefix")])
def test_reward_models_go_both_ways(kind, tmp_path):
    import peft
    import transformers

    config, base, whole, adapter = adapted("llama", kind, head=("score",))
    trunk = {k: x for k, x in base.items() if k != "score"}
    hf = {"eos_token_id": 2, "pad_token_id": 0}
    save_hf(tmp_path / "base", trunk, config, hf_config=hf)
    where = str(tmp_path / "base")
    save_adapter(tmp_path / "ours", whole, adapter, config, kind="reward", base=where)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        where, num_labels=1, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    rows = inputs(seed=5)
    want = np.stack(theirs_on(rows, theirs))
    np.testing.assert_allclose(scores(whole, config, RUNTIME, *batch(rows)), want, atol=ALIKE)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tmp_path / "theirs", config, trunk)
    assert back.kind == "reward"
    again = back.adapter.on(trunk, back.leaves)
    np.testing.assert_allclose(scores(again, config, RUNTIME, *batch(rows)), want, atol=ALIKE)
