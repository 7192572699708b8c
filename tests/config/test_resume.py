# SPDX-License-Identifier: Apache-2.0
"""Which settings may change when a run is continued: every key, by its class."""

import pytest

from jaxrlhf.config.load import load, to_yaml
from jaxrlhf.config.resume import changes, check_resume, digest
from jaxrlhf.errors import ConfigError

BASE = {
    "model.path": "/m",
    "data.train": "/d.jsonl",
    "data.eval": "/e.jsonl",
    "reward": "a.b:f",
    "train.steps": 10,
    "output_dir": "/out",
}


def ppo(**changed):
    return load("ppo", keywords={**BASE, **changed})


def sft(**changed):
    kept = {key: BASE[key] for key in ("model.path", "data.train")}
    return load("sft", keywords={**kept, **changed})


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("train.steps", 5, "refused"),
        *[(f"train.{k}", 3, "free") for k in ("eval_every", "save_every", "log_every")],
        *[(f"train.{k}", 3, "free") for k in ("sample_every", "keep_last")],
        ("train.keep_best", "kl", "result"),
        ("train.best_is", "min", "result"),
        ("output_dir", "/elsewhere", "free"),
        ("track", ["wandb"], "free"),
        ("seed", 1, "refused"),
        ("train.batch_size", 32, "refused"),
        ("train.microbatch_size", 8, "refused"),
        ("train.ema_decay", 0.9, "refused"),
        ("model.dtype", "bfloat16", "refused"),
        ("model.param_dtype", "bfloat16", "refused"),
        ("data.max_length", 256, "refused"),
        ("data.truncation", "drop", "refused"),
        ("data.template", "chatml", "refused"),
        ("data.shuffle", False, "refused"),
        ("optim.learning_rate", 0.5, "refused"),
        ("optim.schedule", "cosine", "refused"),
        ("optim.clip_norm", None, "refused"),
        ("rl.kl_coef", 0.5, "refused"),
        ("rl.epochs", 2, "refused"),
        ("rl.advantage", "other", "refused"),
        ("rl.gae_lambda", 0.5, "refused"),
        ("sampling.temperature", 0.5, "refused"),
        ("sampling.max_new_tokens", 5, "refused"),
        ("reward", "a.b:g", "refused"),
        ("reference", "/other", "refused"),
    ],
)
def test_each_key_has_its_class(key, value, verdict):
    old, new = ppo(), ppo(**{key: value})
    found = changes(old, new)
    assert {change.verdict for change in found} == {verdict}, found
    same = digest("ppo", old) == digest("ppo", new)
    assert same == (verdict == "free")
    if verdict == "refused":
        with pytest.raises(ConfigError, match="other settings") as caught:
            check_resume(old, new)
        assert f"{found[0].key}: " in str(caught.value)
        assert check_resume(old, new, [key])[0].verdict == "allowed"
    else:
        check_resume(old, new)


CONSTANT = {"optim.schedule": "constant"}


@pytest.mark.parametrize(
    ("settings", "key", "why"),
    [
        (CONSTANT, "train.steps", ""),
        (CONSTANT | {"optim.warmup": 3}, "train.steps", ""),
        (CONSTANT | {"optim.warmup": 0.1}, "train.steps", r"optim\.warmup = 0\.1 is a share"),
        ({}, "train.steps", r"optim\.schedule = linear falls"),
        ({"optim.schedule": "cosine"}, "train.steps", r"optim\.schedule = cosine falls"),
        (CONSTANT, "train.epochs", "last batch of the shorter run"),
    ],
)
def test_a_longer_run_is_a_continuation_only_where_it_begins_alike(settings, key, why):
    old, new = (sft(**{**settings, key: n}) for n in (10, 20))
    if not why:
        assert [change.verdict for change in check_resume(old, new)] == ["grown"]
        return
    with pytest.raises(ConfigError, match=rf"{key}: 10\S* -> 20.*{why}") as caught:
        check_resume(old, new)
    assert f"--allow-change {key}" in str(caught.value)
    assert [change.verdict for change in check_resume(old, new, [key])] == ["allowed"]


def test_places_may_move_their_content_is_compared_elsewhere():
    new = ppo(**{"model.path": "/moved", "data.train": "/moved.jsonl"})
    assert changes(ppo(), new) == []
    assert digest("ppo", ppo()) == digest("ppo", new)


def test_a_reward_function_is_its_name_wherever_its_file_lies():
    was = digest("ppo", ppo(reward="/here/r.py:f"))
    assert digest("ppo", ppo(reward="/moved/r.py:f")) == was
    assert digest("ppo", ppo(reward="/here/r.py:g")) != was


def test_allowing_a_key_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match=r"did you mean optim\.learning_rate"):
        check_resume(ppo(), ppo(), ["optim.learning_rat"])


def test_a_saved_configuration_is_no_change(tmp_path):
    config = ppo(**{"rl.gae_lambda": 0.5, "optim.eps": 1e-5})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert changes(load("ppo", [file]), config) == []
