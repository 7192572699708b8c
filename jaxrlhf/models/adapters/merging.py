# SPDX-License-Identifier: Apache-2.0
"""Adapters into their base and out of it: params -> params.

A merged kernel is computed in float32 and rounded once to the kernel's own dtype; a merged model's
logits equal those of base and adapter up to that rounding. Whoever keeps the base need not unmerge:
`trees.split` gives it back bit for bit, where `unmerge` is off by the rounding of both ways.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models.adapters.apply import NAMES, SHARES, borrow, column_norms
from jaxrlhf.models.quantization import NAMES as STORED
from jaxrlhf.models.quantization import SCALE, dense_kernel, format_of, has_kernel

Params = dict[str, Any]
HIGHEST = jax.lax.Precision.HIGHEST


def has_adapters(tree: Any) -> bool:
    """Whether an adapter's leaf is anywhere in a tree of nested dicts."""
    if not isinstance(tree, dict):
        return False
    return any(key in NAMES or has_adapters(value) for key, value in tree.items())


def _added(leaves: Params) -> jax.Array:
    """scale A B, float32 [..., in, out]; experts share the scale."""
    a, b = leaves["lora_a"].astype(jnp.float32), leaves["lora_b"].astype(jnp.float32)
    scale = leaves["lora_scale"].astype(jnp.float32)
    scale = scale.reshape(*scale.shape, *(1,) * (a.ndim - scale.ndim))
    return scale * jnp.matmul(a, b, precision=HIGHEST)


def _merged(leaves: Params) -> Params:
    wide = dense_kernel(leaves, jnp.float32)
    dtype = leaves["kernel" if "kernel" in leaves else SCALE].dtype
    bias = leaves.get("bias")
    if "lora_b" in leaves:
        if "dora_m" in leaves:
            gain = leaves["dora_m"].astype(jnp.float32) / column_norms(leaves)
            wide = (wide + _added(leaves)) * gain[..., None, :]
        else:
            wide = wide + _added(leaves)
    if "ia3_in" in leaves:
        wide = wide * leaves["ia3_in"].astype(jnp.float32)[..., :, None]
    if "ia3_out" in leaves:
        out = leaves["ia3_out"].astype(jnp.float32)
        wide = wide * out[..., None, :]
        bias = None if bias is None else (bias.astype(jnp.float32) * out).astype(bias.dtype)
    return {"kernel": wide.astype(dtype)} | ({} if bias is None else {"bias": bias})


def _unmerged(leaves: Params) -> Params:
    kernel = leaves["kernel"]
    wide = kernel.astype(jnp.float32)
    bias = leaves.get("bias")
    if "ia3_out" in leaves:
        out = leaves["ia3_out"].astype(jnp.float32)
        wide = wide / out[..., None, :]
        bias = None if bias is None else (bias.astype(jnp.float32) / out).astype(bias.dtype)
    if "ia3_in" in leaves:
        wide = wide / leaves["ia3_in"].astype(jnp.float32)[..., :, None]
    if "dora_m" in leaves:
        raise ValueError("DoRA's norms are those of the base: keep the base instead of unmerging")
    if "lora_b" in leaves:
        wide = wide - _added(leaves)
    return {"kernel": wide.astype(kernel.dtype)} | ({} if bias is None else {"bias": bias})


def _walk(tree: Any, change: Callable[[Params], Params], quantized: bool = True) -> Any:
    if not has_adapters(tree):
        return tree
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and has_kernel(value) and has_adapters(value):
            if not quantized and format_of(value):
                found[key] = value
                continue
            value = borrow(value, tree.get(SHARES.get(key, ""), {}))
            gone = (*NAMES, *STORED)
            kept = {name: leaf for name, leaf in value.items() if name not in gone}
            found[key] = kept | change(value)
        else:
            found[key] = _walk(value, change, quantized)
    return found


def merge(params: Params, *, quantized: bool = True) -> Params:
    """The base's own tree with every adapter added into it; a tree without adapters unchanged.

    A kernel stored in few bits becomes a plain one in float32, or, unless `quantized`, stays as it
    is with its adapter beside it.
    """
    return _walk(params, _merged, quantized)


def unmerge(merged: Params, adapter: Params) -> Params:
    """The base again, of a merged tree and the leaves that were merged into it, up to rounding.

    Raises:
        ValueError: the adapter is a DoRA, which cannot be taken out.
    """

    def beside(tree: Params, leaves: Params) -> Params:
        return {
            key: beside(value, leaves[key])
            if isinstance(value, dict) and isinstance(leaves.get(key), dict)
            else value
            for key, value in tree.items()
        } | {key: value for key, value in leaves.items() if key in NAMES}

    return _walk(beside(merged, adapter), _unmerged)
