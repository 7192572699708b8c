# SPDX-License-Identifier: Apache-2.0
"""A mixture of mlps: each token goes to the few experts that a router picks for it.

Dropless: every token reaches all of its experts, however many others do, so what is computed for a
row never depends on the rows beside it. Tokens are sorted by expert and multiplied group by group
(`jax.lax.ragged_dot`).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import quantization
from jaxrlhf.models.adapters import apply as adapters
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.layers import ACTIVATIONS, Dense, declare, found_leaves


class Routing(NamedTuple):
    """What a router did, summed over tokens: what the load-balancing loss is made of.

    Attributes:
        chosen: float32 [..., E], how many tokens each expert was given.
        weight: float32 [..., E], the sum of the router's probabilities (softmax over all E).
    """

    chosen: jax.Array
    weight: jax.Array


def balance_loss(routing: Routing, tokens: jax.Array) -> jax.Array:
    """E sum_e f_e P_e over all layers: at its least, experts_per_token, when experts share equally.

    f_e is the share of tokens given to expert e, P_e its mean probability. Source: Fedus et al.
    2021, arXiv:2101.03961, equations 4 to 6, for several experts a token as transformers has it.

    Args:
        routing: [L, E] each. `tokens`: how many tokens one layer saw.
    """
    layers, experts = routing.chosen.shape
    total = tokens.astype(jnp.float32) * layers
    share = jax.lax.stop_gradient(routing.chosen.sum(0)) / total
    return experts * jnp.sum(share * routing.weight.sum(0) / total)


def multiply_groups(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [n, in], the first sizes[0] rows by kernels [E, in, out] of expert 0, and so on; in x's
    dtype, accumulated in float32 at least."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.ragged_dot(x, kernels.astype(x.dtype), sizes, preferred_element_type=accumulate)
    return y.astype(x.dtype)


class Grouped(nn.Module):
    """One projection for each expert, and what is added to it: rows sorted by expert, [n, in] to
    [n, features].

    Attributes:
        axes: logical names of the kernel's last two dimensions; the first is "experts".
        scale: kernels start normal with standard deviation scale / sqrt(in).
    """

    experts: int
    features: int
    axes: tuple[str, str]
    scale: float = 1.0
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, sizes: jax.Array, first: dict[str, jax.Array] | None = None
    ) -> jax.Array:
        """first: the leaves of the projection that this one shares its A with."""
        init = nn.initializers.normal(self.scale / np.sqrt(x.shape[-1]))
        shape = (self.experts, x.shape[-1], self.features)
        leaves = found_leaves(self, quantization.NAMES)
        if not leaves:
            axes = ("experts", *self.axes)
            leaves = {"kernel": declare(self, "kernel", init, axes, shape, self.param_dtype)}
        y = quantization.using(leaves, lambda x, kernel: multiply_groups(x, kernel, sizes))(x)
        own = found_leaves(self, adapters.NAMES)
        if "lora_b" not in own:
            return y
        own = adapters.borrow(own, first or {})
        added = multiply_groups(multiply_groups(x, own["lora_a"], sizes), own["lora_b"], sizes)
        return y + added * own["lora_scale"].astype(y.dtype)


class Experts(nn.Module):
    """Sum over a token's experts of weight x down(act(gate x) * up x).

    Source: Shazeer et al. 2017, arXiv:1701.06538; softmax first, then the top k, as Mixtral and
    Qwen3 have it.
    """

    config: ModelConfig
    runtime: Runtime

    def setup(self):
        c, dtype = self.config, self.runtime.param_dtype
        self.router = Dense(c.num_experts, ("embed", None), param_dtype=dtype)
        wide = {"axes": ("embed", "mlp"), "param_dtype": dtype}
        self.gate = Grouped(c.num_experts, c.mlp_dim, **wide)
        self.up = Grouped(c.num_experts, c.mlp_dim, **wide)
        scale = (2 * c.num_layers) ** -0.5
        self.down = Grouped(c.num_experts, c.hidden_size, ("mlp", "embed"), scale, dtype)

    def __call__(self, x: jax.Array, real: jax.Array | None = None):
        """x [..., D] -> (y [..., D], Routing of the tokens where `real` [...], or None)."""
        c = self.config
        tokens = x.reshape(-1, c.hidden_size)
        scores = self.router(tokens).astype(jnp.promote_types(x.dtype, jnp.float32))
        probabilities = jax.nn.softmax(scores, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, c.experts_per_token)  # [n, k]
        if c.renormalize_experts:
            weights /= weights.sum(-1, keepdims=True)

        # Slot s of token t is row k t + s; sorted by expert, and afterwards sorted back.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts)
        rows = tokens[order // c.experts_per_token]
        gate = self.gate(rows, sizes)
        first: Any = self.get_variable("params", "gate")
        hidden = ACTIVATIONS[c.activation](gate) * self.up(rows, sizes, first)
        out = self.down(hidden, sizes)[jnp.argsort(order)]
        out = out.reshape(*weights.shape, c.hidden_size)
        y = jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype)).reshape(x.shape)
        if real is None:
            return y, None
        kept = real.reshape(-1, 1).astype(probabilities.dtype)
        given = jax.nn.one_hot(chosen, c.num_experts, dtype=kept.dtype).sum(1)
        return y, Routing((given * kept).sum(0), (probabilities * kept).sum(0))
