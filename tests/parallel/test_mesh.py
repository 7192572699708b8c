# SPDX-License-Identifier: Apache-2.0
"""Device meshes: sizes that fit, and clear refusals of those that do not."""

import jax
import pytest
from devices import run_on_devices

from jaxrlhf.errors import ConfigError
from jaxrlhf.parallel.mesh import AXES, make_mesh, row_shards


def test_one_device_has_all_axes_of_size_one():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert set(mesh.shape.values()) == {1}
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dat": 1}, "mesh.dat=1"),
        ({"data": 0}, "mesh.data=0"),
        ({"data": -2}, "mesh.data=-2"),
        ({"data": -1, "fsdp": -1}, "data and fsdp are both -1"),
        ({"tensor": 3}, "tensor=3"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_name(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(**sizes)


def eight():
    errors = []
    for sizes in [{"data": 3}, {"fsdp": 4}, {"data": 3, "fsdp": -1}]:
        try:
            make_mesh(**sizes)
        except ConfigError as e:
            errors.append(str(e))
    shapes = [
        list(make_mesh(**s).shape.values())
        for s in ({}, {"fsdp": -1}, {"data": 2, "fsdp": -1, "tensor": 2}, {"tensor": 4, "data": 2})
    ]
    half = make_mesh(jax.devices()[:4], fsdp=-1)
    return {"errors": errors, "shapes": shapes, "half": [half.size, row_shards(half)]}


def test_sizes_on_eight_devices():
    got = run_on_devices(8, eight)
    assert got["shapes"] == [[8, 1, 1, 1, 1], [1, 8, 1, 1, 1], [2, 2, 1, 1, 2], [2, 1, 1, 1, 4]]
    assert got["half"] == [4, 4]
    assert len(got["errors"]) == 3
    assert all("8 device" in e and "1, 2, 4, 8" in e for e in got["errors"])
