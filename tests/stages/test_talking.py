# SPDX-License-Identifier: Apache-2.0
"""Where texts end: which tokens end them, what keeps them, and what chats add."""

import json
import shutil

import jax
import pytest
from tiny import read_jsonl, run, words, write_jsonl

import jaxrlhf
from jaxrlhf import cli
from jaxrlhf.config.stages import STAGES
from jaxrlhf.data.templates import TEMPLATES
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages import ppo
from jaxrlhf.stages.models import open_model
from jaxrlhf.stages.tools import chat

MARKERS = ["<|im_start|>", "<|im_end|>"]
ASKED = [{"role": "user", "content": "hello"}]
CHAT = [*ASKED, {"role": "assistant", "content": "good day"}]
GREEDY = {"sampling.temperature": 0, "sampling.max_new_tokens": 8}
FEW = {"train.steps": 1, "train.batch_size": 8, "data.max_length": 32}


def opened(place, **keys):
    section = STAGES["generate"].model_validate({"model": str(place), "prompt": ["x"]}).model
    with use_mesh(make_mesh()) as mesh:
        return open_model(section, mesh, frozen=True, **keys)


def written(folder):
    """The ends that a folder's two files name."""
    names = ("config.json", "generation_config.json")
    return [json.loads((folder / name).read_text()).get("eos_token_id") for name in names]


@pytest.fixture(scope="module")
def base(models, tmp_path_factory):
    """A language model with the markers of chatml and two ends, of which config.json knows one."""
    folder = tmp_path_factory.mktemp("ends")
    keys = {"model.add_tokens": MARKERS, "model.resize_embeddings": True}
    assert run("export", folder, **{"model.path": str(models.base)} | keys).exit_code == 0
    file = folder / "export" / "generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"eos_token_id": [said["eos_token_id"], 17]}))
    return folder / "export"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": CHAT}] * 8)


@pytest.fixture(scope="module")
def talker(base, chats, tmp_path_factory):
    """A run of SFT on chats, by the end of which the model knows its one reply."""
    folder = tmp_path_factory.mktemp("talker") / "run"
    keys = {"model": str(base), "data.train": str(chats), "data.template": "chatml", **FEW}
    learn = {"train.steps": 25, "optim.learning_rate": 0.03, "optim.schedule": "constant"}
    assert run("sft", folder, **keys | learn).exit_code == 0
    return folder


def test_ends_that_only_generation_config_knows_outlive_every_stage(tiny, base, tmp_path):
    ends = list(opened(base).stop_ids)
    assert len(ends) == 2
    texts = {"model": str(base), "data.train": str(tiny.demonstrations)}
    assert run("sft", tmp_path / "sft", **texts | FEW).exit_code == 0
    assert written(tmp_path / "sft/export") == [ends, ends]
    (tmp_path / "sft/export").rename(tmp_path / "aside")
    assert opened(tmp_path / "sft").stop_ids == tuple(ends), "from a checkpoint"
    pairs = {"model": str(tmp_path / "sft"), "data.train": str(tiny.pairs)}
    assert run("dpo", tmp_path / "dpo", **pairs | FEW).exit_code == 0
    assert written(tmp_path / "dpo/export") == [ends, ends]
    assert run("export", tmp_path / "again", model=str(base)).exit_code == 0
    assert written(tmp_path / "again/export") == [ends, ends]
    template = opened(tmp_path / "sft").tokenizer.chat_template
    assert template is None, "texts have no template"


def test_a_model_of_chats_stops_and_talks_without_being_told(
    base, talker, tmp_path, capsys, monkeypatch
):
    model = opened(talker)
    turn = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [*opened(base).stop_ids, turn]
    assert written(talker / "export") == [ends, ends]
    assert model.tokenizer.chat_template == TEMPLATES["chatml"].source
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": ASKED}])
    keys = {"model": str(talker), "prompts": str(asked), **GREEDY}
    assert run("generate", tmp_path / "told", **keys).exit_code == 0
    [row] = read_jsonl(tmp_path / "told" / "completions.jsonl")
    assert (row["completion"], row["finish_reason"]) == ("good day", "stop")
    assert row["token_ids"][-1] == turn

    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    config = STAGES["chat"].model_validate({"model": str(talker), "sampling": {"temperature": 0}})
    with use_mesh(make_mesh()) as mesh:
        chat(config, mesh)
    assert capsys.readouterr().out.splitlines()[-2:] == ["an empty line ends the chat", "good day"]


def test_completions_of_chats_end_at_the_turn_of_whatever_model(base, talker, tmp_path):
    # The weights of the talker, in a folder that knows neither template nor its end.
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    shutil.copy(talker / "export" / "model.safetensors", plain)
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": ASKED}])
    keys = {"model": str(plain), "prompts": str(asked), "template": "chatml", **GREEDY}
    for name, stop, reason in (("turn", {}, "stop"), ("none", {"sampling.stop": []}, "length")):
        assert run("generate", tmp_path / name, **keys | stop).exit_code == 0
        [row] = read_jsonl(tmp_path / name / "completions.jsonl")
        assert row["finish_reason"] == reason
        assert row["completion"].startswith("good day")


@pytest.mark.parametrize("chatting", [True, False])
def test_ppo_samples_to_the_end_of_a_turn(chatting, base, tmp_path, monkeypatch):
    sampled = []
    make = ppo.make_rollout
    monkeypatch.setattr(
        ppo,
        "make_rollout",
        lambda *a: (sampled.append(ppo.stop_ids(a[0].sampling, a[1])), make(*a)),
    )
    (tmp_path / "mine.py").write_text("def one(prompts, completions, **_): return [1.0]")
    prompts = [{"prompt": ASKED if chatting else "hello"}] * 8
    config = STAGES["ppo"].model_validate(
        {
            "model": {"path": str(base)},
            "reward": f"{tmp_path / 'mine.py'}:one",
            "data": {
                "train": str(write_jsonl(tmp_path / "p.jsonl", prompts)),
                "template": "chatml",
                "max_length": 32,
            },
            "train": {"steps": 1, "batch_size": 8},
            "rl": {"critic": "shared"},
            "sampling": {"max_new_tokens": 8},
        }
    )
    with use_mesh(make_mesh()) as mesh:
        recipe = ppo.ppo(config, mesh, jax.random.key(0))
    own = opened(base)
    turn = own.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sampled == [(*own.stop_ids, turn) if chatting else own.stop_ids]
    assert recipe.hf_config["eos_token_id"] == list(sampled[0])
    template = TEMPLATES["chatml"].source if chatting else None
    assert recipe.tokenizer.chat_template == template


def test_an_adapter_keeps_its_own_ends_and_template(base, chats, tmp_path):
    keys = {"model": str(base), "data.train": str(chats), "data.template": "chatml", **FEW}
    assert run("sft", tmp_path / "run", **keys, **{"model.lora.rank": 2}).exit_code == 0
    own = opened(base).stop_ids
    turn = opened(base).tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = opened(tmp_path / "run")
    assert model.adapted is not None
    assert model.stop_ids == (*own, turn)
    for form in ("peft", "merged"):
        place = tmp_path / form
        assert run("export", place, model=str(tmp_path / "run"), format=form).exit_code == 0
        assert opened(place / "export").stop_ids == (*own, turn)
    swapped = jaxrlhf.load(base).with_adapter(tmp_path / "run")
    assert swapped._loaded.model.stop_ids == (*own, turn)
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "peft/export" / file).unlink()
    bare = swapped.with_adapter(tmp_path / "peft/export")._loaded.model
    assert bare.stop_ids == own, "another adapter's ends are not its"
    assert bare.tokenizer.chat_template is None
    (tmp_path / "run/export").rename(tmp_path / "aside")
    assert opened(tmp_path / "run").stop_ids == (*own, turn), "from a checkpoint"


def test_a_template_alone_makes_no_other_tokenizer(tiny, models, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(models.base / "export", policy)
    (policy / "chat_template.jinja").write_text(TEMPLATES["plain"].source)
    keys = tiny.ppo(policy, models.judge)
    assert cli.main(words("ppo", tmp_path / "run", keys, "--dry-run")) == 0
