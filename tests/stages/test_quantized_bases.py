# SPDX-License-Identifier: Apache-2.0
"""Stages whose frozen weights are quantized: what trains, what is saved, what is exported."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_adapters import LORA, leaves_of, load_config, said
from tiny import metrics, run, words

from jaxrlhf import api
from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models.quantization import dequantize, encode, format_in
from jaxrlhf.models.rows import row_scores
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages import ppo
from jaxrlhf.stages.models import open_model
from jaxrlhf.types import LMBatch

QLORA = LORA | {"model.quantize": "int4"}


def opened(place, quantize=None, kind=None):
    section = STAGES["generate"].model_validate(
        {"model": {"path": str(place), "quantize": quantize}, "prompt": ["x"]}
    )
    with use_mesh(make_mesh()) as mesh:
        return open_model(section.model, mesh, kind=kind, frozen=True)


@pytest.fixture(scope="module")
def trained(tiny, models, tmp_path_factory):
    """A finished run of SFT with an adapter on a base in four bits."""
    folder = tmp_path_factory.mktemp("quantized") / "sft"
    assert run("sft", folder, **tiny.sft(models.base), **QLORA).exit_code == 0
    return folder


def test_only_the_adapter_is_saved_and_says_what_it_was_trained_on(trained, models, capsys):
    params, _ = leaves_of(trained)
    assert {name.rsplit("/", 1)[-1] for name in params} == {"lora_a", "lora_b"}
    model = opened(trained, "int4")
    assert "note:" not in capsys.readouterr().out
    # The base is that of the folder, rounded by the format's own rule; nothing else is.
    stored = load_file(models.base / "export" / "model.safetensors")
    want = encode(stored["model.layers.1.mlp.up_proj.weight"].T, "int4")
    for name, leaf in want.items():
        found = model.params["layers"]["mlp"]["up"][name][1]
        np.testing.assert_array_equal(found, leaf)
    embedding = stored["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.params["embed"]["embedding"], embedding)

    plain = opened(trained)
    assert format_in(plain.params) is None
    note = capsys.readouterr().out
    assert "trained on its base quantized to int4" in note
    assert "model.quantize=int4 gives exactly what was trained" in note
    assert np.abs(said(plain) - said(model)).max() > 1e-3
    card = (trained / "export" / "README.md").read_text()
    assert "Its base was quantized to int4" in card


def test_held_out_loss_is_that_of_the_quantized_base(trained, tiny, models, tmp_path):
    """At step 0 the adapter changes nothing: the figure is the quantized model's own, by eval."""
    first = metrics(trained, "eval")[0]
    assert first["step"] == 0
    keys = tiny.sft(models.base)
    data = {key: keys[key] for key in keys if key.startswith("data.")}
    given = {"model": str(models.base), "model.quantize": "int4", **data}
    run("eval", tmp_path / "eval", **given)
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert json.dumps(found).count("nats_per_token")
    values = [m for m in jax.tree.leaves(found) if isinstance(m, float)]
    assert any(abs(value - first["nats_per_token"]) < 1e-5 for value in values), found


@pytest.mark.slow
def test_merged_it_is_what_was_trained_or_on_the_original_base(trained, tmp_path, capsys):
    exact, plain = opened(trained, "int4"), opened(trained)
    for onto, want in (("trained", exact), ("original", plain)):
        api.export(model=str(trained), format="merged", onto=onto, output=str(tmp_path / onto))
        folder = tmp_path / onto / "export"
        merged = opened(folder)
        assert format_in(merged.params) is None
        np.testing.assert_allclose(said(merged), said(want), atol=1e-5)
        assert "within" in capsys.readouterr().out
    apart = said(opened(tmp_path / "trained" / "export")) - said(plain)
    assert np.abs(apart).max() > 1e-3
    cards = [(tmp_path / o / "export" / "README.md").read_text() for o in ("trained", "original")]
    assert "quantized to int4 and multiplied out again" in cards[0]
    assert "as it was before" in cards[1]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(trained, tiny, models, commands, tmp_path, capsys):
    keys = tiny.sft(models.base) | QLORA
    code, text = commands(words("sft", tmp_path / "run", keys), crash="written:4")
    assert code == -9, text
    opened(tmp_path / "run")
    assert "trained on its base quantized to int4" in capsys.readouterr().out
    code, text = commands(words("sft", tmp_path / "run", keys | {"model.quantize": "nf4"}))
    assert code != 0
    assert "quantize" in text
    code, text = commands(words("sft", tmp_path / "run", keys))
    assert code == 0, text
    ends = []
    for folder in (trained, tmp_path / "run"):
        tensors = (folder / "export" / "adapter_model.safetensors").read_bytes()
        summary = json.loads((folder / "summary.json").read_text())
        ends.append((tensors, summary["content"], metrics(folder)))
    assert ends[0] == ends[1]


def test_a_frozen_reward_model_is_quantized_but_for_its_head(models):
    model, plain = opened(models.judge, "int8"), opened(models.judge)
    assert format_in(model.params) == "int8"
    np.testing.assert_array_equal(model.params["score"]["kernel"], plain.params["score"]["kernel"])
    tokens = jnp.arange(12)[None] + 3
    positions, ones = jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32)
    rows = LMBatch(tokens, positions, ones, ones.astype(bool))
    scores = [
        np.asarray(row_scores(tree, model.config, model.runtime, rows))
        for tree in (model.params, dequantize(model.params), plain.params)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert 0 < np.abs(scores[0] - scores[2]).max() < 0.1


def test_quantized_weights_never_train(tiny, models, tmp_path):
    keys = tiny.sft(models.base) | {"model.quantize": "nf4"}
    for given, message in (
        ({}, "model.quantize = nf4 .*without model.adapter.*Train an adapter"),
        ({"train.only": "last 1"}, "with train.only = .*last 1.*they would train"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("sft", tmp_path / "x", **keys | given)
    whole = keys | LORA | {"model.lora.targets": ["q"], "model.lora.modules_to_save": ["up"]}
    with pytest.raises(ModelError, match=r"trains up_proj whole .*leave quantize out"):
        run("sft", tmp_path / "x", **whole)
    with pytest.raises(ConfigError, match=r"model.quantize.*nf4"):
        load_config("sft", keys | LORA | {"model.quantize": "fp4"})


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "policy"])
def test_ppo_reads_one_quantized_base(critic, tiny, models, tmp_path, monkeypatch):
    seen, made = {}, ppo.make_experience

    def making(*args, **kwargs):
        program = made(*args, **kwargs)

        def scored(params, ref, *more):
            trees = {"reference": ref} | {k: params[k] for k in ("actor", "critic") if k in params}
            for name, tree in trees.items():
                leaf = tree["layers"]["mlp"]["up"]["kernel_int4"]
                seen[name] = leaf.unsafe_buffer_pointer()
            return program(params, ref, *more)

        return scored

    monkeypatch.setattr(ppo, "make_experience", making)
    keys = tiny.ppo(models.base, models.judge) | QLORA | {"rl.critic": critic, "train.steps": 2}
    assert run("ppo", tmp_path / "run", **keys).exit_code == 0
    assert len(seen) == (3 if critic == "policy" else 2)
    assert len(set(seen.values())) == 1, seen
    lines = metrics(tmp_path / "run")
    assert [line["ratio/first_off"] for line in lines] == [0, 0]
    assert abs(lines[0]["kl"]) < 1e-6
    assert format_in(opened(tmp_path / "run", "int4").params) == "int4"
