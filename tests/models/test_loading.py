# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to devices: the right numbers in every sharding, and nothing read twice."""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_in_processes, run_on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from model_rows import assert_same_bits

from jaxrlhf.models import filling, weights
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.tensor_files import DTYPES, TensorFiles, not_finite
from jaxrlhf.models.transformer import abstract_params, init_params, logical_axes
from jaxrlhf.models.weights import load_hf, save_hf
from jaxrlhf.parallel import distributed
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import path_keys, shardings

ORACLES = Path(__file__).resolve().parents[1] / "oracles" / "models"
# Stacked and single, transposed or not, several leaves in a tensor side by side or by heads,
# experts.
FOLDERS = ("llama", "gpt2", "phi3", "gpt-neox", "mixtral")
MESHES = ({"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 4})


class Counted:
    """Bytes that go through TensorFiles.read while it is entered, by tensor and part."""

    def __enter__(self):
        self.parts: list[tuple] = []
        self.sizes: list[int] = []
        self.before = TensorFiles.read
        counted = self

        def read(files, name, index=()):
            part = counted.before(files, name, index)
            counted.parts.append((name, str(index)))
            counted.sizes.append(part.nbytes)
            return part

        TensorFiles.read = read
        return self

    def __exit__(self, *_):
        TensorFiles.read = self.before


def host(tree):
    return jax.tree.map(np.asarray, tree)


# ---------------------------------------------------------------------------------- any part of it


@pytest.fixture(scope="module")
def leaves():
    """{folder: [(source, the whole leaf)]}"""
    found = {}
    for name in FOLDERS:
        held = {}

        def keep(sources, where, held=held):
            held |= sources
            return filling.make_arrays(sources, where)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "make_arrays", keep)
            patch.setattr(TensorFiles, "close", lambda self: None)
            tree = load_hf(ORACLES / name).params
        whole = {
            "/".join(path_keys(path)): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert held.keys() == whole.keys()
        found[name] = [(source, whole[path]) for path, source in held.items()]
    return found


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_part_of_a_leaf_is_that_part_of_the_whole(leaves, data):
    name = data.draw(st.sampled_from(FOLDERS))
    source, whole = leaves[name][data.draw(st.integers(0, len(leaves[name]) - 1))]
    bounds = []
    for size in source.shape:
        start = data.draw(st.integers(0, size - 1))
        bounds.append((start, data.draw(st.integers(start + 1, size))))
    dtype = data.draw(st.sampled_from([np.float32, np.float64, jnp.bfloat16, np.float16]))
    memory = np.full([stop - start for start, stop in bounds], 7, dtype)
    with Counted() as counted:
        for numbers in source.numbers():
            filling._write(source, numbers, [(tuple(bounds), memory)])
    want = whole[tuple(slice(*bound) for bound in bounds)].astype(dtype)
    assert_same_bits(memory, want)
    # Those tensors alone, one at a time, and of each that part alone (or its heads' neighbours).
    sizes = [stop - start for start, stop in bounds]
    assert len(counted.sizes) == math.prod(sizes[: source.lead])
    if name != "gpt-neox":
        assert set(counted.sizes) == {math.prod(sizes[source.lead :]) * whole.dtype.itemsize}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_values_are_copied_turned_and_converted_as_numpy_does(data):
    stored = data.draw(st.sampled_from(sorted(DTYPES)))
    to = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = (data.draw(st.integers(1, 200)), data.draw(st.integers(1, 70)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.standard_normal(shape).astype(DTYPES[stored])
    values[0, 0] = DTYPES[stored].type(-0.0)
    for each in (values, values.T, values[::2], values[:, 1:].T, values[0], values.T[0]):
        place = np.empty(each.shape, DTYPES[to])
        filling.copy_into(place, each)
        assert_same_bits(place, each.astype(DTYPES[to]))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_number_that_is_not_finite_is_counted(name):
    dtype = DTYPES[name]
    values = np.zeros((300, 301), dtype)
    limits = jnp.finfo(dtype)
    values[0, :4] = limits.max, limits.min, limits.smallest_subnormal, -0.0
    assert not_finite(values) == not_finite(values[:0]) == 0
    values[7, 3], values[250, 300], values[299, 0] = np.nan, np.inf, -np.inf
    values.view(f"u{dtype.itemsize}")[100, 100] = 2 ** (8 * dtype.itemsize) - 1  # another NaN
    assert not_finite(values) == not_finite(values.T) == 4
    assert not_finite(values[5:250, 2:7]) == 1
    assert not_finite(values[299, 0]) == 1


# ---------------------------------------------------------------------------------- every sharding

# Every dimension divides by 8, and a vocabulary that is the largest tensor.
WIDE = ModelConfig(
    family="mixtral",
    vocab_size=64,
    hidden_size=16,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    mlp_dim=32,
    num_experts=4,
    experts_per_token=2,
    tie_embeddings=False,
)


def write_wide(folder) -> None:
    tree = jax.jit(lambda key: init_params(key, WIDE))(jax.random.key(0))
    save_hf(folder, tree, WIDE, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 3


def held_here(array: jax.Array) -> int:
    """Bytes of the parts of an array that this process has, each once."""
    parts = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
    return sum(parts.values())


def load_everywhere(folder: str) -> None:
    """On every mesh of 8, both ways of filling on one: the same bits, in the sharding asked for."""
    whole = host(load_hf(folder).params)
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        where = shardings(logical_axes(WIDE), abstract_params(WIDE), mesh)[0]
        for in_place in (True, False) if sizes == MESHES[1] else (True,):
            with pytest.MonkeyPatch.context() as patch, Counted() as counted:
                patch.setattr(
                    weights,
                    "make_arrays",
                    lambda s, w, in_place=in_place: filling.make_arrays(s, w, in_place=in_place),
                )
                tree = load_hf(folder, shardings=where).params
            assert jax.tree.map(lambda x: x.sharding, tree) == where, (sizes, in_place)
            assert_same_bits(host(tree), whole)
            for leaf in jax.tree.leaves(tree):
                for shard in leaf.addressable_shards:
                    assert_same_bits(np.asarray(shard.data), np.asarray(leaf)[shard.index])
            assert len(set(counted.parts)) == len(counted.parts)
            assert sum(counted.sizes) == sum(map(held_here, jax.tree.leaves(tree)))
            assert max(counted.sizes) <= WIDE.vocab_size * WIDE.hidden_size * 4
    # The buffers are the runtime's own: a step that donates them works in place.
    leaf = load_hf(folder, shardings=where).params["embed"]["embedding"]
    here = [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(leaf)
    assert leaf.is_deleted()
    assert here == [shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards]


def test_all_meshes_hold_the_same_bits(tmp_path):
    write_wide(tmp_path)
    run_on_devices(8, load_everywhere, folder=str(tmp_path))


def read_own_part(folder: str) -> list[list[int]]:
    distributed.initialize()
    return [read_one_way(folder, in_place) for in_place in (True, False)]


def read_one_way(folder: str, in_place: bool) -> list[int]:
    mesh = make_mesh(fsdp=4)
    where = shardings(logical_axes(WIDE), abstract_params(WIDE), mesh)[0]
    with pytest.MonkeyPatch.context() as patch, Counted() as counted:
        make = filling.make_arrays
        patch.setattr(weights, "make_arrays", lambda s, w: make(s, w, in_place=in_place))
        tree = load_hf(folder, shardings=where).params
    want = load_hf(folder).params
    for leaf, whole in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True):
        for shard in leaf.addressable_shards:
            assert_same_bits(np.asarray(shard.data), np.asarray(whole)[shard.index])
    bytes_of_all = sum(leaf.nbytes for leaf in jax.tree.leaves(want))
    mine = sum(map(held_here, jax.tree.leaves(tree)))
    return [sum(counted.sizes), mine, bytes_of_all]


def test_each_process_reads_only_the_bytes_of_its_shards(tmp_path):
    write_wide(tmp_path)
    found = run_in_processes(2, read_own_part, devices=2, folder=str(tmp_path))
    for one in zip(*found, strict=True):
        for read, mine, whole in one:
            assert read == mine
            assert mine < 0.52 * whole
        assert sum(mine for _, mine, _ in one) >= one[0][2]


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_alone_it_is_streamed_the_same(name, monkeypatch):
    want = load_hf(ORACLES / name, dtype="bfloat16").params
    make = filling.make_arrays
    monkeypatch.setattr(weights, "make_arrays", lambda s, w: make(s, w, in_place=False))
    assert_same_bits(load_hf(ORACLES / name, dtype="bfloat16").params, want)


def test_a_sharding_without_a_mesh_is_refused_where_it_cannot_be_streamed():
    source = filling.Source((2, 2), np.dtype(np.float32), 0, lambda n, b: None, print, False)

    class Strange:
        device_set = frozenset({1, 2})

    with pytest.raises(TypeError, match="need a NamedSharding"):
        filling.make_arrays({"a": source}, {"a": Strange()}, in_place=False)


def test_an_error_in_one_tensor_ends_the_others():
    done = []

    def job(number):
        if number == 3:
            raise ValueError("third")
        time.sleep(0.005)  # whoever waits for the first error has time to hear of it
        done.append(number)

    with pytest.raises(ValueError, match="third"):
        filling._run([lambda n=n: job(n) for n in range(200)])
    assert {0, 1, 2} <= set(done)
    assert len(done) < 100
