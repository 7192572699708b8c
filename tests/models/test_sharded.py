# SPDX-License-Identifier: Apache-2.0
"""Models whose layers differ, and models with experts, on meshes of 8 devices: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from model_rows import CONFIGS, RUNTIME, batch, params, random_rows

from jaxrlhf.models.transformer import hidden_states, logical_axes
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import shardings

MESHES = {
    "one": {},
    "fsdp": {"fsdp": 8},
    "expert": {"data": 2, "expert": 2, "tensor": 2},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def loss_and_gradients(name: str) -> dict:
    """{mesh: [loss, flat gradients]}"""
    config = CONFIGS[name]
    tree = {key: leaf for key, leaf in params(name).items() if key not in ("score", "value")}
    rows = batch(random_rows(3, (12, 9, 12, 5, 7, 12, 3, 11)))

    def loss(tree, tokens, positions, segments):
        hidden = hidden_states(tree, config, RUNTIME, tokens, positions, segments)
        return jnp.square(jnp.where(segments[..., None] > 0, hidden, 0)).mean()

    found = {}
    for mesh_name, sizes in MESHES.items():
        devices = jax.devices()[:1] if mesh_name == "one" else jax.devices()
        mesh = make_mesh(devices, **sizes)
        where, _ = shardings(logical_axes(config), tree, mesh)
        placed = jax.tree.map(jax.device_put, tree, where)
        value, grads = jit(jax.value_and_grad(loss), mesh)(placed, *rows)
        flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(grads)])
        found[mesh_name] = [float(value), flat.tolist()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_every_mesh_gives_the_numbers_of_one_device(name):
    found = run_on_devices(8, loss_and_gradients, name=name)
    loss, want = found.pop("one")
    want = np.asarray(want)
    assert np.linalg.norm(want) > 0.01
    for mesh, (value, grads) in found.items():
        np.testing.assert_allclose(value, loss, rtol=1e-5, err_msg=mesh)
        error = np.linalg.norm(np.asarray(grads) - want) / np.linalg.norm(want)
        assert error < 1e-5, (mesh, error)
