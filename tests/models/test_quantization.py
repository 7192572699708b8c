# SPDX-License-Identifier: Apache-2.0
"""Quantized kernels against float64 NumPy and against themselves multiplied out."""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from jax.extend.core import jaxprs_in_params
from model_rows import CONFIGS, RUNTIME, assert_same_bits, batch, logits, params, random_rows

from jaxrlhf.models.adapters.merging import merge
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve, with_adapter_axes
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.quantization import (
    BLOCK,
    FORMATS,
    NF4,
    cast,
    dense_kernel,
    dequantize,
    encode,
    format_in,
    is_projection,
    quantize,
    stored,
)
from jaxrlhf.models.transformer import (
    count_params,
    decode_step,
    hidden_states,
    logical_axes,
    prefill,
    split_layers,
)
from jaxrlhf.models.weights import load_hf, save_hf
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import shardings

ROWS = batch(random_rows(1, (9, 5)))
SIZES = [(64, 8), (128, 6), (172, 5), (16, 3)]  # whole blocks, a shorter last one, only a short one


def base_of(name):
    return {key: leaf for key, leaf in params(name).items() if key not in ("score", "value")}


def matrix(shape, seed=0):
    """Normal, with a column of zeros, a block of zeros and one very large number."""
    found = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found[:, 1], found[: min(BLOCK, shape[0]), 2], found[0, 0] = 0, 0, 40
    return found


def float64(kernel, name):
    """(values as each format defines them, largest error it can make) of a kernel, in float64."""
    w = kernel.astype(np.float64)
    values, bound = np.zeros_like(w), np.zeros_like(w)
    size = len(w) if name == "int8" else 64
    table = NF4.astype(np.float64)
    for start in range(0, len(w), size):
        rows = slice(start, start + size)
        top = np.abs(w[rows]).max(0)
        for column, largest in enumerate(top):
            if largest == 0:
                continue
            if name == "nf4":
                near = np.abs(w[rows, column, None] / largest - table).argmin(1)
                values[rows, column] = largest * table[near]
                bound[rows, column] = largest * np.diff(table).max() / 2
            else:
                step = largest / (127 if name == "int8" else 7)
                values[rows, column] = np.round(w[rows, column] / step) * step
                bound[rows, column] = step / 2
    return values, bound


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_a_float64_transcription(name, shape):
    kernel = matrix(shape)
    leaves = encode(kernel, name)
    got = np.asarray(dense_kernel(leaves, jnp.float32), np.float64)
    want, bound = float64(kernel, name)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.abs(got - kernel) <= bound * (1 + 1e-6)).all()
    assert (got[:, 1] == 0).all()
    shapes = {key: (leaf.shape, leaf.dtype) for key, leaf in stored(shape, name).items()}
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in leaves.items()} == shapes
    # Rounded once, from float32.
    half = np.asarray(dense_kernel(leaves, jnp.bfloat16))
    assert_same_bits(half, got.astype(np.float32).astype(jnp.bfloat16))


def test_nf4_has_the_quantiles_of_the_normal_distribution():
    """The published construction: 8 quantiles above zero, 7 below, from the offset 0.9677083."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    want = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, want / want.max(), atol=1e-6)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_two_codes_lie_in_a_byte(name):
    """Every one of the codes comes back: those of row 2i from the low half, of 2i + 1 the high."""
    codes = np.random.default_rng(0).integers(0, 16, (BLOCK, 5))
    codes[0] = 15  # the largest, so that the scale is known
    codes = np.maximum(codes, 1) if name == "int4" else codes  # int4 is symmetric: -7 to 7
    kernel = NF4[codes] if name == "nf4" else (codes - 8).astype(np.float32)
    packed = encode(kernel, name)
    assert packed[f"kernel_{name}"].nbytes == codes.size // 2
    np.testing.assert_array_equal(packed[f"kernel_{name}"], codes[0::2] + 16 * codes[1::2])
    np.testing.assert_array_equal(dense_kernel(packed, jnp.float32), kernel)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_projections_within_layers_are_quantized(name):
    base = base_of(name)
    tree, shapes = quantize(base, "nf4"), quantize(jax.eval_shape(lambda: base), "nf4")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    plain = dequantize(tree)
    assert jax.tree.structure(plain) == jax.tree.structure(jax.tree.map(jnp.asarray, base))
    changed = 0
    for path, before in jax.tree_util.tree_leaves_with_path(base):
        after = plain
        for key in path:
            after = after[key.key]
        keys = tuple(key.key for key in path)
        if is_projection(keys):
            changed += 1
            assert np.abs(np.asarray(after) - before).max() > 1e-3, keys
        else:
            assert_same_bits(after, before)
    assert changed == 6 if name == "gpt2" else changed == 7
    assert format_in(tree) == "nf4"
    assert format_in(plain) is None
    assert count_params(tree) == count_params(base)
    half = cast(tree, "bfloat16")
    assert half["final_norm"]["scale"].dtype == jnp.bfloat16
    for leaf in ("kernel_nf4", "kernel_scale"):
        assert_same_bits(*(t["layers"]["attention"]["q"][leaf] for t in (half, tree)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_model_computes_what_its_kernels_say(name):
    """Scanned or unrolled, fused or not: as the same kernels multiplied out beforehand."""
    config = CONFIGS[name]
    tree = quantize(base_of(name), FORMATS[len(name) % 3])
    plain = dequantize(tree)
    for keys in ({}, {"unroll": True, "fuse": False}) if name == "llama" else ({},):
        runtime = dataclasses.replace(RUNTIME, **keys)
        got, want = (logits(t, config, runtime, *ROWS) for t in (tree, plain))
        np.testing.assert_allclose(got, want, atol=1e-6)


def adapted(name, kind="lora", form="nf4"):
    """(adapter, base and adapter, the same with plain kernels); leaves random."""
    adapter = resolve(
        AdapterSpec(kind=kind, **({} if kind == "ia3" else {"rank": 3})), CONFIGS[name]
    )
    base = quantize(base_of(name), form)
    leaves = init_adapter(jax.random.key(0), adapter, base, "float32")
    rng = np.random.default_rng(1)
    own, constants = adapter.split(leaves)
    own = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), own)
    leaves = join(own, constants)
    return adapter, join(leaves, base), join(leaves, dequantize(base))


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "lora"), ("llama", "dora"), ("llama", "ia3")])
def test_merged_it_is_the_multiplied_out_base_merged(name, kind):
    _, whole, plain = adapted(name, kind)
    got, want = merge(whole), merge(plain)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dequantize(got)):
        there = want
        for key in path:
            there = there[key.key]
        np.testing.assert_allclose(leaf, there, rtol=1e-6, atol=1e-7)
    config = CONFIGS[name]
    before, after = (logits(tree, config, RUNTIME, *ROWS) for tree in (whole, got))
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_gradients_of_the_adapter_are_those_on_plain_kernels():
    adapter, whole, plain = adapted("llama")
    config = CONFIGS["llama"]

    @jax.jit
    def gradient(own, frozen):
        def loss(own):
            states = hidden_states(join(own, frozen), config, RUNTIME, *ROWS)
            return jnp.square(states[:, :5]).sum()

        return jax.grad(loss)(own)

    got, want = (gradient(*adapter.split(tree)) for tree in (whole, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        assert scale > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_the_backward_pass_decodes_again_instead_of_keeping_kernels():
    """No scan hands the kernels of all layers, multiplied out, from one pass to the other."""
    adapter, whole, _ = adapted("llama")
    own, frozen = adapter.split(whole)
    config = CONFIGS["llama"]
    runtime = dataclasses.replace(RUNTIME, fuse=False)

    def loss(own):
        return hidden_states(join(own, frozen), config, runtime, *ROWS).sum()

    shapes = {leaf.shape for leaf in jax.tree.leaves(dequantize(whole)["layers"]) if leaf.ndim == 3}
    handed = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                handed.update((v.aval.shape, str(v.aval.dtype)) for v in eqn.outvars)
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(jax.grad(loss))(own).jaxpr)
    trained = {leaf.shape for leaf in jax.tree.leaves(own)}
    assert len(handed) > 10
    assert not [shape for shape, dtype in handed if shape in shapes - trained]


@pytest.mark.slow
def test_decoding_keeps_few_bits_and_is_the_full_forward_pass():
    _, whole, _ = adapted("mixtral", form="int4")
    config = CONFIGS["mixtral"]
    tokens, positions, segments = (jnp.asarray(x) for x in batch(random_rows(4, (7, 7))))
    full = hidden_states(whole, config, RUNTIME, tokens, positions, segments)

    @jax.jit
    def cached(tree):
        tree = split_layers(tree, config, RUNTIME)
        layer = tree["layers"][0]
        assert format_in(layer["attention"]) == "int4"
        assert "kernel" not in layer["attention"]["o"]
        rows = (tokens[:, :6], positions[:, :6], segments[:, :6])
        _, cache = prefill(tree, config, RUNTIME, *rows, 7)
        mask = jnp.ones((2, 7), bool)
        at = (tokens[:, 6], positions[:, 6])
        return decode_step(tree, config, RUNTIME, *at, cache, jnp.int32(6), mask)[0]

    np.testing.assert_allclose(cached(whole), full[:, 6], atol=1e-4)
    base = quantize(base_of("mixtral"), "int4")
    assert "qkv" in split_layers(base, config, RUNTIME)["layers"][0]["attention"]


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_folder_is_quantized_as_it_is_read(name, tmp_path):
    """The same bits as the whole model quantized afterwards, from the stored values."""
    base = jax.tree.map(jnp.asarray, base_of(name))
    save_hf(tmp_path, base, CONFIGS[name])
    loaded = load_hf(tmp_path, quantize="nf4", dtype="bfloat16")
    want = cast(quantize(base, "nf4"), "bfloat16")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(want)
    assert_same_bits(loaded.params, want)


MESHES = {"one": {}, "fsdp": {"fsdp": 8}, "tensor": {"fsdp": 2, "expert": 2, "tensor": 2}}


def on_meshes(name: str, folder: str) -> dict:
    """{mesh: [flat hidden states, kernels of layers that are split over devices]}"""
    config, found = CONFIGS[name], {}
    rows = batch(random_rows(3, (12, 9, 12, 5, 7, 12, 3, 11)))
    for mesh_name, sizes in MESHES.items():
        devices = jax.devices()[:1] if mesh_name == "one" else jax.devices()
        mesh = make_mesh(devices, **sizes)
        shapes = quantize(jax.eval_shape(lambda: base_of(name)), "nf4")
        where, _ = shardings(with_adapter_axes(logical_axes(config), shapes), shapes, mesh)
        tree = load_hf(folder, quantize="nf4", shardings=where).params
        split = sum(
            not leaf.sharding.is_fully_replicated
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree["layers"])
            if path[-1].key == "kernel_nf4"
        )

        def states(tree, tokens, positions, segments):
            hidden = hidden_states(tree, config, RUNTIME, tokens, positions, segments)
            return jnp.where(segments[..., None] > 0, hidden, 0)

        hidden = jit(states, mesh)(tree, *rows)
        found[mesh_name] = [np.asarray(hidden).ravel().tolist(), split]
    return found


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device(tmp_path):
    save_hf(tmp_path, jax.tree.map(jnp.asarray, base_of("mixtral")), CONFIGS["mixtral"])
    found = run_on_devices(8, on_meshes, name="mixtral", folder=str(tmp_path))
    want, _ = found.pop("one")
    assert np.abs(want).max() > 0.1
    for mesh, (got, split) in found.items():
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=mesh)
        assert split == 7, mesh
