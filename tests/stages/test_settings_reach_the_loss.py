# SPDX-License-Identifier: Apache-2.0
"""Every setting of a stage's loss changes the first batch's loss as its formula says.

The stage's own recipe gives the batch and the loss. The statistics (log-probs, values, scores) are
those that its models give; they are compiled once for all settings and noted down, and the formula
is written out again in float64 NumPy.
"""

import inspect
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import read_jsonl, write_jsonl

from jaxrlhf.config.load import load
from jaxrlhf.losses.policy import POLICY_LOSSES, clipped_value
from jaxrlhf.losses.preference import PREFERENCE_LOSSES
from jaxrlhf.losses.reward import REWARD_LOSSES
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.rl.experience import settings_of
from jaxrlhf.stages import _recipe, ppo, preference, reward, sft

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_offline import first_batch

CLOSE = {"rtol": 2e-5, "atol": 1e-6}
STATIC = ("config", "configs", "runtime", "temperature", "entropy")


class Said:
    """What the functions of models said last, by name; each is compiled once per architecture."""

    def __init__(self):
        self.programs, self.all = {}, {}

    def listen(self, patch, module, *names):
        for name in names:
            if name not in self.programs:
                function = getattr(module, name)
                static = [arg for arg in STATIC if arg in inspect.signature(function).parameters]
                self.programs[name] = jax.jit(function, static_argnames=static)
            patch.setattr(module, name, self._noting(name))

    def _noting(self, name):
        def call(*args, **kwargs):
            found = self.programs[name](*args, **kwargs)
            self.all.setdefault(name, []).append(found)
            return found

        return call

    def last(self, name):
        return jax.tree.map(lambda x: np.asarray(x, np.float64), self.all[name][-1])


@pytest.fixture(scope="module")
def said():
    return Said()


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """Pairs with margins, and log-probs of a reference that is not the model."""
    rng = np.random.default_rng(0)
    rows = [
        {
            **row,
            "margin": round(float(rng.uniform(0.5, 3)), 3),
            "ref_chosen_logps": float(rng.uniform(-60, -20)),
            "ref_rejected_logps": float(rng.uniform(-60, -20)),
        }
        for row in read_jsonl(tiny.pairs)
    ]
    return write_jsonl(tmp_path_factory.mktemp("compared") / "pairs.jsonl", rows)


def first_loss(stage, keys):
    """(the loss of the stage's first batch, the batch as its optimizer step prepares it)."""
    with use_mesh(make_mesh()) as mesh:
        recipe = _recipe(stage)(load(stage, [], keywords=keys), mesh, jax.random.key(0))
        state, frozen, batch, key = first_batch(recipe)
        if recipe.prepare is not None:
            batch = recipe.prepare(batch)
        loss, _ = recipe.loss_fn(state.params, frozen, batch, key)
    return float(loss), jax.device_get(batch)


def softplus(x):
    return np.logaddexp(0, x)


def weights_of(name, mask, length):
    """[B, T] float64: what each token of a global batch counts."""
    if name == "token_mean":
        return mask / mask.sum()
    if name == "fixed_length":
        return mask / (mask.any(1).sum() * length)
    return mask / np.maximum(mask.sum(1, keepdims=True), 1) / mask.any(1).sum()


# --- supervised fine-tuning, reward models, DPO ------------------------------------------------


@pytest.mark.parametrize("weights", ["token_mean", "sequence_mean", "fixed_length"])
def test_sft(weights, tiny, models, said, monkeypatch):
    said.listen(monkeypatch, sft, "row_logprobs")
    keys = tiny.sft(models.base) | {"train.microbatch_size": 8, "loss.weights": weights}
    loss, batch = first_loss("sft", keys)
    mask = batch.completion_mask
    nll = np.where(mask, -said.last("row_logprobs"), 0)
    wanted = {
        name: (weights_of(name, mask, length=32) * nll).sum()
        for name in ("token_mean", "sequence_mean", "fixed_length")
    }
    np.testing.assert_allclose(loss, wanted[weights], **CLOSE)
    assert np.ptp(list(wanted.values())) > 0.01  # it matters which


REWARD = {"margin_scale": 1.0, "center_coef": 0.0}


@pytest.mark.parametrize("changed", [{}, {"margin_scale": 0.3}, {"center_coef": 0.7}], ids=str)
def test_reward(changed, tiny, models, compared, said, monkeypatch):
    said.listen(monkeypatch, reward, "pair_scores")
    keys = tiny.comparisons(models.judge) | {"data.train": str(compared)}
    loss, batch = first_loss("reward", keys | {f"loss.{k}": v for k, v in changed.items()})
    chosen, rejected = said.last("pair_scores").T
    assert np.abs(chosen + rejected).min() > 1e-3

    def formula(margin_scale, center_coef):
        bradley_terry = softplus(-(chosen - rejected - margin_scale * batch.margin))
        return (bradley_terry + center_coef * (chosen + rejected) ** 2).mean()

    np.testing.assert_allclose(loss, formula(**{**REWARD, **changed}), **CLOSE)
    assert not changed or abs(loss - formula(**REWARD)) > 1e-3


DPO = {"beta": 0.1, "label_smoothing": 0.0}


@pytest.mark.parametrize("changed", [{}, {"beta": 0.4}, {"label_smoothing": 0.2}], ids=str)
def test_dpo(changed, tiny, models, compared, said, monkeypatch):
    said.listen(monkeypatch, preference, "completion_logprobs")
    keys = tiny.comparisons(models.base) | {"data.train": str(compared)}
    loss, batch = first_loss("dpo", keys | {f"loss.{k}": v for k, v in changed.items()})
    logprobs = said.last("completion_logprobs")

    def formula(beta, label_smoothing):
        chosen, rejected = (beta * (logprobs - batch.ref_logprobs)).T
        margin = chosen - rejected
        right, wrong = softplus(-margin), softplus(margin)
        return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()

    np.testing.assert_allclose(loss, formula(**{**DPO, **changed}), **CLOSE)
    assert not changed or abs(loss - formula(**DPO)) > 1e-3


# --- PPO ---------------------------------------------------------------------------------------

PPO = {
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "whiten_advantages": True,
    "kl_coef": 0.05,
    "kl_in_reward": "k1",
    "clip_eps": 0.2,
    "clip_eps_high": None,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "entropy_coef": 0.0,
    "weights": "token_mean",
}
CHANGED = [
    {},
    {"gamma": 0.8},
    {"gae_lambda": 0.5},
    {"whiten_advantages": False},
    {"kl_coef": 0.7},
    {"kl_in_reward": "exact", "kl_coef": 0.7},
    {"clip_eps": 0.05},
    {"clip_eps_high": 0.5},
    {"value_clip": 0.02},
    {"value_coef": 2.0},
    {"entropy_coef": 0.3},
    {"weights": "sequence_mean"},
    {"weights": "fixed_length"},
]


def moved(tree, seed):
    """Other parameters than those given, by a noise of 0.08."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.asarray(0.08 * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def iteration(tiny, models, said, tmp_path_factory):
    """`run(changed)`: the first iteration under those settings, up to its first optimizer step.

    All settings share one rollout and its scores; the reference and the policy that is updated are
    others than the one that sampled.
    """
    folder = tmp_path_factory.mktemp("ppo")
    shutil.copytree(models.base / "export", folder / "reference")
    file = folder / "reference" / "model.safetensors"
    save_file(moved(load_file(file), 1), file, metadata={"format": "pt"})
    keys = tiny.ppo(models.base, models.judge) | {
        "reference": str(folder / "reference"),
        "train.microbatch_size": 8,
        "rl.minibatches": 1,
    }
    shared = {}

    make_rollout, judge_rollout = ppo.make_rollout, ppo.judge_rollout

    def once(name, function):
        """The function, run for the first settings only."""

        def call(*args, **kwargs):
            if name not in shared:
                shared[name] = function(*args, **kwargs)
            return shared[name]

        return call

    def run(changed):
        config = load("ppo", [], keywords=keys | {f"rl.{k}": v for k, v in changed.items()})
        seen = {}
        make_experience = ppo.make_experience

        def noting(*args):
            program = make_experience(*args)

            def experience(params, ref_params, rollout, scores, kl_coef):
                found = program(params, ref_params, rollout, scores, jnp.asarray(kl_coef))
                seen.update(scores=scores, experience=found[0])
                return found

            return experience

        with use_mesh(make_mesh()) as mesh, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "make_experience", noting)
            patch.setattr(ppo, "make_rollout", lambda *args: once("rollout", make_rollout(*args)))
            patch.setattr(ppo, "judge_rollout", once("scores", judge_rollout))
            # Op by op, so that only what models say is compiled, and in one pass.
            patch.setattr(ppo, "jit", lambda function, mesh, **placed: function)
            patch.setattr(ppo, "in_minibatches", lambda score, rows, size: score(rows))
            names = ("row_hidden", "head_logprobs", "head_values", "head_exact_kl")
            said.listen(patch, ppo, *names)
            recipe = ppo.ppo(config, mesh, jax.random.key(0))
            state, frozen, batch, key = first_batch(recipe)
            if config.rl.kl_in_reward == "exact":
                seen["exact_kl"] = said.last("head_exact_kl")
            loss, _ = recipe.loss_fn(join(moved(state.params, 2), frozen), {}, batch, key)
        seen["new"] = said.last("head_logprobs")
        seen["values"] = said.last("head_values")
        return jax.device_get((float(loss), batch, seen))

    return run


@pytest.fixture(scope="module")
def usual(iteration):
    return iteration({})


def advantages_of(scores, exp, exact_kl, rl):
    """(rewards, advantages, returns) [B, T], token by token."""
    mask = exp.completion_mask
    k1 = np.asarray(exp.old_logprobs, np.float64) - exp.ref_logprobs
    penalty = k1 if rl["kl_in_reward"] == "k1" else exact_kl
    values = np.asarray(exp.values, np.float64)
    rewards, advantages = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        slots = np.flatnonzero(row)
        rewards[b, slots] = -rl["kl_coef"] * penalty[b, slots]
        rewards[b, slots[-1]] += scores[b]
        value = advantage = 0.0
        for t in slots[::-1]:
            delta = rewards[b, t] + rl["gamma"] * value - values[b, t]
            advantage = delta + rl["gamma"] * rl["gae_lambda"] * advantage
            value = values[b, t]
            advantages[b, t] = advantage
    returns = np.where(mask, advantages + values, 0)
    advantages -= np.where(mask, rl["kl_coef"] * (k1 - penalty), 0)
    if rl["whiten_advantages"]:
        kept = advantages[mask]
        advantages[mask] = (kept - kept.mean()) / kept.std()
    return rewards, advantages, returns


def loss_of(batch, seen, rl):
    """The loss of one minibatch."""
    mask = batch.completion_mask
    new, entropies = seen["new"] if rl["entropy_coef"] else (seen["new"], 0.0)
    ratio = np.exp(np.where(mask, new - batch.old_logprobs, 0))
    high = rl["clip_eps"] if rl["clip_eps_high"] is None else rl["clip_eps_high"]
    clipped = np.clip(ratio, 1 - rl["clip_eps"], 1 + high)
    policy = -np.minimum(ratio * batch.advantages, clipped * batch.advantages)
    values, old = seen["values"], batch.values
    near = old + np.clip(values - old, -rl["value_clip"], rl["value_clip"])
    error = np.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
    token = policy + rl["value_coef"] * error - rl["entropy_coef"] * entropies
    weights = weights_of(rl["weights"], mask, length=12)
    return np.where(mask, weights * token, 0).sum()


@pytest.mark.parametrize("changed", CHANGED, ids=str)
def test_ppo(changed, iteration, usual):
    loss, batch, seen = iteration(changed)
    rl = {**PPO, **changed}
    exp = seen["experience"]
    wanted = advantages_of(seen["scores"], exp, seen.get("exact_kl"), rl)
    for name, values in zip(("rewards", "advantages", "returns"), wanted, strict=True):
        np.testing.assert_allclose(getattr(exp, name), values, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, loss_of(batch, seen, rl), **CLOSE)
    assert not changed or abs(loss - usual[0]) > 1e-4


def test_no_setting_is_left_out():
    """A new keyword of a loss needs a case here."""
    assert {*REWARD} == {k for loss in REWARD_LOSSES.values() for k in settings_of(loss)}
    assert {*DPO} == {k for loss in PREFERENCE_LOSSES.values() for k in settings_of(loss)}
    functions = (ppo.ESTIMATORS["gae"], clipped_value, *POLICY_LOSSES.values())
    assert {k for function in functions for k in settings_of(function)} <= {*PPO}
    assert {key for changed in CHANGED for key in changed} == {*PPO}
