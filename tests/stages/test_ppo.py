# SPDX-License-Identifier: Apache-2.0
"""What is exact in PPO, through the real stage."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import SHAPE, metrics, run, words, write_jsonl

from jaxrlhf import cli
from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError, JaxrlhfError
from jaxrlhf.parallel.mesh import AXES, make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages import ppo
from jaxrlhf.stages.functions import call_reward
from jaxrlhf.stages.models import open_model
from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.state import TrainState


def test_the_first_ratio_of_every_iteration_is_exactly_1(finished):
    """At temperature 0.7, four microbatches a step, two epochs of two minibatches."""
    lines = metrics(finished("ppo"))
    assert len(lines) == 3
    assert [line["ratio/first_off"] for line in lines] == [0, 0, 0]
    assert all(line["ratio/off"] > 0 for line in lines)  # the test can tell
    assert all(0.5 <= line["completions/distinct"] <= 1 for line in lines)
    assert lines[0]["kl"] == 0
    assert all(line["kl"] != 0 for line in lines[1:])


def test_scores_land_on_the_last_token_and_nothing_counts_after_a_stop(finished):
    finished("ppo")
    assert len(finished.experience) == 3
    stopped = 0
    for rollout, scores, exp in finished.experience:
        assert scores.dtype == np.float32
        for b in range(len(scores)):
            start, length = rollout.prompt_lengths[b], rollout.lengths[b]
            last = start + length - 1
            mask = np.zeros(exp.tokens.shape[1], bool)
            mask[start : last + 1] = True
            np.testing.assert_array_equal(exp.completion_mask[b], mask)
            kl = exp.old_logprobs[b] - exp.ref_logprobs[b]
            expected = np.where(mask, -0.05 * kl, 0).astype(np.float32)
            expected[last] += scores[b]
            np.testing.assert_allclose(exp.rewards[b], expected, rtol=1e-6, atol=1e-7)
            for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
                values = getattr(exp, name)[b]
                assert not values[~mask].any(), name
            assert exp.old_logprobs[b][mask].all()
            assert (exp.segment_ids[b] > 0).sum() == last + 1
            early = rollout.finish_reason[b] == 1
            stopped += early
            assert early or length == 12
    assert 0 < stopped < 24  # both kinds were there


def test_reference_and_reward_model_never_change(finished):
    finished("ppo")
    assert {name for name, _, _ in finished.frozen} == {"reference", "reward"}
    for name, params, before in finished.frozen:
        assert content_digest(params) == before, name


def test_the_start_weights_are_there_once_as_the_reference(finished):
    """Embeddings: the actor's, its two moments, the reference's, the reward model's."""
    finished("ppo")
    assert finished.embeddings == [5, 5, 5]


FUNCTIONS = """
calls = []

def fraction(prompts, completions, colour, **columns):
    assert len(prompts) == len(completions) == len(colour) == 8
    assert all(isinstance(text, str) for text in completions)
    calls.append(0)
    return [0.7] * 8 if len(calls) == 1 else [0.7] * 7 + [float("nan")]
"""


def test_a_function_s_floats_stay_floats_and_its_nan_ends_the_run(
    tiny, models, finished, tmp_path, capsys
):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    keys = tiny.settings("ppo", models) | {"reward": f"{file}:fraction"}
    assert cli.main(words("ppo", tmp_path / "run", keys)) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: reward function fraction returned nan for sample 7")
    assert "customer" in text  # the prompt of that sample
    [line] = metrics(tmp_path / "run")
    assert line["reward"] == line["reward/fraction"] == pytest.approx(0.7, rel=1e-7)
    assert (tmp_path / "run" / "checkpoints" / "1" / "manifest.json").is_file()  # nothing is lost


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, None], "returned None for sample 1"),
        ([float("inf"), 1.0], "returned inf for sample 0"),
        ([1.0, -1e39], "returned -1e+39 for sample 1"),  # finite, but not in float32
        ([1.0, "good"], "returned 'good' for sample 1"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0] * 3, "returned 3 values for 2 completions"),
        (None, "raised TypeError"),
        (1.0, "raised TypeError"),
        (KeyError("colour"), "raised KeyError: 'colour'"),
    ],
)
def test_a_reward_that_is_no_number_is_an_error_that_names_it(returned, said):
    def function(prompts, completions):
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(JaxrlhfError) as error:
        call_reward(function, "mine", ["a", "b"], ["c", "d"], {})
    assert "reward function mine " + said in str(error.value)


@pytest.mark.parametrize("values", [[0.7, 0.2], [1, 0], [True, False], np.array([0.7, 0.2])])
def test_rewards_of_any_number_type_become_float32(values):
    found = call_reward(lambda prompts, completions: values, "mine", ["a", "b"], ["c", "d"], {})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(values, np.float32))


def test_a_model_of_the_wrong_kind_is_refused(tiny, models, tmp_path, capsys):
    cases = [
        ("ppo", tiny.ppo(models.judge, models.judge), "judge/export is a reward model"),
        ("ppo", tiny.ppo(models.base, models.base), "base/export is a language model"),
        ("sft", tiny.sft(models.judge), "judge/export is a reward model"),
        ("dpo", tiny.comparisons(models.judge), "judge/export is a reward model"),
        (
            "dpo",
            {**tiny.comparisons(models.base), "reference": str(models.judge)},
            "judge/export is a reward model",
        ),
    ]
    for i, (stage, keys, said) in enumerate(cases):
        assert cli.main(words(stage, tmp_path / str(i), keys)) == 1
        text = capsys.readouterr().err
        assert said in text, (stage, text)
        assert "is needed here" in text


def test_another_tokenizer_is_refused(tiny, models, stories, tmp_path, capsys):
    judge = tmp_path / "judge"
    shutil.copytree(models.judge / "export", judge)
    file = judge / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab[-1], vocab[-2] = vocab[-2], vocab[-1]
    file.write_text(json.dumps(content))
    cases = [
        ("ppo", tiny.ppo(models.base, judge)),
        ("ppo", {**tiny.ppo(models.base, models.judge), "reference": str(stories)}),
        ("dpo", {**tiny.comparisons(models.base), "reference": str(stories)}),
    ]
    for i, (stage, keys) in enumerate(cases):
        assert cli.main(words(stage, tmp_path / str(i), keys)) == 2
        assert "have different tokenizers" in capsys.readouterr().err


VARIANTS = {
    "reward critic, exact KL": {
        "rl.critic": "reward",
        "rl.kl_in_reward": "exact",
        "sampling.temperature": 1.0,
    },
    "policy critic, entropy": {"rl.critic": "policy", "rl.entropy_coef": 0.01},
    "rloo": {"rl.advantage": "rloo", "rl.samples_per_prompt": 4},
    "group, whole batch": {"rl.advantage": "group", "train.microbatch_size": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_rate_0_every_ratio_is_1_and_no_kl_is_seen(variant, tiny, models, tmp_path):
    keys = tiny.settings("ppo", models) | {"train.steps": 2, "optim.learning_rate": 0.0}
    keys |= VARIANTS[variant]
    if "advantage" in str(keys):
        del keys["rl.critic"]
    result = run("ppo", tmp_path, **keys)
    assert result.exit_code == 0
    lines = metrics(tmp_path)
    assert len(lines) == 2
    for line in lines:
        assert line["ratio/first_off"] == line["ratio/off"] == line["kl"] == 0
        assert line["grad_norm"] > 0
        assert line["approx_kl"] == 0
    tokenless = {"rloo", "group, whole batch"}
    assert all(("value/error" in line) != (variant in tokenless) for line in lines)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rl.samples_per_prompt": 8}, "/ rl.samples_per_prompt = 8 is 2 prompts an iteration"),
        ({"rl.minibatches": 8}, "/ rl.minibatches = 8 is 2 episodes a minibatch"),
    ],
)
def test_parts_of_an_iteration_that_the_devices_cannot_share_are_refused(changed, said, tiny):
    keys = {**tiny.ppo("none", "none"), "train.batch_size": 16, "train.microbatch_size": None}
    config = load("ppo", [], keywords=keys | changed)
    mesh = AbstractMesh((4, 1, 1, 1, 1), AXES)
    with pytest.raises(ConfigError) as error:
        ppo.ppo(config, mesh, jax.random.key(0))  # before a model is opened
    assert said in str(error.value)
    assert str(error.value).endswith("make train.batch_size a multiple of 32")
    assert ppo.division(config, AbstractMesh((2, 1, 1, 1, 1), AXES))[:2] in ((2, 8), (8, 2))


def test_prompts_are_padded_no_further_than_learned_positions_reach(tiny, tmp_path, monkeypatch):
    """50 positions: prompts of 38 and completions of 12 fit, prompts padded to 40 would not."""
    (tmp_path / "mine.py").write_text("def f(prompts, completions): return [0.0] * len(prompts)\n")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "where is my order? " * 20}] * 4)
    keys = {
        **tiny.ppo(tmp_path, f"{tmp_path}/mine.py:f"),
        "data.train": str(prompts),
        "data.max_length": 50,
    }
    learned = {**tiny.base, "model.init": {**SHAPE, "family": "gpt2", "max_positions": 50}}
    section = load("pretrain", [], keywords=learned).model
    sampled = []

    class Sampled(Exception):
        """What comes after sampling is not looked at here."""

    def rolled_out(actor, **batch):
        sampled.append(batch["prompt_tokens"].shape)
        raise Sampled

    monkeypatch.setattr(ppo, "open_policy", lambda _, mesh, key: open_model(section, mesh, key=key))
    monkeypatch.setattr(ppo, "make_rollout", lambda *args: rolled_out)
    with use_mesh(make_mesh()) as mesh:
        recipe = ppo.ppo(load("ppo", [], keywords=keys), mesh, jax.random.key(0))
    state = TrainState(step=0, params=recipe.params, opt_state=(), extra={})
    with pytest.raises(Sampled):
        recipe.advance(None)(state, 0)
    assert sampled == [(4, 38)]


@pytest.fixture
def iterations(tiny, models, monkeypatch):
    """`run(off)`: the stage's iterations, where all that is computed is a ratio off for so many."""
    parts = {
        "make_rollout": lambda *args: lambda *args, **kwargs: None,
        "judge_rollout": lambda *args: {"judge": np.zeros(8, np.float32)},
        "make_experience": lambda *args: lambda *args: (None, {}),
        "make_minibatches": lambda *args: lambda *args: [None],
    }
    for name, part in parts.items():
        monkeypatch.setattr(ppo, name, part)

    def run(off):
        def step(state, frozen, rows, key):
            return state, {"ratio/off": (np.float32(off), np.int32(70))}

        with use_mesh(make_mesh()) as mesh:
            config = load("ppo", [], keywords=tiny.ppo(models.base, models.judge))
            recipe = ppo.ppo(config, mesh, jax.random.key(0))
            advance = recipe.advance(step)
            state = TrainState(step=0, params=recipe.params, opt_state=(), extra={})
            for i in range(recipe.steps):
                advance(state, i)

    return run


def test_a_first_ratio_that_is_not_1_is_said_once(iterations, capsys):
    iterations(0)
    assert "ratio" not in capsys.readouterr().out
    iterations(3)
    assert capsys.readouterr().out.count("warning: the ratio of 3 of 70 tokens is not 1") == 1


def test_a_reference_that_changed_is_an_error(iterations, monkeypatch):
    seen = []

    def digest(params):
        seen.append(content_digest(params))
        return seen[-1] + "x" * len(seen)

    monkeypatch.setattr(ppo, "content_digest", digest)
    with pytest.raises(JaxrlhfError, match="the reference's weights are no longer those"):
        iterations(0)
    assert len(seen) == 2  # at the start and at the end
    assert seen[0] == seen[1]  # in truth it did not
