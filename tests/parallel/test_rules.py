# SPDX-License-Identifier: Apache-2.0
"""Logical axes to shardings: parameters, optimizer state, batches; what cannot divide is listed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from jax.sharding import PartitionSpec

from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import (
    RULES,
    put_batch,
    shardings,
    state_shardings,
    use_mesh,
)
from jaxrlhf.train.optim import make_optimizer
from jaxrlhf.train.state import init_state, place_state

AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "layers": {
        "q": {"kernel": ("layers", "embed", "heads"), "bias": ("layers", "heads")},
        "norm": {"scale": ("layers", "embed")},
        "odd": {"kernel": ("layers", "mlp", None)},
        "square": {"kernel": ("embed", "embed")},
    },
    "score": {"kernel": ("embed", None)},
}


def params():
    return {
        "embed": {"embedding": jnp.zeros((10, 256))},
        "layers": {
            "q": {"kernel": jnp.zeros((2, 256, 128)), "bias": jnp.zeros((2, 128))},
            "norm": {"scale": jnp.zeros((2, 256))},
            "odd": {"kernel": jnp.zeros((2, 7, 3))},
            "square": {"kernel": jnp.zeros((256, 256))},
        },
        "score": {"kernel": jnp.zeros((256, 1))},
    }


def named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(e) if isinstance(e, tuple) else e for e in s.spec
        ]
        for path, s in leaves
    }


def specs():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    out = {}
    where, out["replicated"] = shardings(AXES, params(), mesh)
    out["params"] = named(where)
    for name in ("adamw", "adafactor"):
        tx, _ = make_optimizer(name, 0.1)
        state = jax.eval_shape(lambda p, tx=tx: init_state(p, tx, ema=True), params())
        where, _ = state_shardings(AXES, state, mesh)
        out[name] = named({"opt": where.opt_state, "extra": where.extra})
        shapes = {
            jax.tree_util.keystr(p, simple=True, separator="/"): list(x.shape)
            for p, x in jax.tree_util.tree_flatten_with_path({"opt": state.opt_state})[0]
        }
        out[name + " shapes"] = shapes
        placed, where, _ = place_state(params(), tx, mesh, AXES, ema=True)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), placed, where)
        out[name + " placed"] = all(jax.tree.leaves(same))
    batch = put_batch({"x": np.arange(16.0).reshape(8, 2), "s": np.float32(3)}, mesh)
    out["rows"] = [s.data.shape[0] for s in batch["x"].addressable_shards]
    out["scalar"] = batch["s"].sharding.is_fully_replicated
    try:
        put_batch(np.zeros((6, 2)), mesh)
    except ValueError as e:
        out["ragged"] = str(e)

    def f(x):
        return nn.with_logical_constraint(x, ("batch", "length", "act_mlp")) * 2

    lowered = {}
    with use_mesh(mesh):
        lowered["use_mesh"] = jax.jit(f).lower(jnp.zeros((8, 4, 4))).as_text()
    with jax.set_mesh(mesh):
        lowered["set_mesh alone"] = jax.jit(lambda x: f(x)).lower(jnp.zeros((8, 4, 4))).as_text()
    out["constraints"] = {k: v.count("sharding_constraint") for k, v in lowered.items()}
    return out


@pytest.fixture(scope="module")
def got():
    return run_on_devices(8, specs)


def test_parameters_follow_the_table(got):
    assert got["params"] == {
        "embed/embedding": ["tensor", "fsdp"],
        "layers/q/kernel": [None, "fsdp", "tensor"],
        "layers/q/bias": [None, "tensor"],
        "layers/norm/scale": [None, "fsdp"],
        "layers/odd/kernel": [],  # 7 over 2 does not go
        "layers/square/kernel": ["fsdp"],  # one mesh axis splits one dimension
        "score/kernel": ["fsdp"],
    }
    assert got["replicated"] == ["layers/odd/kernel dimension 1 (mlp 7) over tensor 2"]


def test_moments_and_averages_lie_with_their_parameters(got):
    placed = got["adamw"]
    for name, spec in got["params"].items():
        copies = [v for k, v in placed.items() if k.endswith("/" + name)]
        assert copies == [spec] * 3, name  # mu, nu, ema
    rest = {k: v for k, v in placed.items() if not any(k.endswith("/" + n) for n in got["params"])}
    assert rest
    assert all(v == [] for v in rest.values())  # counters
    assert got["adamw placed"]
    assert got["adafactor placed"]


def test_factored_moments_keep_the_spec_of_the_dimensions_they_have(got):
    found = {}
    for k, spec in got["adafactor"].items():
        if "q/kernel" in k and k.startswith("opt"):
            found[tuple(got["adafactor shapes"][k])] = spec
    assert found[(2, 256)] == [None, "fsdp"]
    assert found[(2, 128)] == [None, "tensor"]
    assert found[(1,)] == []
    # Rows and columns of a square matrix cannot be told apart: whole on every device.
    square = [v for k, v in got["adafactor"].items() if "square" in k and k.startswith("opt")]
    assert all(v == [] for v in square)


def test_batches_are_split_by_rows(got):
    assert got["rows"] == [2] * 8  # four parts, each on the two devices of its tensor pair
    assert got["scalar"]
    assert "6 rows" in got["ragged"]
    assert "4 devices" in got["ragged"]


def test_logical_constraints_hold_only_with_mesh_and_rules(got):
    assert got["constraints"]["use_mesh"] == 1
    assert got["constraints"]["set_mesh alone"] == 0  # the trap that use_mesh is for


def test_wrong_names_are_refused():
    mesh = make_mesh()
    shape = {"w": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    with pytest.raises(ValueError, match="w/kernel: unknown axis name 'mlpp'"):
        shardings({"w": {"kernel": ("embed", "mlpp")}}, shape, mesh)
    with pytest.raises(ValueError, match=r"w/kernel: axis names .* do not fit the shape"):
        shardings({"w": {"kernel": ("embed",)}}, shape, mesh)
    with pytest.raises(ValueError, match="w/kernel: this parameter has no axis names"):
        shardings({}, shape, mesh)
    where, _ = shardings({"w": {"kernel": None}}, shape, mesh)
    assert where["w"]["kernel"].spec == PartitionSpec()


def test_the_table_names_only_axes_of_the_mesh():
    mesh = make_mesh()
    for axes in RULES.values():
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            assert axis in mesh.shape
