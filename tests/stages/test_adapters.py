# SPDX-License-Identifier: Apache-2.0
"""Stages that train an adapter: what moves, what does not, what is saved, and who shares what."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import metrics, read_jsonl, run, words

from jaxrlhf import api
from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models import heads
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.models.transformer import hidden_states
from jaxrlhf.models.weights import load_hf
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages import completions, ppo
from jaxrlhf.stages.adapted import open_trained
from jaxrlhf.stages.models import open_model
from jaxrlhf.types import LMBatch

LORA = {"model.lora.rank": 2, "model.lora.alpha": 3}
# What trains beside the adapter's own leaves, and where in the tree the model is.
HEADS = {"sft": set(), "dpo": set(), "reward": {"score"}, "ppo": {"value"}}


def settings(stage, tiny, models):
    return tiny.settings(stage, models) | LORA


@pytest.fixture(scope="module")
def adapted(tiny, models, tmp_path_factory):
    """stage -> a finished run of it with an adapter, and what it printed."""
    folder, found = tmp_path_factory.mktemp("adapted"), {}

    def get(stage, capsys=None):
        if stage not in found:
            result = run(stage, folder / stage, **settings(stage, tiny, models))
            assert result.exit_code == 0
            found[stage] = folder / stage
        return found[stage]

    return get


def opened(place, kind=None):
    section = STAGES["generate"].model_validate({"model": str(place), "prompt": ["x"]}).model
    with use_mesh(make_mesh()) as mesh:
        return open_model(section, mesh, kind=kind, frozen=True)


def rows(config, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (2, 12), 3, config.vocab_size)
    positions = np.broadcast_to(np.arange(12), (2, 12))
    ones = np.ones((2, 12), np.int32)
    return LMBatch(np.asarray(tokens), positions, ones, ones.astype(bool))


def said(model, seed=0):
    outputs = row_scores if model.kind == "reward" else row_logprobs
    return np.asarray(
        jax.jit(outputs, static_argnums=(1, 2))(
            model.params, model.config, model.runtime, rows(model.config, seed)
        )
    )


def leaves_of(folder):
    """Names of the leaves in the newest checkpoint, those of parameters and of the optimizer."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    names = json.loads((newest / "manifest.json").read_text())["leaves"]
    opt = [name for name in names if name.startswith("train/opt_state/")]
    return [name for name in names if name.startswith("params/")], opt


EACH = [pytest.param(s, marks=() if s == "sft" else pytest.mark.slow) for s in HEADS]


@pytest.mark.parametrize("stage", EACH)
def test_only_the_adapter_trains_and_is_saved(stage, adapted, models):
    before = hashlib.sha256((models.base / "export" / "model.safetensors").read_bytes())
    folder = adapted(stage)
    params, opt = leaves_of(folder)
    kinds = {name.rsplit("/", 1)[-1] for name in params if "/layers/" in name}
    assert kinds == {"lora_a", "lora_b"}
    heads = {name.split("/")[-2] for name in params if "/layers/" not in name}
    assert heads == HEADS[stage]
    moments = [name for name in opt if "/layers/" in name]
    assert len(moments) == 2 * sum("/layers/" in name for name in params)
    assert all(name.rsplit("/", 1)[-1] in kinds for name in moments)
    names = sorted(p.name for p in (folder / "export").iterdir())
    assert "adapter_config.json" in names
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    config = json.loads((folder / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models.base / "export")
    after = hashlib.sha256((models.base / "export" / "model.safetensors").read_bytes())
    assert before.digest() == after.digest()

    model, base = opened(folder), opened(models.base)
    assert model.kind == ("reward" if stage == "reward" else "lm")
    for path, leaf in jax.tree_util.tree_leaves_with_path(base.params["layers"]):
        there = model.params["layers"]
        for key in path:
            there = there[key.key]
        assert np.asarray(there).tobytes() == np.asarray(leaf).tobytes()
    if stage != "reward":
        assert np.abs(said(model) - said(base)).max() > 1e-3


def test_what_is_printed_of_sizes_is_so(tiny, models, tmp_path, capsys):
    keys = settings("sft", tiny, models) | {"model.lora.rank_pattern": {"layers.1.*o_proj": 1}}
    assert run("sft", tmp_path / "run", **keys).exit_code == 0
    text = capsys.readouterr().out
    tensors = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    trained = sum(x.size for x in tensors.values())
    base = load_file(models.base / "export" / "model.safetensors")
    # The scales, one a layer and projection, stay as they are.
    scales = 2 * 7
    assert f"{trained:,} of {trained + scales + sum(x.size for x in base.values()):,} para" in text
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    leaves = json.loads((newest / "manifest.json").read_text())["leaves"]
    sizes = {"float32": 4, "int32": 4}
    size = sum(
        sizes[dtype] * int(np.prod(shape))
        for name, (dtype, shape) in leaves.items()
        if name.startswith("train/opt_state/")
    )
    assert f"optimizer {size:,} bytes" in text


def test_dpo_starts_at_its_reference_which_is_the_base(adapted):
    first = metrics(adapted("dpo"))[0]
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.slow
def test_ppo_starts_at_its_reference_with_a_ratio_of_one(adapted):
    lines = metrics(adapted("ppo"))
    assert [line["ratio/first_off"] for line in lines] == [0, 0, 0]
    assert abs(lines[0]["kl"]) < 1e-6
    assert abs(lines[-1]["kl"]) > 1e-4


def test_with_modules_saved_the_reference_is_still_the_base(tiny, models):
    keys = settings("ppo", tiny, models) | {"model.lora.modules_to_save": ["norm"]}
    config = load_config("ppo", keys)
    with use_mesh(make_mesh()) as mesh:
        policy = open_trained(config.model, mesh, kind="lm", key=jax.random.key(0))
        before = np.asarray(policy.adapted.params["final_norm"]["scale"]).copy()
        trained, _ = policy.adapted.adapter.split(policy.params)
        jax.tree.map(lambda x: x.delete(), trained)  # as a step does that donates them
        reference = ppo.reference_params(policy)
        np.testing.assert_array_equal(reference["final_norm"]["scale"], before)


def load_config(stage, keys):
    from jaxrlhf.config.load import load

    return load(stage, keywords=keys)


def pointer(tree):
    return tree["layers"]["mlp"]["up"]["kernel"].unsafe_buffer_pointer()


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["policy", "reward"])
def test_actor_critic_reference_and_reward_model_read_the_same_base(
    critic, tiny, models, adapted, tmp_path, monkeypatch
):
    """Kernels are one buffer; and three iterations with all of them leave it as it was."""
    seen = {}
    scorer, made = completions.open_model, ppo.make_experience

    def opening(*args, **kwargs):
        model = scorer(*args, **kwargs)
        seen["reward"] = pointer(model.params)
        return model

    def making(*args, **kwargs):
        program = made(*args, **kwargs)

        def scored(params, ref, *more):
            seen.update(actor=pointer(params["actor"]), critic=pointer(params["critic"]))
            seen["reference"] = pointer(ref)
            return program(params, ref, *more)

        return scored

    monkeypatch.setattr(completions, "open_model", opening)
    monkeypatch.setattr(ppo, "make_experience", making)
    keys = tiny.ppo(models.base, adapted("reward")) | LORA | {"rl.critic": critic}
    keys["train.steps"] = 2
    assert run("ppo", tmp_path / "run", **keys).exit_code == 0
    assert len(seen) == 4
    assert len(set(seen.values())) == 1, seen
    params, _ = leaves_of(tmp_path / "run")
    assert {name.split("/")[1] for name in params} == {"actor", "critic"}
    assert "params/critic/value/kernel" in params
    assert not any("kernel" in name and "value" not in name for name in params)
    assert metrics(tmp_path / "run")[0]["ratio/first_off"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "point"),
    [("sft", "written:4"), ("ppo", "minibatch:10")],
    ids=["sft", "ppo"],
)
def test_killed_and_resumed_it_ends_the_same(
    stage, point, tiny, models, adapted, commands, tmp_path
):
    keys = settings(stage, tiny, models) | ({"model.lora.dropout": 0.2} if stage == "sft" else {})
    whole = adapted(stage)
    if stage == "sft":
        whole = tmp_path / "whole"
        assert run(stage, whole, **keys).exit_code == 0
    code, text = commands(words(stage, tmp_path / "run", keys), crash=point)
    assert code == -9, text
    code, text = commands(words(stage, tmp_path / "run", keys))
    assert code == 0, text
    assert "resuming at step" in text
    ends = []
    for folder in (whole, tmp_path / "run"):
        tensors = (folder / "export" / "adapter_model.safetensors").read_bytes()
        summary = json.loads((folder / "summary.json").read_text())
        ends.append((tensors, summary["content"], metrics(folder)))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_dropout_is_of_training_alone_and_another_in_every_step(tiny, models, tmp_path):
    keys = tiny.sft(models.base) | LORA | {"train.steps": 2, "data.shuffle": False}
    keys |= {"optim.learning_rate": 0, "train.ema_decay": None, "train.eval_every": 1}
    plain, dropped = {}, {}
    for found, rate in ((plain, 0.0), (dropped, 0.5)):
        folder = tmp_path / str(rate)
        given = keys | {"model.lora.dropout": rate}
        assert run("sft", folder, **given).exit_code == 0
        found["train"], found["eval"] = metrics(folder), metrics(folder, "eval")
    assert plain["eval"] == dropped["eval"]
    # B is zero: the loss is the same, but A's inputs, and with them B's gradients, are not.
    assert plain["train"][0]["loss"] == dropped["train"][0]["loss"]
    assert plain["train"][0]["grad_norm"] != dropped["train"][0]["grad_norm"]


@pytest.mark.slow
def test_an_adapter_is_trained_on_by_the_next_stage(tiny, models, adapted, tmp_path):
    first = adapted("sft")
    keys = tiny.comparisons(first) | LORA
    assert run("dpo", tmp_path / "dpo", **keys).exit_code == 0
    assert metrics(tmp_path / "dpo")[0]["rewards/margins"] == 0  # the reference is what SFT left
    config = json.loads((tmp_path / "dpo" / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models.base / "export")
    with pytest.raises(ConfigError, match=r"rank \[2\].*rank \[4\]"):
        run("dpo", tmp_path / "other", **keys | {"model.lora.rank": 4})
    # Without an adapter everything trains, from what base and adapter are together.
    plain = {key: value for key, value in keys.items() if "lora" not in key}
    assert run("dpo", tmp_path / "plain", **plain | {"train.steps": 1}).exit_code == 0
    assert (tmp_path / "plain" / "export" / "model.safetensors").is_file()
    assert metrics(tmp_path / "plain")[0]["rewards/margins"] == 0


@pytest.mark.slow
def test_generation_uses_base_and_adapter(tiny, adapted, tmp_path):
    """Greedy completions are the most likely tokens of base and adapter, read as whole rows."""
    prompts = [row["prompt"] for row in read_jsonl(tiny.held_out)][:4]
    keys = {"prompt": prompts, "sampling.temperature": 0, "sampling.max_new_tokens": 8}

    def stronger(config, tensors):
        tensors.update({name: 40 * x for name, x in tensors.items() if "lora_B" in name})

    model = opened(edited(adapted("dpo"), tmp_path / "strong", stronger))
    base = opened(model.adapted.base)
    agree = {}
    run("generate", tmp_path, model=str(tmp_path / "strong"), **keys)
    for name, judge in (("base and adapter", model), ("base", base)):
        same = []
        for row in read_jsonl(tmp_path / "completions.jsonl"):
            ids = jax.numpy.asarray([[*model.tokenizer.encode(row["prompt"]), *row["token_ids"]]])
            positions = jax.numpy.arange(ids.shape[1])[None]
            shape = (judge.config, judge.runtime, ids, positions, positions * 0 + 1)
            states = hidden_states(judge.params, *shape)
            best = heads.logits(judge.params, judge.config, states)[0].argmax(-1)
            start = ids.shape[1] - len(row["token_ids"])
            same += (best[start - 1 : -1] == ids[0, start:]).tolist()
        agree[name] = np.mean(same)
    assert agree["base and adapter"] == 1 > agree["base"]


def test_exports(adapted, tmp_path, capsys):
    model = opened(adapted("reward"))
    for form in ("hf", "merged", "peft"):
        api.export(model=str(adapted("reward")), format=form, output=str(tmp_path / form))
    assert "merged, its scores are within" in capsys.readouterr().out
    for form, library in (("hf", "transformers"), ("peft", "peft")):
        card = (tmp_path / form / "export" / "README.md").read_text()
        assert f"library_name: {library}" in card
        assert "- read back, it is the same bit for bit" in card
    merged = load_hf(tmp_path / "merged" / "export", kind="reward")
    assert merged.params["layers"]["mlp"]["up"].keys() == {"kernel"}
    found = opened(tmp_path / "hf")
    np.testing.assert_allclose(said(found), said(model), atol=1e-5)
    again = opened(tmp_path / "peft")
    np.testing.assert_array_equal(said(again), said(model))
    with pytest.raises(ConfigError, match="no adapter but a whole model"):
        api.export(model=str(tmp_path / "hf"), format="peft", output=tmp_path / "z")


def edited(folder, to, change):
    """A copy of an adapter folder after `change(config, tensors)`."""
    shutil.copytree(folder / "export", to)
    config = json.loads((to / "adapter_config.json").read_text())
    tensors = load_file(to / "adapter_model.safetensors")
    change(config, tensors)
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, to / "adapter_model.safetensors")
    return to


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def rename(tensors):
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = tensors.pop(NAME)


BROKEN = {
    "missing": (lambda c, t: t.pop(NAME), "missing: .*layers.1.mlp.up_proj.lora_B"),
    "extra": (lambda c, t: rename(t), "not part of this adapter: .*layers.7"),
    "shape": (lambda c, t: t.update({NAME: t[NAME][:, :1].copy()}), r"is \[32, 1\], expected"),
    "nan": (lambda c, t: t[NAME].fill(np.nan), "lora_B.weight holds 64 values that are NaN"),
    "method": (lambda c, t: c.update(peft_type="VERA"), "peft_type = 'VERA'; readable are"),
    "field": (lambda c, t: c.update(lora_bias=True), "lora_bias = True is not read"),
    "start": (lambda c, t: c.update(init_lora_weights="pissa"), "changed the base"),
    "bias": (lambda c, t: c.update(bias="all"), "trained biases are not supported"),
    "family": (lambda c, t: c.update(target_modules=["c_attn"]), "another model's adapter"),
    "nowhere": (lambda c, t: c.update(base_model_name_or_path="/no/such"), "give model.base"),
    "unnamed": (lambda c, t: c.update(base_model_name_or_path=None), "names no base"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_refused_by_name(case, adapted, tmp_path):
    change, message = BROKEN[case]
    folder = edited(adapted("sft"), tmp_path / "broken", change)
    with pytest.raises(ModelError, match=message):
        opened(folder)


def test_a_pickle_is_never_opened(adapted, tmp_path):
    shutil.copytree(adapted("sft") / "export", tmp_path / "p")
    (tmp_path / "p" / "adapter_model.safetensors").rename(tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, a pickle"):
        opened(tmp_path / "p")


@pytest.mark.slow
def test_another_base_of_the_same_shape_is_refused(adapted, finished, tmp_path):
    shutil.copytree(adapted("sft") / "export", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = str(finished("sft") / "export")
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trained on other weights"):
        opened(tmp_path / "a")


def test_names_that_mean_nothing_are_refused_with_what_there_is(tiny, models, tmp_path):
    keys = tiny.sft(models.base)
    for given, message in (
        ({"model.lora.targets": ["q_prj"]}, "there are q .q_proj.*did you mean 'q_proj'"),
        ({"model.lora.rank_pattern": {"z": 2}}, "'z' matches none of the targets"),
        ({"model.lora.modules_to_save": ["embed_tokens"]}, "tied"),
        ({"model.lora.rank": 400}, "rank = 400 is more than q has"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("sft", tmp_path / "x", **keys | given)
    with pytest.raises(ConfigError, match="dropout would make another one"):
        run("ppo", tmp_path / "x", **tiny.ppo(models.base, "m:f") | {"model.lora.dropout": 0.1})


@pytest.mark.parametrize("stage", ["reward", pytest.param("ppo", marks=pytest.mark.slow)])
def test_only_what_is_named_trains(stage, tiny, models, tmp_path):
    """The last of two layers; the other layer, embedding and final norm keep their bits."""
    keys = tiny.settings(stage, models) | {"train.only": "last 1"}
    keys |= {"train.steps": 2, "train.save_every": 1, "train.eval_every": None}
    assert run(stage, tmp_path, **keys).exit_code == 0
    before, after = (load_file(p / "export" / "model.safetensors") for p in (models.base, tmp_path))
    same = {name for name in after if name in before and (before[name] == after[name]).all()}
    layers = {name for name in before if ".layers.1." in name}
    assert same == set(before) - layers - {"lm_head.weight"}
    _, opt = leaves_of(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.name))
    leaves = json.loads((newest / "manifest.json").read_text())["leaves"]
    assert all(leaves[name][1][0] == 1 for name in opt if "/layers/" in name)
    assert not any("embed" in name for name in opt)
    if stage == "ppo":
        first = metrics(tmp_path)[0]
        assert first["ratio/first_off"] == 0
