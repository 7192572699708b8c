# SPDX-License-Identifier: Apache-2.0
"""Stages that train a soft prompt, a prefix or bottlenecks: what moves, what is saved, what is
refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_adapters import leaves_of, opened, said
from tiny import metrics, read_jsonl, run, words

from jaxrlhf import api
from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import heads
from jaxrlhf.models.transformer import hidden_states, prefill
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages.adapted import open_trained

KEYS = {
    "soft_prompt": {"model.adapter.kind": "soft_prompt", "model.adapter.virtual_tokens": 4},
    "prefix": {"model.adapter.kind": "prefix", "model.adapter.virtual_tokens": 4},
    "bottleneck": {"model.adapter.kind": "bottleneck", "model.adapter.width": 3},
}
LEAVES = {
    "soft_prompt": {"soft_prompt"},
    "prefix": {"prefix_k", "prefix_v"},
    "bottleneck": {"kernel", "bias"},
}
NEW = {"sft": set(), "dpo": set(), "reward": {"score"}, "ppo": {"value"}}
COUNT = {"soft_prompt": 4 * 16, "prefix": 2 * 2 * 4 * 16, "bottleneck": 4 * (16 * 3 * 2 + 3 + 16)}


def settings(stage, kind, tiny, models):
    keys = tiny.settings(stage, models) | KEYS[kind] | {"train.steps": 2, "train.save_every": 1}
    if stage == "ppo":
        keys["rl.critic"] = "policy"
    else:
        keys |= {"train.eval_every": None}
    return keys


@pytest.fixture(scope="module")
def adapted(tiny, models, tmp_path_factory):
    """(stage, kind) -> a finished run."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}

    def get(stage, kind):
        if (stage, kind) not in found:
            place = folder / f"{stage}-{kind}"
            assert run(stage, place, **settings(stage, kind, tiny, models)).exit_code == 0
            found[stage, kind] = place
        return found[stage, kind]

    return get


QUICK = (("sft", "soft_prompt"),)
EVERY = [
    pytest.param(stage, kind, marks=() if (stage, kind) in QUICK else pytest.mark.slow)
    for kind in KEYS
    for stage in NEW
]


@pytest.mark.parametrize(("stage", "kind"), EVERY)
def test_only_the_adapter_trains_and_is_saved(stage, kind, adapted, models, capsys):
    folder = adapted(stage, kind)
    names, _ = leaves_of(folder)
    own = {name for name in names if name.split("/")[-2] not in NEW[stage]}
    assert {name.rsplit("/", 1)[-1] for name in own} == LEAVES[kind]
    assert all("embed" in name or "prefix" in name or "bottleneck" in name for name in own)
    assert {name.split("/")[-2] for name in set(names) - own} == NEW[stage]
    model, base = opened(folder), opened(models.base)
    assert model.kind == ("reward" if stage == "reward" else "lm")
    for path, leaf in jax.tree_util.tree_leaves_with_path(base.params["layers"]):
        there = model.params["layers"]
        for key in path:
            there = there[key.key]
        assert np.asarray(there).tobytes() == np.asarray(leaf).tobytes()
    if stage == "sft":
        tensors = load_file(folder / "export" / "adapter_model.safetensors")
        assert sum(x.size for x in tensors.values()) == COUNT[kind]
        assert f"{COUNT[kind]:,} of" in capsys.readouterr().out
    if stage != "reward":
        assert np.abs(said(model) - said(base)).max() > 1e-4
    if stage == "ppo":
        assert [line["ratio/first_off"] for line in metrics(folder)] == [0, 0]
    if stage == "dpo":  # the reference is the base, which a bottleneck starts as
        assert (metrics(folder)[0]["rewards/margins"] == 0) == (kind == "bottleneck")


@pytest.mark.parametrize("kind", ["soft_prompt", "prefix"])
def test_virtual_tokens_start_as_their_text(kind, tiny, models):
    keys = tiny.sft(models.base) | KEYS[kind] | {"model.adapter.init_text": "where is my"}
    with use_mesh(make_mesh()) as mesh:
        model = open_trained(load("sft", keywords=keys).model, mesh, key=jax.random.key(0))
    ids = np.resize(model.tokenizer.encode("where is my", add_special_tokens=False), 4)
    base = model.adapted.params
    if kind == "soft_prompt":
        want = np.asarray(base["embed"]["embedding"])[ids]
        np.testing.assert_array_equal(model.params["embed"]["soft_prompt"], want)
        return
    at = np.arange(4)[None]
    _, cache = jax.jit(prefill, static_argnums=(1, 2, 6))(
        base, model.config, model.runtime, ids[None], at, at * 0 + 1, 4
    )
    got = model.params["layers"]["attention"]["prefix_v"]
    for layer, own in enumerate(cache):
        want = own["v"][0].swapaxes(0, 1).reshape(4, -1)
        np.testing.assert_allclose(got[layer], want, atol=1e-6)


def test_generation_reads_virtual_tokens(tiny, adapted, tmp_path):
    """Greedy completions are the most likely tokens of the model read as whole rows."""
    folder = adapted("sft", "soft_prompt")
    prompts = [row["prompt"] for row in read_jsonl(tiny.held_out)][:2]
    asked = {"prompt": prompts, "sampling.temperature": 0, "sampling.max_new_tokens": 6}
    run("generate", tmp_path, model=str(folder), **asked)
    model = opened(folder)
    found = read_jsonl(tmp_path / "completions.jsonl")
    prompts = [model.tokenizer.encode(row["prompt"]) for row in found]
    ends = [len(ids) + len(row["token_ids"]) for ids, row in zip(prompts, found, strict=True)]
    tokens = np.zeros((len(found), max(ends)), np.int32)
    for line, ids, row, end in zip(tokens, prompts, found, ends, strict=True):
        line[:end] = ids + row["token_ids"]
    at = np.broadcast_to(np.arange(max(ends)), tokens.shape)
    real = (at < np.asarray(ends)[:, None]).astype(np.int32)

    @jax.jit
    def likely(params):
        states = hidden_states(params, model.config, model.runtime, tokens, at * real, real)
        return heads.logits(params, model.config, states).argmax(-1)

    best = np.asarray(likely(model.params))
    for line, row, end in zip(best, found, ends, strict=True):
        assert line[end - len(row["token_ids"]) - 1 : end - 1].tolist() == row["token_ids"]


def test_what_no_kernel_can_hold_is_never_merged(adapted, tiny, tmp_path):
    folder = adapted("sft", "soft_prompt")
    for form in ("merged", "hf"):
        with pytest.raises(ConfigError, match=r"soft_prompt adapter.*cannot be merged.*peft"):
            api.export(model=str(folder), format=form, output=str(tmp_path / form))
    api.export(model=str(folder), format="peft", output=str(tmp_path / "peft"))
    np.testing.assert_array_equal(said(opened(tmp_path / "peft")), said(opened(folder)))
    with pytest.raises(ConfigError, match="cannot be merged"):
        run("sft", tmp_path / "all", **tiny.sft(folder))
    other = tiny.sft(folder) | KEYS["soft_prompt"] | {"model.adapter.virtual_tokens": 5}
    with pytest.raises(ConfigError, match=r"soft_prompt \[4, 16\].*soft_prompt \[5, 16\]"):
        run("sft", tmp_path / "other", **other)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) for k in KEYS])
def test_killed_and_resumed_it_ends_the_same(kind, tiny, models, adapted, commands, tmp_path):
    keys = settings("sft", kind, tiny, models)
    code, text = commands(words("sft", tmp_path / "run", keys), crash="written:2")
    assert code == -9, text
    code, text = commands(words("sft", tmp_path / "run", keys))
    assert code == 0, text
    assert "resuming at step" in text
    ends = []
    for folder in (adapted("sft", kind), tmp_path / "run"):
        tensors = (folder / "export" / "adapter_model.safetensors").read_bytes()
        ends.append((tensors, json.loads((folder / "summary.json").read_text())["content"]))
    assert ends[0] == ends[1]


def test_settings_of_other_kinds_are_refused(tiny, models, tmp_path):
    for kind, key, value in (
        ("soft_prompt", "rank", 4),
        ("prefix", "targets", ["q"]),
        ("bottleneck", "virtual_tokens", 4),
        ("lora", "init_text", "x"),
    ):
        keys = {"model.adapter.kind": kind, f"model.adapter.{key}": value}
        with pytest.raises(ConfigError, match=f"{key} is of .*{kind} has none"):
            run("sft", tmp_path / "x", **tiny.sft(models.base) | keys)
