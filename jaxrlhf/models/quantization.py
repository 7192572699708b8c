# SPDX-License-Identifier: Apache-2.0
"""Kernels stored in four or eight bits, and the one function that reads a kernel however stored.

    kernel [in,out]                        as it is
    kernel_int8 [in,out]                   int8; one scale a column
    kernel_int4, kernel_nf4 [in/2,out]     uint8: rows 2i (low four bits) and 2i + 1 of a column
    kernel_scale [blocks,out]              float32; a block is 64 inputs (the last may be shorter)

Layers, and experts, stand before these dimensions as they do before a kernel's. Encoding runs on
the host, in NumPy, so that the bits depend on no accelerator; decoding is part of the programs.
qwix intercepts the operations of flax modules and boxes their parameters, and keeps NF4 in uint4,
a byte each on CPU and GPU, none of which fits plain dicts of stacked arrays; hence our own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]

FORMATS = ("nf4", "int8", "int4")
SCALE = "kernel_scale"
NAMES = (*(f"kernel_{name}" for name in FORMATS), SCALE)
BLOCK = 64  # inputs that share a scale in four bits, as in QLoRA

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
# Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def format_of(leaves: Mapping[str, Any]) -> str | None:
    """How a projection's kernel is stored: one of FORMATS; None = as it is."""
    return next((name for name in FORMATS if f"kernel_{name}" in leaves), None)


def has_kernel(leaves: Mapping[str, Any]) -> bool:
    """Whether a dict of leaves is a projection's."""
    return "kernel" in leaves or format_of(leaves) is not None


def format_in(tree: Any) -> str | None:
    """How the kernels in a tree of nested dicts are stored: one of FORMATS; None = as they are."""
    if not isinstance(tree, Mapping):
        return None
    return format_of(tree) or next(filter(None, map(format_in, tree.values())), None)


def is_quantized(tree: Any) -> bool:
    """Whether any kernel in a tree of nested dicts is stored in few bits."""
    return format_in(tree) is not None


def is_projection(path: tuple[str, ...]) -> bool:
    """Whether a leaf is one of those that `quantize` is about: kernels of projections in layers.

    Not embeddings, norms, biases, heads, or routers, whose small differences pick experts.
    """
    return path[0] == "layers" and path[-1] == "kernel" and "router" not in path


def can_quantize(path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """The same, but for a kernel of an odd number of inputs, which no real model has."""
    return is_projection(path) and shape[-2] % 2 == 0


def stored(shape: tuple[int, ...], name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that a kernel [..., in, out] is stored in, as shapes."""
    *lead, inputs, out = shape
    rows, blocks, dtype = inputs // 2, -(-inputs // BLOCK), np.uint8
    if name == "int8":
        rows, blocks, dtype = inputs, 1, np.int8
    return {
        f"kernel_{name}": jax.ShapeDtypeStruct((*lead, rows, out), dtype),
        SCALE: jax.ShapeDtypeStruct((*lead, blocks, out), np.float32),
    }


# --------------------------------------------------------------------------------------- encoding


def encode(kernel: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """One kernel [in, out] in one of FORMATS: round to nearest, scaled by the largest of a block.

    int8: w = s q with s = max|w| / 127 of its column, q in [-127, 127]. int4: s = max|w| / 7 of its
    block, q in [-7, 7], kept as q + 8. nf4: s = max|w|, and the nearest of the 16 values of NF4.
    """
    wide = kernel.astype(np.float32)
    if name == "int8":
        codes, scale = _integers(wide, np.abs(wide).max(0, keepdims=True), 127)
        return {"kernel_int8": codes.astype(np.int8), SCALE: scale}
    starts = np.arange(0, len(wide), BLOCK)
    largest = np.maximum.reduceat(np.abs(wide), starts, axis=0)
    if name == "int4":
        codes, scale = _integers(wide, largest, 7)
        codes = (codes + 8).astype(np.uint8)
    else:
        scale = largest
        ratio = wide / _safe(_spread(largest, len(wide)))
        codes = np.zeros(wide.shape, np.uint8)
        for bound in (NF4[1:].astype(np.float64) + NF4[:-1]) / 2:
            codes += ratio > np.float32(bound)
    return {f"kernel_{name}": codes[0::2] | codes[1::2] << 4, SCALE: scale}


def _safe(largest: np.ndarray) -> np.ndarray:
    """A block of zeros is divided by one."""
    return np.where(largest == 0, np.float32(1), largest)


def _spread(scale: Any, inputs: int) -> Any:
    """[..., blocks, out] scales to one of each input, [..., inputs, out]; or [..., 1, out]."""
    if scale.shape[-2] == 1:
        return scale
    repeat = np.repeat if isinstance(scale, np.ndarray) else jnp.repeat
    return repeat(scale, BLOCK, axis=-2)[..., :inputs, :]


def _integers(wide: np.ndarray, largest: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    scale = largest / np.float32(top)
    codes = np.rint(wide / _safe(_spread(scale, len(wide))))
    return np.clip(codes, -top, top), scale


def encode_stacked(read: Callable[[tuple[int, ...]], np.ndarray], lead: tuple[int, ...], name: str):
    """Kernels [*lead, in, out] one at a time: `read` gives the one [in, out] at an index."""
    found: dict[str, np.ndarray] = {}
    for at in np.ndindex(*lead):
        for leaf, value in encode(read(at), name).items():
            if leaf not in found:
                found[leaf] = np.empty((*lead, *value.shape), value.dtype)
            found[leaf][at] = value
    return found


def quantize(params: Params, name: str) -> Params:
    """A model's tree (of arrays, or of shapes) with the kernels of its layers in one of FORMATS."""

    def walk(tree: Params, path: tuple[str, ...]) -> Params:
        found: Params = {}
        for key, value in tree.items():
            here = (*path, key)
            if isinstance(value, dict):
                found[key] = walk(value, here)
            elif not can_quantize(here, value.shape):
                found[key] = value
            elif isinstance(value, jax.ShapeDtypeStruct):
                found |= stored(value.shape, name)
            else:
                one = lambda at, value=value: np.asarray(value[at])  # noqa: E731
                encoded = encode_stacked(one, value.shape[:-2], name)
                found |= {leaf: jnp.asarray(x) for leaf, x in encoded.items()}
        return found

    return walk(params, ())


# --------------------------------------------------------------------------------------- decoding


def dense_kernel(leaves: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """The kernel [..., in, out] of a projection in `dtype`, however it is stored.

    What is stored in few bits is multiplied out in float32 and rounded once.
    """
    name = format_of(leaves)
    if name is None:
        return leaves["kernel"].astype(dtype)
    codes, scale = leaves[f"kernel_{name}"], leaves[SCALE]
    if name != "int8":
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)
        codes = pairs.reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
    if name == "nf4":
        values = jnp.take(jnp.asarray(NF4), codes, mode="clip")  # none is outside; fills nothing
    else:
        values = codes.astype(jnp.float32) - (8 if name == "int4" else 0)
    return (values * _spread(scale, values.shape[-2])).astype(dtype)


def using(leaves: Mapping[str, jax.Array], product: Callable[[jax.Array, jax.Array], jax.Array]):
    """`product(x, kernel)` as a function of x, for a kernel however it is stored.

    A kernel in few bits is decoded again for the backward pass: kept from the forward pass, all
    layers together would be the very matrix that quantizing saves.
    """

    def apply(x: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        return product(x, dense_kernel(own, x.dtype))

    own = {name: leaves[name] for name in ("kernel", *NAMES) if name in leaves}
    wrapped = apply if format_of(leaves) is None else jax.checkpoint(apply)
    return lambda x: wrapped(x, own)


def dequantize(params: Params) -> Params:
    """The tree with plain kernels: float32 where they were stored in few bits."""
    found = {
        key: dequantize(value) if isinstance(value, dict) else value
        for key, value in params.items()
        if key not in NAMES
    }
    return found | ({"kernel": dense_kernel(params, jnp.float32)} if format_of(params) else {})


def cast(params: Params, dtype: Any) -> Params:
    """The tree in another dtype; what is stored in few bits, and its scales, stay as they are."""
    return {
        key: cast(value, dtype)
        if isinstance(value, dict)
        else value
        if key in NAMES
        else value.astype(jnp.dtype(dtype))
        for key, value in params.items()
    }


def numbers(name: str, leaf: Any) -> int:
    """How many of a model's parameters a leaf of this name holds."""
    if name == SCALE:
        return 0
    each = 2 if name in ("kernel_nf4", "kernel_int4") else 1
    return each * int(np.prod(leaf.shape))


def axes_of_stored(kernel: tuple, name: str) -> dict[str, tuple]:
    """Logical axes of the leaves in which a kernel with these axes is stored: its own."""
    return {f"kernel_{name}": kernel, SCALE: kernel}
