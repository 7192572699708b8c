# SPDX-License-Identifier: Apache-2.0
"""The optimizer step: exact accumulation, the guard against non-finite numbers, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from devices import run_on_devices

from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import put_batch, replicated, use_mesh
from jaxrlhf.train.optim import make_optimizer
from jaxrlhf.train.state import init_state, place_state
from jaxrlhf.train.step import at_scheduled_rate, jit_train_step, make_train_step, split_rows

KEY = jax.random.key(0)
RATE = 0.05


def gradients(accum, batch, prepare=None):
    """What the optimizer gets: sgd at rate 1 moves the parameters by exactly that."""
    tx = optax.sgd(1.0)
    params = toy.params()
    step = jax.jit(make_train_step(toy.loss_fn, tx, accum=accum, prepare=prepare))
    state, metrics = step(init_state(params, tx), {}, batch, KEY, 1.0)
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, params, state.params), metrics


def distance(a, b):
    """Norm of the difference relative to the norm, over whole trees."""

    def square(t):
        return sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(t))

    return (square(jax.tree.map(lambda x, y: x - y, a, b)) / square(b)) ** 0.5


@pytest.mark.parametrize("accum", [2, 4, 8])
def test_accumulation_equals_one_batch_with_ragged_and_empty_rows(accum):
    # Rows 1 and 7 hold no token: with accum = 8 two microbatches are all masked.
    want, whole = gradients(1, toy.batch())
    got, metrics = gradients(accum, toy.batch())
    assert distance(got, want) < 1e-6
    for name in whole:
        a, b = (float(m[name][0] / m[name][1]) for m in (metrics, whole))
        assert a == pytest.approx(b, rel=1e-6), name


def test_gradient_equals_central_differences_of_the_float64_loss():
    batch = toy.batch(rows=4)
    got, _ = gradients(2, batch)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), toy.params())

    def loss(p):
        hidden = np.tanh(batch["x"].astype(np.float64) @ p["up"]["kernel"] + p["up"]["bias"])
        out = (hidden * p["norm"]["scale"]) @ p["down"]["kernel"]
        return (((out - batch["y"]) ** 2).mean(-1) * batch["weights"].astype(np.float64)).sum()

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), p)

    def move(e):
        return loss(jax.tree.map(lambda x, d: x + e * d, p, direction))

    want = (move(1e-5) - move(-1e-5)) / 2e-5
    along = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (got, direction)), strict=True))
    assert along == pytest.approx(want, rel=1e-5)


def test_prepare_sees_the_global_batch_before_the_split():
    raw = toy.batch()
    raw["weights"] = (raw["weights"] > 0).astype(np.float32)

    def normalise(batch):
        return {**batch, "weights": batch["weights"] / batch["weights"].sum()}

    want, _ = gradients(1, toy.batch())
    got, metrics = gradients(8, raw, normalise)
    assert distance(got, want) < 1e-6
    assert float(metrics["error"][1]) == pytest.approx(1.0, abs=1e-6)


def test_split_rows_keeps_every_row_once_and_repeats_scalars():
    x = jnp.arange(24).reshape(12, 2)
    parts = split_rows({"x": x, "scalar": jnp.float32(3)}, 4)
    assert parts["x"].shape == (4, 3, 2)
    assert parts["scalar"].tolist() == [3.0] * 4
    assert sorted(parts["x"].reshape(-1, 2).tolist()) == x.tolist()
    with pytest.raises(ValueError, match="12 rows does not split into 5"):
        split_rows(x, 5)


@pytest.mark.parametrize("poison", ["nan", "inf", "overflow"])
def test_a_non_finite_step_changes_nothing_and_the_next_one_learns(poison):
    tx, _ = make_optimizer("adamw", 1e-2, weight_decay=0.1)
    step = jax.jit(make_train_step(toy.loss_fn, tx, accum=2, ema_decay=0.9))
    state, _ = step(init_state(toy.params(), tx, ema=True), {}, toy.batch(0), KEY, RATE)
    bad = toy.batch(1)
    bad["y"][0, 0, 0] = {"nan": np.nan, "inf": np.inf, "overflow": 1e30}[poison]
    after, metrics = step(state, {}, bad, KEY, RATE)
    assert float(metrics["nonfinite"][0]) == 1.0
    assert int(after.step) == 2
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        (after.params, after.opt_state, after.extra),
        (state.params, state.opt_state, state.extra),
    )
    assert all(jax.tree.leaves(same))
    after, metrics = step(after, {}, toy.batch(2), KEY, RATE)
    assert float(metrics["nonfinite"][0]) == 0.0
    assert not bool((after.params["up"]["kernel"] == state.params["up"]["kernel"]).all())


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_too():
    def loss_fn(trainable, frozen, batch, key):
        return jnp.sqrt(trainable["w"]["kernel"] ** 2).sum(), {}

    tx, _ = make_optimizer("sgd", 0.1)
    state = init_state({"w": {"kernel": jnp.zeros(2)}}, tx)
    after, metrics = jax.jit(make_train_step(loss_fn, tx))(state, {}, {}, KEY, RATE)
    assert float(metrics["loss"][0]) == 0.0
    assert float(metrics["nonfinite"][0]) == 1.0
    assert (after.params["w"]["kernel"] == 0).all()


def test_ema_equals_the_running_average_of_all_leaves():
    tx, _ = make_optimizer("sgd", 0.1)
    step = jax.jit(make_train_step(toy.loss_fn, tx, ema_decay=0.75))
    state = init_state(toy.params(), tx, ema=True)
    want = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    for i in range(4):
        state, _ = step(state, {}, toy.batch(i), KEY, RATE)
        want = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), want, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.extra["ema"], want)
    with pytest.raises(ValueError, match="ema=True"):
        step(init_state(toy.params(), tx), {}, toy.batch(0), KEY, RATE)


def test_frozen_weights_are_used_and_never_changed():
    tx, _ = make_optimizer("sgd", 0.1)
    mesh = make_mesh()
    state, where, _ = place_state(toy.params(), tx, mesh, toy.AXES)
    frozen = {"shift": jnp.full((16,), 0.5)}
    step = jit_train_step(make_train_step(toy.loss_fn, tx), where, mesh)
    for i in range(3):
        state, _ = step(state, frozen, toy.batch(i), KEY, RATE)
    assert (frozen["shift"] == 0.5).all()  # still there, though the state was donated


def test_the_compiled_step_compiles_once_and_donates_whatever_the_schedule():
    tx, schedule = make_optimizer("adamw", 1e-2, schedule="cosine", steps=10, warmup=2)
    mesh = make_mesh()
    state, where, _ = place_state(toy.params(), tx, mesh, toy.AXES, ema=True)
    train_step = make_train_step(toy.loss_fn, tx, ema_decay=0.9)
    compiled = jit_train_step(train_step, where, mesh)
    first = state
    for i in range(4):
        _, schedule = make_optimizer("adamw", 1e-2, schedule="cosine", steps=10 + i, warmup=i)
        before = np.array(state.params["up"]["kernel"])  # a copy: a view would keep the buffer
        step = at_scheduled_rate(compiled, schedule, mesh)
        state, metrics = step(state, {}, put_batch(toy.batch(i), mesh), KEY)
        assert float(metrics["learning_rate"][0]) == pytest.approx(float(schedule(i)))
        if i == 0:  # Adam's first update is the sign of the gradient
            moved = abs(state.params["up"]["kernel"] - before)
            np.testing.assert_allclose(moved, float(schedule(0)), rtol=1e-3)
    assert compiled._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_a_state_has_buffers_of_its_own():
    tx, _ = make_optimizer("adamw", 1e-2)
    mesh = make_mesh()
    kernel = jax.device_put(toy.params()["up"]["kernel"], replicated(mesh))
    params = {name: {"kernel": kernel} for name in ("actor", "critic")}  # two that begin as one
    state, _, _ = place_state(params, tx, mesh, dict.fromkeys(params, toy.AXES["up"]), ema=True)
    arrays = [kernel, *(x for x in jax.tree.leaves(state) if x.size > 1)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays) == 1 + 2 * 4


def test_bf16_parameters_keep_their_dtype_and_fp32_statistics():
    tx, _ = make_optimizer("adamw", 1e-2, weight_decay=0.1, moment_dtype="bfloat16")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toy.params())
    state = init_state(params, tx)
    after, _ = jax.jit(make_train_step(toy.loss_fn, tx, accum=2))(state, {}, toy.batch(), KEY, RATE)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    dtypes = {x.dtype.name for x in jax.tree.leaves(optax.tree.get(after.opt_state, "nu"))}
    assert dtypes == {"float32"}


MESHES = [
    ({"fsdp": 8}, 1),
    ({"fsdp": 8}, 4),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
    ({"data": 2, "tensor": 4}, 2),
]


def sharded(cases):
    """20 steps on a mesh and on one device: gradients, parameters, FLOPs, compilations."""
    return [on_a_mesh(sizes, accum) for sizes, accum in cases]


def on_a_mesh(sizes, accum):
    tx, _ = make_optimizer("sgd", 0.05, clip_norm=None)
    results = []
    for devices, given in ((jax.devices()[:1], {}), (jax.devices(), sizes)):
        mesh = make_mesh(devices, **given)
        with use_mesh(mesh):
            state, where, _ = place_state(toy.params(embed=64, mlp=256), tx, mesh, toy.AXES)
            step = jit_train_step(make_train_step(toy.loss_fn, tx, accum=accum), where, mesh)
            frozen = jax.device_put({"shift": jnp.full((64,), 0.5)}, replicated(mesh))
            batches = [put_batch(toy.batch(i, 64, 16, 64, ragged=False), mesh) for i in range(20)]
            compiled = step.lower(state, frozen, batches[0], KEY, RATE).compile()
            flops = compiled.cost_analysis()["flops"] * mesh.size
            start = jax.device_get(state.params)
            state, _ = step(state, frozen, batches[0], KEY, RATE)
            after = jax.device_get(state.params)
            for batch in batches[1:]:
                state, _ = step(state, frozen, batch, KEY, RATE)
            grads = jax.tree.map(lambda a, b: (a - b) / RATE, start, after)
            results.append((grads, jax.device_get(state.params), flops, step._cache_size()))
    (g1, p1, f1, _), (g8, p8, f8, compiles) = results
    return {
        "grads": distance(g8, g1),
        "params": distance(p8, p1),
        "flops": f8 / f1,
        "compiles": compiles,
    }


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_computes_with_no_work_twice():
    for case, got in zip(MESHES, run_on_devices(8, sharded, cases=MESHES), strict=True):
        assert got["grads"] < 1e-5, case
        assert got["params"] < 1e-5, case
        assert got["flops"] < 1.1, case  # rows that left their devices would cost 4x and more
        assert got["compiles"] == 1, case
