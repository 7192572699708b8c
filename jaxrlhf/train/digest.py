# SPDX-License-Identifier: Apache-2.0
"""The content digest: one name for what the arrays of a tree say, wherever they live."""

import hashlib
from typing import Any

import jax
import numpy as np

from jaxrlhf.parallel.distributed import to_host
from jaxrlhf.parallel.rules import path_keys


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, sorted by path; a path is its keys joined by slashes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sorted((("/".join(path_keys(path)), leaf) for path, leaf in leaves), key=lambda x: x[0])


def content_digest(tree: Any) -> str:
    """SHA-256 over the sorted (path, dtype, shape, bytes) of all leaves, in hexadecimal.

    The same for host and device arrays, for every sharding and container type; different for any
    other dtype, shape, name or bit (-0.0 is not 0.0). Copies one leaf at a time to the host. Where
    arrays are spread over processes, all of them must call.
    """
    total = hashlib.sha256()
    for path, leaf in named_leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        x = np.ascontiguousarray(to_host(leaf))
        shape = np.shape(leaf)  # ascontiguousarray makes a scalar [1]
        total.update(f"{path}\0{x.dtype.name}\0{','.join(map(str, shape))}\0".encode())
        total.update(x.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
