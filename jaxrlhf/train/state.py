# SPDX-License-Identifier: Apache-2.0
"""All that moves during training, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf.parallel.rules import state_shardings
from jaxrlhf.types import Params


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds and a train step returns."""

    step: jax.Array  # int32 [], optimizer steps done, the skipped ones included
    params: Params  # what trains
    opt_state: optax.OptState
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)  # "ema", KL controller, ...


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    extra: dict[str, Any] | None = None,
) -> TrainState:
    """A state at step 0. A pure function: jit it, or `jax.eval_shape` it.

    The state takes `params` over: a train step that donates the state frees them. A reference
    policy must be its own copy.

    Args:
        ema: also keep an exponential moving average of the parameters, in fp32, in
            `extra["ema"]`; `make_train_step(ema_decay=...)` moves it.
    """
    extra = dict(extra or {})
    if ema:
        # Really a copy: a buffer shared with `params` could not be donated.
        extra["ema"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra)


def place_state(
    params: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axes: Any,
    *,
    ema: bool = False,
    extra: dict[str, Any] | None = None,
) -> tuple[TrainState, TrainState, list[str]]:
    """A state on the mesh, made where it will live: no device ever holds all of it.

    Args:
        params: arrays (host, or on devices already); taken over by the state.
        axes: the logical axis names of every parameter (`models.transformer.logical_axes`).

    Returns:
        (state, its shardings, the list of dimensions that had to be replicated).
    """

    def make(params: Params, extra: dict[str, Any]) -> TrainState:
        return init_state(params, tx, ema=ema, extra=extra)

    extra = dict(extra or {})
    where, replicated = state_shardings(axes, jax.eval_shape(make, params, extra), mesh)
    params = jax.device_put(params, where.params)
    extra = jax.device_put(extra, {k: where.extra[k] for k in extra})
    return jax.jit(make, out_shardings=where)(params, extra), where, replicated
