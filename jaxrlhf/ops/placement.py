# SPDX-License-Identifier: Apache-2.0
"""Where the parts of an array live, said by the names of its axes.

Rows of a batch are split over the mesh, and so are weights, over the same devices. One of the two
has to move. For most matrices that is the weight: a layer's is gathered, used and dropped. But the
vocabulary's matrices are the largest arrays of all, and in decoding a whole layer is used for one
token a row; there the weights stay where they are and the activations visit them. The names that
begin with `visit_` say so; what each name means on a mesh stands in parallel/rules.py.
"""

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd as nn_spmd
from jax.sharding import PartitionSpec

from jaxrlhf.types import Array

# Padding the last shard is cheaper than a copy of the vocabulary on every device.
UNEVEN = "visit_vocab"


def on_mesh() -> bool:
    """Whether a mesh with more than one device, and rules for it, are current."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and bool(nn.get_logical_axis_rules())


def place(x: Array, *names: str | None) -> Array:
    """States the logical axis of every dimension of `x`; None leaves one whole on each device.

    Does nothing outside of a mesh with rules (parallel.rules.use_mesh). A dimension that its mesh
    axes do not divide (one row of a decode, two kv heads on four devices) is left whole.
    """
    if not on_mesh():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn_spmd.logical_to_mesh_axes(names) or ()
    fits = []
    for name, size, axes in zip(names, x.shape, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes
        shards = int(np.prod([mesh.shape[axis] for axis in axes])) if axes else 1
        fits.append(axes if axes and (size % shards == 0 or name == UNEVEN) else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits))
