# SPDX-License-Identifier: Apache-2.0
"""What is exact in every stage: where DPO starts, padding that is EOS, accumulation."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Models, metrics, read_jsonl, record, run, write_jsonl

from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.train.state import TrainState
from jaxrlhf.train.step import make_train_step, split_rows

SLOW = pytest.mark.slow


def test_dpo_starts_at_ln_2_and_an_accuracy_of_a_half(finished):
    first, second, *_ = metrics(finished("dpo"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["grad_norm"] > 0.01
    assert abs(second["loss"] - math.log(2)) > 1e-3
    before = metrics(finished("dpo"), "eval")[0]
    assert before["step"] == 0
    assert before["accuracy"] == 0.5


def test_a_new_reward_model_starts_at_ln_2_preferring_nothing(finished):
    first, second, *_ = metrics(finished("reward"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["rewards/accuracies"] == 0.5
    assert first["grad_norm"] > 0.01
    assert second["rewards/margins"] != 0


@pytest.fixture(scope="session")
def padded_with_eos(models, tmp_path_factory):
    """The models with a tokenizer whose padding token is its EOS."""
    copies = []
    for model in (models.base, models.judge):
        copy = shutil.copytree(model / "export", tmp_path_factory.mktemp("pad") / model.name)
        file = copy / "tokenizer_config.json"
        config = json.loads(file.read_text())
        assert config["pad_token"] != config["eos_token"]
        config["pad_token"] = config["eos_token"]
        file.write_text(json.dumps(config))
        copies.append(copy)
    return Models(*copies)


@pytest.mark.parametrize(
    "stage",
    [
        "reward",
        pytest.param("dpo", marks=SLOW),
        pytest.param("sft", marks=SLOW),
        pytest.param("ppo", marks=SLOW),
    ],
)
def test_padding_with_eos_changes_nothing(stage, tiny, finished, padded_with_eos, tmp_path):
    keys = tiny.settings(stage, padded_with_eos)
    assert run(stage, tmp_path, **keys).exit_code == 0
    expected, found = record(finished(stage)), record(tmp_path)
    assert found["summary"]["content"] == expected["summary"]["content"]
    assert found["metrics"] == expected["metrics"]
    assert found["checkpoints"] == expected["checkpoints"]


def test_two_answers_to_what_the_reference_says_are_refused(tiny, models, tmp_path):
    own = {"ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0}
    rows = [{**row, **own} for row in read_jsonl(tiny.pairs)]
    keys = {
        **tiny.comparisons(models.base),
        "data.train": str(write_jsonl(tmp_path / "pairs.jsonl", rows)),
        "reference": str(models.base),
    }
    with pytest.raises(ConfigError, match="brings reference log-probs of its own"):
        run("dpo", tmp_path / "run", **keys)


class Caught(Exception):
    pass


def first_batch(recipe):
    """What the stage hands its optimizer step first."""

    def catch(state, frozen, batch, key):
        raise Caught((frozen, batch, key))

    state = TrainState(step=jnp.int32(0), params=recipe.params, opt_state=(), extra={})
    with pytest.raises(Caught) as caught:
        recipe.advance(catch)(state, 0)
    return state, *caught.value.args[0]


# The state that comes out holds the gradients.
GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@SLOW
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_one_pass_of_8_rows_is_8_passes_of_one(stage, tiny, models, tmp_path):
    from jaxrlhf.stages import _recipe

    keys = tiny.settings(stage, models)
    if stage == "reward":
        # With a fresh head the two completions of a pair cancel, and with them all but rounding.
        keys["model"] = str(models.judge)
    if stage == "ppo":
        keys |= {"train.microbatch_size": 8, "rl.minibatches": 1}
    else:
        keys |= {"train.microbatch_size": None, "data.eval_fraction": None}
        keys = {k: v for k, v in keys.items() if v is not None and k != "train.eval_every"}
    config = load(stage, [], keywords=keys)
    mesh = make_mesh()
    with use_mesh(mesh):
        recipe = _recipe(stage)(config, mesh, jax.random.key(0))
        state, frozen, batch, key = first_batch(recipe)
        lengths = np.asarray(batch.completion_mask).sum(-1)
        assert len(np.unique(lengths)) > 2  # ragged
        found = {}
        for passes in (1, 8):
            step = make_train_step(recipe.loss_fn, GRADIENTS, accum=passes, prepare=recipe.prepare)
            began = state.replace(opt_state=GRADIENTS.init(state.params))
            after, said = jax.jit(step)(began, frozen, batch, key, 1.0)
            found[passes] = after.opt_state, float(said["loss"][0])
    flat = {
        n: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for n, (g, _) in found.items()
    }
    norm = np.linalg.norm(flat[1])
    if stage == "reward":
        # Gradients of pairs point every way and cancel in the sum; what is rounded is each of them.
        parts = split_rows(batch, 8)
        grad = jax.jit(jax.grad(recipe.loss_fn, has_aux=True))
        norm = sum(
            optax.tree.norm(grad(state.params, frozen, jax.tree.map(lambda x: x[i], parts), key)[0])  # noqa: B023
            for i in range(8)
        )
    assert norm > 1e-3
    assert np.linalg.norm(flat[1] - flat[8]) / norm < 1e-6
    assert found[1][1] == pytest.approx(found[8][1], abs=1e-6)
