# SPDX-License-Identifier: Apache-2.0
"""The one optimizer step, shared by every stage.

Weights first, then only sums: the batch carries weights that already sum to 1 over the *global*
batch, so losses and gradients of microbatches and of devices simply add up, and nothing is divided
afterwards. A metric is a (sum, count) pair whose count is its own rows' weight, never a constant.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.parallel.compiling import jit
from jaxrlhf.train.state import TrainState
from jaxrlhf.types import Params

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count), scalars
# (trainable, frozen, batch, key) -> (loss [], metrics)
LossFn = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]
# (state, frozen, batch, key, rate) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def split_rows(batch: Any, accum: int) -> Any:
    """[B, ...] leaves to [accum, B/accum, ...], every device keeping its own rows.

    reshape(accum, -1) would send rows to other devices: measured 4-16x the FLOPs each.
    Scalar leaves are repeated.
    """

    def split(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return jnp.broadcast_to(x, (accum,))
        if x.shape[0] % accum:
            raise ValueError(
                f"a batch of {x.shape[0]} rows does not split into {accum} microbatches"
            )
        return x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accum: int = 1,
    prepare: Callable[[Any], Any] | None = None,
    ema_decay: float | None = None,
) -> TrainStep:
    """Returns a pure, unjitted `train_step(state, frozen, batch, key, rate) -> (state, metrics)`.

    `accum=k` equals `accum=1` up to rounding, whatever the masks: weights were normalised
    over the global batch before the split, and gradients add up in fp32.

    A step whose loss or gradient is not finite changes nothing but the step counter and says so in
    the metric `nonfinite`; the next step may well be fine.

    The learning rate is an argument: `rate` times the update of `tx` is added to the parameters.

    Args:
        loss_fn: (trainable, frozen, batch, key) -> (loss, {name: (sum, count)}), loss a weighted
            sum over the rows it is given.
        accum: microbatches a step; the rows of the batch must divide by it.
        prepare: a pure function of the *global* batch, run before the split: whatever needs all
            rows at once (normalising weights, whitening, baselines) goes there.
        ema_decay: moves `state.extra["ema"]` (see `init_state`): ema = d * ema + (1 - d) * params.

    Metrics of the step itself: `loss`, `grad_norm` (global, of the accumulated gradient, before
    clipping), `nonfinite` (1 where the step was skipped), `learning_rate`.
    """
    if accum < 1:
        raise ValueError(f"accum = {accum} must be at least 1")
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(
        state: TrainState, frozen: Params, batch: Any, key: jax.Array, rate: jax.Array | float
    ) -> tuple[TrainState, Metrics]:
        if ema_decay is not None and "ema" not in state.extra:
            raise ValueError("ema_decay needs a state made with ema=True")

        def one(i: jax.Array, rows: Any) -> Any:
            (loss, metrics), grads = grad_fn(state.params, frozen, rows, jax.random.fold_in(key, i))
            metrics = {name: (jnp.asarray(s), jnp.asarray(c)) for name, (s, c) in metrics.items()}
            return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, loss, metrics))

        def add(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(*xs)), None

        if prepare is not None:
            batch = prepare(batch)
        if accum == 1:  # one whole gradient buffer less than a scan of length 1
            grads, loss, metrics = one(jnp.zeros((), jnp.int32), batch)
        else:
            xs = (jnp.arange(accum), split_rows(batch, accum))
            shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], xs))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, loss, metrics), _ = jax.lax.scan(add, zeros, xs)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(moving: Any) -> Any:
            params, opt_state, extra = moving
            updates, opt_state = tx.update(grads, opt_state, params)
            updates = jax.tree.map(lambda u: rate * u, updates)
            params = optax.apply_updates(params, updates)
            if ema_decay is not None:
                d = ema_decay
                ema = jax.tree.map(
                    lambda e, p: d * e + (1 - d) * p.astype(e.dtype), extra["ema"], params
                )
                extra = {**extra, "ema": ema}
            return params, opt_state, extra

        # A branch, not a select: a select of new and old holds both at once.
        moving = (state.params, state.opt_state, state.extra)
        params, opt_state, extra = jax.lax.cond(finite, update, lambda moving: moving, moving)

        own: Metrics = {
            "loss": (loss, 1.0),
            "grad_norm": (norm, 1.0),
            "nonfinite": (1.0 - finite.astype(jnp.float32), 1.0),
            "learning_rate": (jnp.asarray(rate, jnp.float32), 1.0),
        }
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return state, {**own, **metrics}

    return train_step


def jit_train_step(train_step: TrainStep, shardings: TrainState, mesh: Mesh) -> Any:
    """The compiled step of a state with these shardings: the state is donated, metrics replicated.

    With `out_shardings` given the second call finds the first call's program; without, the step
    compiles twice.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return jit(train_step, mesh, donate_argnums=0, out_shardings=(shardings, whole))


def at_scheduled_rate(train_step: TrainStep, schedule: optax.Schedule, mesh: Mesh) -> TrainStep:
    """(state, frozen, batch, key) -> (state, metrics): the step at the rate of `state.step`.

    The rate is computed on the devices, by a program of its own: nothing waits for the counter, and
    another schedule compiles no other step.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    rate_at = jax.jit(lambda step: jnp.asarray(schedule(step), jnp.float32), out_shardings=whole)

    def scheduled(state: TrainState, frozen: Params, batch: Any, key: jax.Array) -> Any:
        return train_step(state, frozen, batch, key, rate_at(state.step))

    return scheduled
