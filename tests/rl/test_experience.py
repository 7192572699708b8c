# SPDX-License-Identifier: Apache-2.0
"""Experience: rewards, masks, minibatches; its policy gradient by enumerating every sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.losses.policy import ppo_clip
from jaxrlhf.ops.advantages import ESTIMATORS
from jaxrlhf.ops.masking import weighted_sum
from jaxrlhf.rl.experience import (
    build_experience,
    loss_weights,
    minibatches,
    needs_values,
    settings_of,
)
from jaxrlhf.types import Rollout


def rollout(tokens, completion_mask):
    """Rows whose real tokens are given; prompt = whatever comes before the mask."""
    tokens, mask = jnp.asarray(tokens), jnp.asarray(completion_mask)
    real = jnp.ones(tokens.shape, jnp.int32)
    rows = jnp.zeros(tokens.shape[0], jnp.int32)
    return Rollout(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        segment_ids=real,
        completion_mask=mask,
        prompt_lengths=mask.argmax(1),
        lengths=mask.sum(1),
        sampler_logprobs=jnp.zeros(tokens.shape),
        finish_reason=rows,
        policy_step=rows,
    )


B, T = 6, 7


def case(seed=0):
    rng = np.random.default_rng(seed)
    start, length = rng.integers(1, 3, B), rng.integers(1, 5, B)
    t = np.arange(T)
    mask = (t >= start[:, None]) & (t < (start + length)[:, None])
    stats = {
        name: rng.normal(size=(B, T)).astype(np.float32)
        for name in ("old_logprobs", "ref_logprobs", "values", "exact_kl")
    }
    return rollout(rng.integers(0, 9, (B, T)), mask), rng.normal(size=B).astype(np.float32), stats


def build(seed=0, fill=None, **kwargs):
    rows, scores, stats = case(seed)
    if fill is not None:
        stats = {k: np.where(rows.completion_mask, v, fill) for k, v in stats.items()}
    stats = {k: jnp.asarray(v, jnp.float32) for k, v in stats.items()}
    return build_experience(rows, jnp.asarray(scores), **stats, **kwargs)


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_rewards_sum_to_score_less_penalty(kl):
    rows, scores, stats = case()
    k1 = stats["old_logprobs"] - stats["ref_logprobs"]
    penalty = np.where(rows.completion_mask, k1 if kl == "k1" else stats["exact_kl"], 0).sum(1)
    got = build(kl_coef=0.3, kl_in_reward=kl).rewards
    np.testing.assert_allclose(got.sum(1), scores - 0.3 * penalty, atol=1e-5)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1.0])
def test_masked_garbage_changes_no_bit(estimator, bad):
    kwargs = {"estimator": estimator, "estimator_kwargs": {}, "kl_in_reward": "exact"}
    if estimator != "gae":
        kwargs["estimator_kwargs"]["samples_per_prompt"] = 3
    if estimator == "group":
        kwargs["estimator_kwargs"]["scale_by_std"] = False
    clean, dirty = build(fill=0.0, **kwargs), build(fill=bad, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    outside = ~np.asarray(clean.completion_mask)
    for name in ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert (np.asarray(getattr(dirty, name))[outside] == 0).all(), name


def test_whitening_is_over_the_completion_tokens_of_the_batch():
    whitened, plain = build(), build(whiten_advantages=False)
    mask = np.asarray(plain.completion_mask)
    want = np.asarray(plain.advantages, np.float64)[mask]
    want = (want - want.mean()) / want.std()
    np.testing.assert_allclose(np.asarray(whitened.advantages)[mask], want, atol=1e-5)
    np.testing.assert_array_equal(whitened.returns, plain.returns)


def test_an_equal_reference_costs_exactly_nothing():
    rows, scores, stats = case()
    same = jnp.asarray(stats["old_logprobs"])
    got = build_experience(rows, jnp.asarray(scores), same, same, jnp.zeros((B, T)), kl_coef=9.0)
    assert (got.rewards.sum(1) == scores).all()


def test_what_is_missing_or_impossible_is_refused():
    rows, scores, stats = case()
    old, ref = jnp.asarray(stats["old_logprobs"]), jnp.asarray(stats["ref_logprobs"])
    scores = jnp.asarray(scores)
    with pytest.raises(ValueError, match=r'"gae" needs values'):
        build_experience(rows, scores, old, ref)
    with pytest.raises(ValueError, match="needs the exact KL"):
        build_experience(rows, scores, old, ref, old, kl_in_reward="exact")
    with pytest.raises(ValueError, match="scale_by_std = false"):
        build(kl_in_reward="exact", estimator="group", estimator_kwargs={"samples_per_prompt": 3})
    with pytest.raises(ValueError, match='"k2"'):
        build(kl_in_reward="k2")


def test_signatures_say_what_a_critic_and_the_configuration_need():
    assert [name for name in sorted(ESTIMATORS) if needs_values(name)] == ["gae"]
    assert settings_of(ESTIMATORS["gae"]) == ("gamma", "gae_lambda")
    assert settings_of(ppo_clip) == ("clip_eps", "clip_eps_high")


def test_minibatches_are_a_permutation_with_weights_of_their_own():
    exp = build()
    rows = [np.asarray(m.tokens).tolist() for m in minibatches(exp, jax.random.key(0), 3)]
    assert [len(part) for part in rows] == [2, 2, 2]
    assert sorted(row for part in rows for row in part) == sorted(np.asarray(exp.tokens).tolist())
    again = [np.asarray(m.tokens).tolist() for m in minibatches(exp, jax.random.key(0), 3)]
    other = [np.asarray(m.tokens).tolist() for m in minibatches(exp, jax.random.key(1), 3)]
    assert rows == again != other
    for m in minibatches(exp, jax.random.key(0), 3):
        np.testing.assert_allclose(m.weights.sum(), 1, rtol=1e-6)
        np.testing.assert_array_equal(m.weights > 0, m.completion_mask)
    with pytest.raises(ValueError, match="minibatches = 4"):
        next(minibatches(exp, jax.random.key(0), 4))
    with pytest.raises(ValueError, match="need a length"):
        loss_weights(exp.completion_mask, "fixed_length")


# A toy policy over V tokens and two steps: logits of the first, and of the second given the first.
V = 4
SEQUENCES = np.array([(a, b) for a in range(V) for b in range(V)])
BETA = 0.7


def toy():
    k = jax.random.split(jax.random.key(3), 6)
    params = {"first": jax.random.normal(k[0], (V,)), "second": jax.random.normal(k[1], (V, V))}
    ref = {"first": jax.random.normal(k[2], (V,)), "second": jax.random.normal(k[3], (V, V))}
    values = (0.3, jax.random.normal(k[5], (V,)))
    return params, ref, jax.random.normal(k[4], (V, V)), values


def toy_logprobs(params, sequences):
    """[n, 3]: slot 0 is the prompt."""
    a, b = sequences[:, 0], sequences[:, 1]
    first = jax.nn.log_softmax(params["first"])[a]
    second = jax.nn.log_softmax(params["second"])[a, b]
    return jnp.stack([jnp.zeros(len(a)), first, second], 1)


def toy_kl(params, ref, sequences):
    """[n, 3]: exact KL of each step's distribution."""

    def kl(x, y):
        p, q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
        return (jnp.exp(p) * (p - q)).sum(-1)

    first = jnp.full(len(sequences), kl(params["first"], ref["first"]))
    second = kl(params["second"], ref["second"])[sequences[:, 0]]
    return jnp.stack([0 * first, first, second], 1)


def toy_advantages(sequences, kl_in_reward, estimator, score_coef=1.0, **kwargs):
    params, ref, table, values = toy()
    n = len(sequences)
    tokens = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), jnp.asarray(sequences)], 1)
    mask = jnp.broadcast_to(jnp.array([False, True, True]), (n, 3))
    baseline = jnp.stack([0.0 * jnp.ones(n), values[0] * jnp.ones(n), values[1][tokens[:, 1]]], 1)
    exp = build_experience(
        rollout(tokens, mask),
        score_coef * table[tokens[:, 1], tokens[:, 2]],
        toy_logprobs(params, sequences),
        toy_logprobs(ref, sequences),
        baseline,
        exact_kl=toy_kl(params, ref, sequences),
        kl_coef=BETA,
        kl_in_reward=kl_in_reward,
        estimator=estimator,
        estimator_kwargs=kwargs,
        whiten_advantages=False,
    )
    return exp


def true_gradient(score_coef=1.0):
    params, ref, table, _ = toy()

    def objective(params):
        logp = toy_logprobs(params, SEQUENCES)
        p = jnp.exp(logp.sum(1))
        kl = logp.sum(1) - toy_logprobs(ref, SEQUENCES).sum(1)
        score = score_coef * table[SEQUENCES[:, 0], SEQUENCES[:, 1]]
        return (p * (score - BETA * kl)).sum()

    return jax.grad(objective)(params)


@pytest.mark.parametrize("kl_in_reward", ["k1", "exact"])
@pytest.mark.parametrize("estimator", ["gae", "rloo", "rloo_to_go"])
def test_the_expected_policy_gradient_is_that_of_the_objective(kl_in_reward, estimator):
    params, _, _, _ = toy()
    p = np.exp(np.asarray(toy_logprobs(params, SEQUENCES).sum(1)))
    if estimator == "gae":
        rows, chance = SEQUENCES, p
        kwargs = {"gae_lambda": 1.0}
    else:  # every pair of sequences as a group of two
        i, j = map(np.ravel, np.meshgrid(range(V * V), range(V * V)))
        rows = SEQUENCES[np.stack([i, j], 1).ravel()]
        chance = np.repeat(p[i] * p[j], 2) / 2
        kwargs = {"samples_per_prompt": 2}
    exp = toy_advantages(rows, kl_in_reward, estimator, **kwargs)

    def loss(params):  # as in training, at ratio 1
        new = toy_logprobs(params, rows)
        per_token, _ = ppo_clip(new, exp.old_logprobs, exp.advantages, exp.completion_mask)
        return (per_token.sum(1) * chance).sum()

    got = jax.grad(loss)(params)
    jax.tree.map(
        lambda g, want: np.testing.assert_allclose(g, -want, atol=1e-6), got, true_gradient()
    )


def test_exact_kl_alone_in_the_reward_would_lose_the_own_part():
    """Why the own term is added back: without it the gradient is a different one."""
    exp = toy_advantages(SEQUENCES, "exact", "gae", gae_lambda=1.0)
    params, ref, _, _ = toy()
    own = jnp.where(exp.completion_mask, exp.old_logprobs - exp.ref_logprobs, 0)
    bare = exp.advantages + BETA * (own - toy_kl(params, ref, SEQUENCES))
    p = jnp.exp(exp.old_logprobs.sum(1))

    def objective(params):
        return (
            p * (jnp.where(exp.completion_mask, bare, 0) * toy_logprobs(params, SEQUENCES)).sum(1)
        ).sum()

    got, want = jax.grad(objective)(params), true_gradient()
    assert abs(got["first"] - want["first"]).max() > 0.01


def test_exact_has_less_variance_than_k1():
    params, _, _, _ = toy()
    p = np.exp(np.asarray(toy_logprobs(params, SEQUENCES).sum(1)))

    def variance(kl_in_reward):
        exp = toy_advantages(SEQUENCES, kl_in_reward, "gae", score_coef=0.0, gae_lambda=1.0)

        def one(params, row):
            logp = toy_logprobs(params, jnp.asarray(SEQUENCES)[row][None])[0]
            return (logp * exp.advantages[row]).sum()

        grads = jax.vmap(jax.grad(one), (None, 0))(params, jnp.arange(V * V))
        flat = np.concatenate([np.asarray(g).reshape(V * V, -1) for g in jax.tree.leaves(grads)], 1)
        mean = (p[:, None] * flat).sum(0)
        return (p[:, None] * (flat - mean) ** 2).sum()

    assert variance("exact") < 0.9 * variance("k1")


# The bandit: one action, five arms, a known optimum pi* = pi_ref exp(r / beta) / Z.
REF = jnp.array([0.2, -0.1, 0.4, 0.0, -0.5])
REWARD = jnp.array([1.0, 0.0, 0.5, -1.0, 2.0])
OPTIMUM = {
    0.1: [9.1415805e-05, 3.0745965e-09, 7.5232895e-07, 1.542669e-13, 0.99990783],
    0.5: [0.19106284, 0.01915574, 0.08585007, 0.00286510, 0.70106625],
    1.0: [0.28785163, 0.07844872, 0.21324573, 0.03189487, 0.38855905],
}
BEST = {0.1: 1.78467148, 0.5: 1.10088775, 1.0: 0.79193273}


def train_bandit(beta, estimator, kl_in_reward, iterations=300, episodes=256):
    ref = jax.nn.log_softmax(REF)
    tx = optax.adam(optax.linear_schedule(0.08, 0.0, iterations * 4))
    mask = jnp.broadcast_to(jnp.array([False, True]), (episodes, 2))
    kwargs = {"samples_per_prompt": 8} if estimator != "gae" else {"gae_lambda": 0.95}
    if estimator == "group":
        kwargs["scale_by_std"] = False

    def at_slot(x):
        return jnp.stack([jnp.zeros_like(x), x], 1)

    def logprobs(logits, tokens):
        return at_slot(jax.nn.log_softmax(logits)[tokens[:, 1]])

    def iteration(carry, key):
        params, opt = carry
        draw, order = jax.random.split(key)
        actions = jax.random.categorical(draw, params["logits"], shape=(episodes,))
        tokens = at_slot(actions)
        p = jax.nn.log_softmax(params["logits"])
        exact = (jnp.exp(p) * (p - ref)).sum()
        exp = build_experience(
            rollout(tokens, mask),
            REWARD[actions],
            logprobs(params["logits"], tokens),
            logprobs(REF, tokens),
            at_slot(jnp.full(episodes, params["value"])),
            exact_kl=at_slot(jnp.full(episodes, exact)),
            kl_coef=beta,
            kl_in_reward=kl_in_reward,
            estimator=estimator,
            estimator_kwargs=kwargs,
        )

        def loss(params, batch):
            new = logprobs(params["logits"], batch.tokens)
            policy, _ = ppo_clip(new, batch.old_logprobs, batch.advantages, batch.completion_mask)
            error = (params["value"] - batch.returns) ** 2 / 2
            return weighted_sum(policy + error, batch.weights)

        for epoch in range(2):
            for batch in minibatches(exp, jax.random.fold_in(order, epoch), 2):
                updates, opt = tx.update(jax.grad(loss)(params, batch), opt)
                params = optax.apply_updates(params, updates)
        return (params, opt), None

    params = {"logits": REF, "value": jnp.zeros(())}
    keys = jax.random.split(jax.random.key(0), iterations)
    (params, _), _ = jax.jit(lambda c, k: jax.lax.scan(iteration, c, k))(
        (params, tx.init(params)), keys
    )
    return np.asarray(jax.nn.softmax(params["logits"]), np.float64)


@pytest.mark.parametrize(
    ("beta", "estimator", "kl_in_reward"),
    [
        (0.1, "gae", "k1"),
        (1.0, "gae", "k1"),
        (0.5, "gae", "exact"),
        (0.5, "rloo", "k1"),
        (0.1, "rloo_to_go", "exact"),
        (0.5, "group", "k1"),
    ],
)
def test_the_bandit_reaches_the_tilted_policy(beta, estimator, kl_in_reward):
    got, want = train_bandit(beta, estimator, kl_in_reward), np.array(OPTIMUM[beta])
    assert abs(got - want).sum() / 2 <= 0.02
    ref = np.exp(np.asarray(jax.nn.log_softmax(REF), np.float64))
    kl = (got * np.log(np.maximum(got, 1e-30) / ref)).sum()
    assert (got * np.asarray(REWARD)).sum() - beta * kl >= BEST[beta] - 0.01 * abs(BEST[beta])
