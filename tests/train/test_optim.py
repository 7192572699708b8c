# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules against float64 NumPy; exactly which leaves decay; clear refusals."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.spec import AdapterSpec, Kind, resolve
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.transformer import abstract_params
from jaxrlhf.stages.adapted import abstract_adapted
from jaxrlhf.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    decay_mask,
    make_optimizer,
    make_schedule,
    path_factors,
)


def gradient_stream(n, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(lambda p: p.shape, toy.params(), is_leaf=lambda x: hasattr(x, "shape"))
    for _ in range(n):
        yield jax.tree.map(
            lambda s: (scale * rng.normal(size=s)).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )


def compiled_step(optimizer):
    """(init, step): one step of (transformation, schedule) as `make_train_step` takes it, at the
    rate of step i; compiled as a whole, since op by op it takes many times as long."""
    tx, schedule = optimizer

    @jax.jit
    def step(grads, state, params, i):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda u: schedule(i) * u, updates), state

    return jax.jit(tx.init), step


def run(optimizer, grads):
    params = toy.params()
    init, step = compiled_step(optimizer)
    state = init(params)
    for i, g in enumerate(grads):
        updates, state = step(g, state, params, i)
        params = optax.apply_updates(params, updates)
    return params, state


def test_adamw_with_clipping_decay_and_schedule_equals_a_float64_transcription():
    lr, b1, b2, eps, decay, clip, steps, warm = 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, 6, 2
    optimizer = make_optimizer(
        "adamw", lr, schedule="linear", warmup=warm, steps=steps, weight_decay=decay,
        clip_norm=clip, b2=b2,
    )  # fmt: skip
    got, _ = run(optimizer, gradient_stream(steps))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params())
    m = jax.tree.map(np.zeros_like, p)
    v = jax.tree.map(np.zeros_like, p)
    for t, g in enumerate(gradient_stream(steps)):
        g = jax.tree.map(lambda x: x.astype(np.float64), g)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * min(1.0, clip / norm), g)  # noqa: B023
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
        rate = lr * (t + 1) / warm if t < warm else lr * (1 - (t - warm) / (steps - warm))
        for group, leaves in p.items():
            for name in leaves:
                mh = m[group][name] / (1 - b1 ** (t + 1))
                vh = v[group][name] / (1 - b2 ** (t + 1))
                step = mh / (np.sqrt(vh) + eps) + (decay * leaves[name] if name == "kernel" else 0)
                leaves[name] = leaves[name] - rate * step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, p)


def test_sgd_with_momentum_equals_a_float64_transcription():
    optimizer = make_optimizer("sgd", 0.1, momentum=0.9, clip_norm=None)
    got, _ = run(optimizer, gradient_stream(5))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params())
    m = jax.tree.map(np.zeros_like, p)
    for g in gradient_stream(5):
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        p = jax.tree.map(lambda p, m: p - 0.1 * m, p, m)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, p)


def test_adafactor_equals_a_float64_transcription_of_the_factored_moments():
    lr, threshold = 1e-2, 1.0
    optimizer = make_optimizer("adafactor", lr, clip_norm=None, min_dim_size_to_factor=8)
    got, _ = run(optimizer, gradient_stream(4))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params())
    row, col, full = {}, {}, {}
    for t, g in enumerate(gradient_stream(4)):
        keep = 1.0 - (t + 1.0) ** -0.8
        for group, leaves in p.items():
            for name, x in leaves.items():
                k = (group, name)
                square = g[group][name].astype(np.float64) ** 2 + 1e-30
                if x.ndim == 2:
                    row[k] = keep * row.get(k, 0) + (1 - keep) * square.mean(1)
                    col[k] = keep * col.get(k, 0) + (1 - keep) * square.mean(0)
                    second = np.outer(row[k], col[k]) / row[k].mean()
                else:
                    full[k] = keep * full.get(k, 0) + (1 - keep) * square
                    second = full[k]
                u = g[group][name] / np.sqrt(second)
                u = u / max(1.0, np.sqrt((u**2).mean()) / threshold)
                leaves[name] = x - lr * u
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, p)


def test_decay_acts_on_exactly_the_matrices_of_a_stacked_model():
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "layers": {
            "attention": {"q": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}},
            "attention_norm": {"scale": jnp.ones((2, 4)), "bias": jnp.ones((2, 4))},
        },
        "final_norm": {"scale": jnp.ones((4,))},
        "score": {"kernel": jnp.ones((4, 1))},
        "value": {"kernel": jnp.ones((4, 1)), "bias": jnp.ones((1,))},
    }
    optimizer = make_optimizer("adamw", 0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    init, step = compiled_step(optimizer)
    updates, _ = step(zero, init(params), params, 0)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, u in jax.tree_util.tree_flatten_with_path(updates)[0]
        if (u != 0).any()
    }
    assert moved == {
        "embed/embedding",
        "layers/attention/q/kernel",
        "score/kernel",
        "value/kernel",
    }
    np.testing.assert_allclose(updates["score"]["kernel"], -0.1 * 0.5)
    with pytest.raises(ValueError, match="gizmo"):
        decay_mask({"layer": {"gizmo": jnp.ones((2, 2))}})


@pytest.mark.parametrize("kind", get_args(Kind))
def test_it_is_decided_for_every_leaf_that_an_adapter_trains(kind):
    config = ModelConfig(vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, mlp_dim=16)
    shapes = abstract_params(config, heads=("lm",))
    adapter = resolve(AdapterSpec(kind, rank=2, virtual_tokens=3, width=2), config)
    trained, _ = adapter.split(abstract_adapted(adapter, shapes, "float32", config))
    decayed = set(jax.tree.leaves(decay_mask(trained)))
    assert decayed == {
        "ia3": {False},
        "soft_prompt": {False},
        "prefix": {False},
        "lora": {True},
    }.get(kind, {True, False})


def test_the_clip_uses_the_norm_of_all_leaves_together():
    tx, _ = make_optimizer("sgd", 1.0, clip_norm=1.0)
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.full(1, 3.0)}, "b": {"kernel": jnp.full(1, 4.0)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert [float(x[0]) for x in jax.tree.leaves(updates)] == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 1, 4, 0.25])
def test_schedules_warm_up_decay_and_stay_defined_past_their_end(name, warmup):
    steps, lr, final = 16, 0.3, 0.1
    rate = make_schedule(lr, name, warmup=warmup, steps=steps, final_ratio=final)
    up = {0: 0, 1: 1, 4: 4, 0.25: 4}[warmup]
    for k in [*range(steps), steps, 1000, 2**31 - 2]:
        t = min((k - up) / (steps - up), 1.0)
        after = {
            "constant": 1.0,
            "linear": 1 - (1 - final) * t,
            "cosine": final + (1 - final) * (1 + np.cos(np.pi * t)) / 2,
        }[name]
        want = lr * ((k + 1) / up if k < up else after)
        assert float(rate(jnp.int32(k))) == pytest.approx(want, rel=1e-5), k
    assert float(rate(0)) > 0  # no step at rate 0


def test_bf16_moments_are_the_first_only():
    optimizer = make_optimizer("adamw", 0.1, moment_dtype="bfloat16")
    _, state = run(optimizer, gradient_stream(2))
    kinds = {
        name: {x.dtype.name for x in jax.tree.leaves(optax.tree.get(state, name))}
        for name in ("mu", "nu")
    }
    assert kinds == {"mu": {"bfloat16"}, "nu": {"float32"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "linear"}, "needs train.steps"),
        ({"schedule": "linear", "steps": 4, "warmup": 4}, "fewer than the 4 steps"),
        ({"name": "sgd", "b1": 0.9}, "optim.b1: sgd has no such setting"),
        ({"learning_rate": -1.0}, "must not be negative"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"final_ratio": 2.0}, "final_ratio"),
    ],
)
def test_wrong_settings_are_refused_by_name(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make_optimizer(**arguments)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_a_quadratic(name):
    params = toy.params()
    init, step = compiled_step(make_optimizer(name, 0.05, weight_decay=0.01))
    state = init(params)
    loss = jax.jit(lambda p: sum((x**2).sum() for x in jax.tree.leaves(p)))
    first = loss(params)
    for i in range(20):
        updates, state = step(jax.grad(loss)(params), state, params, i)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.9 * first


def test_rate_factors_scale_whole_steps_of_the_parameters_below_their_path():
    def one_step(**settings):
        init, step = compiled_step(make_optimizer("adamw", 1e-2, weight_decay=0.1, **settings))
        params = {"actor": toy.params(), "critic": toy.params()}
        grads = {"actor": next(gradient_stream(1)), "critic": next(gradient_stream(1))}
        return step(grads, init(params), params, 0)[0]

    plain, scaled = one_step(), one_step(rate_factors={"critic": 5.0})
    jax.tree.map(np.testing.assert_array_equal, plain["actor"], scaled["actor"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(5 * a, b, rtol=1e-6),
        plain["critic"],
        scaled["critic"],
    )


def test_the_longest_path_counts_whole_keys_only_and_one_that_leads_nowhere_is_named():
    params = {"a": {"bb": {"kernel": 0.0}, "b": {"kernel": 0.0, "bias": 0.0}}, "ab": {"bias": 0.0}}
    found = path_factors({"a": 2.0, "a/b": 3.0, "a/b/bias": 5.0}, params)
    assert found == {
        "a": {"bb": {"kernel": 2.0}, "b": {"kernel": 3.0, "bias": 5.0}},
        "ab": {"bias": 1.0},
    }
    with pytest.raises(ConfigError, match=r"optim\.rate_factors: critic: no parameters.*a/bb, ab"):
        path_factors({"critic": 2.0}, params)
