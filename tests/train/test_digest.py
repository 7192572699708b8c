# SPDX-License-Identifier: Apache-2.0
"""The content digest: equal where content is, different at the least change."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import FrozenDict

from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.optim import make_optimizer
from jaxrlhf.train.state import init_state
from jaxrlhf.train.step import make_train_step


def test_it_is_what_its_definition_says():
    tree = {"b": np.float32([[1, 2]]), "a": {"x": np.int32(7)}}
    text = b"a/x\0int32\0\0" + np.int32(7).tobytes()
    text += b"b\0float32\x001,2\0" + np.float32([1, 2]).tobytes()
    assert content_digest(tree) == hashlib.sha256(text).hexdigest()


def test_containers_devices_and_memory_order_do_not_matter():
    params = toy.params()
    want = content_digest(params)
    assert content_digest(jax.device_get(params)) == want
    assert content_digest(dict(reversed(params.items()))) == want
    assert content_digest(FrozenDict(params)) == want
    fortran = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), params)
    assert content_digest(fortran) == want


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.float32([0.0, -0.0])},  # the sign of zero
        {"x": np.float32([[0.0, 0.0]])},
        {"x": np.float64([0.0, 0.0])},
        {"x": np.int32([0, 0])},
        {"y": np.float32([0.0, 0.0])},
        {"x": {"x": np.float32([0.0, 0.0])}},
        {"x": np.float32([0.0, np.nextafter(np.float32(0), np.float32(1))])},
        {"x": np.float32([0.0, 0.0]), "z": np.float32([])},
    ],
)
def test_the_least_change_changes_it(other):
    assert content_digest(other) != content_digest({"x": np.float32([0.0, 0.0])})


def test_every_dtype_and_keys_have_one():
    dtypes = ["bfloat16", "float16", "bool", "int8", "uint32"]
    trees = [{"x": jnp.zeros(3, d)} for d in dtypes] + [{"x": jax.random.key(0)}]
    assert len({content_digest(t) for t in trees}) == len(trees)


def test_a_reference_keeps_its_digest_for_a_whole_run_of_donating_steps():
    tx, _ = make_optimizer("adamw", 1e-2)
    reference = {"shift": jnp.full((16,), 0.5), "copy": toy.params(5)}
    before = content_digest(reference)
    step = jax.jit(make_train_step(toy.loss_fn, tx, accum=2), donate_argnums=0)
    state = init_state(toy.params(), tx)
    first = content_digest(state.params)
    for i in range(20):
        state, _ = step(state, reference, toy.batch(i), jax.random.key(0), 1e-2)
    assert content_digest(reference) == before
    assert content_digest(state.params) != first
