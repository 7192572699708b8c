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
        params: arrays (host, or on devices already). The state has buffers of its own: what is
            donated with it takes nothing from them.
        axes: the logical axis names of every parameter (`models.transformer.logical_axes`).

    Returns:
        (state, its shardings, the list of dimensions that had to be replicated).
    """
    extra = dict(extra or {})
    _, where, replicated = abstract_state(params, tx, mesh, axes, ema=ema, extra=extra)
    params = jax.device_put(params, where.params)
    extra = jax.device_put(extra, {k: where.extra[k] for k in extra})

    def make(params: Params, extra: dict[str, Any]) -> TrainState:
        return init_state(params, tx, ema=ema, extra=extra)

    return jax.jit(make, out_shardings=where)(params, extra), where, replicated


def abstract_state(
    params: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axes: Any,
    *,
    ema: bool = False,
    extra: dict[str, Any] | None = None,
) -> tuple[TrainState, TrainState, list[str]]:
    """The shapes of the state that `place_state` makes of the same, with where they live: what a
    checkpoint is restored to without making another state first.

    Returns:
        (shapes, their shardings, the list of dimensions that had to be replicated).
    """
    shapes = jax.eval_shape(
        lambda params, extra: init_state(params, tx, ema=ema, extra=extra), params, extra or {}
    )
    where, replicated = state_shardings(axes, shapes, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    return placed, where, replicated
