# SPDX-License-Identifier: Apache-2.0
"""The parts of a layer: weights, norms, the mlp.

`Dense` is the only place that reads a weight matrix. It looks at the leaves it finds, so that what
is added to a tree of parameters (an adapter, a quantized base, several matrices fused into one) is
used without any other code knowing. Parameters stay in their own dtype and are cast where used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import quantization
from jaxrlhf.models.adapters import apply as adapters
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.products import multiply
from jaxrlhf.ops.placement import place

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def apply_base(leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One projection without its adapters: [..., in] to [..., out]."""
    y = quantization.using(leaves, multiply)(x)
    if "bias" in leaves:
        y += leaves["bias"].astype(y.dtype)
    return y


def apply_weights(leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One projection, whatever its leaves are: [..., in] to [..., out]."""
    x = adapters.adapt_input(x, leaves)
    return adapters.adapt(x, apply_base(leaves, x), leaves)


def fuse_weights(parts: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array] | None:
    """Projections of one input side by side as a single one; None where their leaves forbid it."""
    first = parts[0].keys()
    if first - {"kernel", "bias", *quantization.NAMES} or any(
        part.keys() != first for part in parts
    ):
        return None
    return {name: jnp.concatenate([part[name] for part in parts], axis=-1) for name in first}


def declare(module: nn.Module, name: str, init, axes: tuple, shape: tuple, dtype) -> jax.Array:
    """A parameter of `module` with the logical names of its axes."""
    leaf: Any = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype)
    )
    return leaf


def found_leaves(module: nn.Module, names: Sequence[str]) -> dict[str, jax.Array]:
    """Those of a module's leaves that a fresh model has not: found, never declared."""
    return {
        name: module.get_variable("params", name)
        for name in names
        if module.has_variable("params", name)
    }


class Dense(nn.Module):
    """A projection [..., in] to [..., features].

    Attributes:
        axes: logical names of the kernel's two dimensions.
        scale: the kernel starts normal with standard deviation scale / sqrt(in).
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False
    scale: float = 1.0
    param_dtype: str = "float32"

    @nn.compact
    def weights(self, inputs: int) -> dict[str, jax.Array]:
        """The leaves of this projection, declared on `inputs` features."""
        init = nn.initializers.normal(self.scale / np.sqrt(inputs))
        shape, dtype = (inputs, self.features), self.param_dtype
        leaves = found_leaves(self, quantization.NAMES)
        if not leaves:
            leaves = {"kernel": declare(self, "kernel", init, self.axes, shape, dtype)}
        if self.use_bias:
            zeros = nn.initializers.zeros
            leaves["bias"] = declare(self, "bias", zeros, self.axes[1:], shape[1:], dtype)
        return leaves | found_leaves(self, adapters.NAMES)

    def __call__(self, x: jax.Array) -> jax.Array:
        return apply_weights(self.weights(x.shape[-1]), x)


def project(x: jax.Array, parts: Sequence[Dense], fuse: bool) -> list[jax.Array]:
    """Several projections of the same x: their bases as one product if `fuse` and their leaves
    allow, then each with its own adapters, so that an adapter of zeros changes no bit."""
    each = [part.weights(x.shape[-1]) for part in parts]
    each = [adapters.borrow(leaves, each[0]) for leaves in each]
    if fuse and len(parts) > 1 and not any("ia3_in" in leaves for leaves in each):
        bare = [{k: v for k, v in part.items() if k not in adapters.NAMES} for part in each]
        leaves = fuse_weights(bare)
        if leaves is not None:
            ends = np.cumsum([part.features for part in parts])[:-1]
            outputs = jnp.split(apply_base(leaves, x), ends, axis=-1)
            return [adapters.adapt(x, y, own) for y, own in zip(outputs, each, strict=True)]
    return [apply_weights(leaves, x) for leaves in each]


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis; statistics in float32.

    Attributes:
        axis: logical name of that axis.
    """

    config: ModelConfig
    param_dtype: str = "float32"
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def vector(name, init):
            shape = (x.shape[-1],)
            return declare(self, name, init, (self.axis,), shape, self.param_dtype).astype(y.dtype)

        c = self.config
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if c.norm == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + c.norm_eps)
        if c.norm_offset:
            y *= 1 + vector("scale", nn.initializers.zeros)
        else:
            y *= vector("scale", nn.initializers.ones)
        if c.norm == "layer":
            y += vector("bias", nn.initializers.zeros)
        return y.astype(x.dtype)


class Embedding(nn.Module):
    """Rows of a table [rows, features], in `dtype`; an index outside the table gives NaN.

    NaN rather than the nearest row: a tokenizer that does not belong to the model must not train.
    """

    rows: int
    features: int
    axes: tuple[str | None, str]
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, index: jax.Array) -> jax.Array:
        # Unit logits where the head is this table: small models learn to copy many times sooner
        # than from 0.02, whose logits say nothing at first.
        shape, init = (self.rows, self.features), nn.initializers.normal(self.features**-0.5)
        table = declare(self, "embedding", init, self.axes, shape, self.param_dtype)
        index = jnp.where(index < 0, self.rows, index)  # negative ones would wrap around
        names = ("visit_batch", "length")[: index.ndim]
        # Every device looks up its own features of all rows: the table does not move, and neither
        # does its gradient. Afterwards each row's features come together.
        found = jnp.take(table, place(index, *names), axis=0, mode="fill").astype(self.dtype)
        return place(found, *names, "visit_embed")


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    config: ModelConfig
    runtime: Runtime

    def setup(self):
        c, dtype = self.config, self.runtime.param_dtype
        wide = {"axes": ("embed", "mlp"), "use_bias": c.mlp_bias, "param_dtype": dtype}
        if c.gated_mlp:
            self.gate = Dense(c.mlp_dim, **wide)
            self.gate_up = Dense(2 * c.mlp_dim, **wide)  # the two of them fused, for decoding
        self.up = Dense(c.mlp_dim, **wide)
        self.down = Dense(
            c.hidden_size,
            axes=("mlp", "embed"),
            use_bias=c.mlp_bias,
            scale=(2 * c.num_layers) ** -0.5,
            param_dtype=dtype,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.config.activation]
        if not self.config.gated_mlp:
            hidden = act(self.up(x))
        else:
            if self.has_variable("params", "gate_up"):
                gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            else:
                gate, up = project(x, (self.gate, self.up), self.runtime.fuse)
            hidden = act(gate) * up
        whole_rows = hidden.ndim == 3
        return self.down((constrain if whole_rows else visiting)(hidden, "act_mlp"))


def constrain(x: jax.Array, *last: str | None) -> jax.Array:
    """States the logical axes of an activation [B, (T,) ...]; `last` names those after B and T.

    Does nothing outside of a mesh with rules (parallel.mesh.use_mesh). A dimension that its mesh
    axes do not divide (one row of a decode, two kv heads on four devices) is left unconstrained.
    """
    return place(x, *("batch", "length")[: x.ndim - len(last)], *last)


def visiting(x: jax.Array, *last: str | None) -> jax.Array:
    """As `constrain` for one token a row [B, ...]: rows go to the weights, which do not move."""
    return place(x, "visit_batch", *last)
