# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, by name.

Every optimizer is the same chain: clip by the global norm of the accumulated gradient, the
preconditioner, decoupled weight decay of `decay_mask`, times a factor of their own for parameters
that have one. The learning rate is no part of it but an argument of the step, so that another rate,
schedule or number of steps is the same compiled program. A new optimizer is a function that returns
its preconditioner, and a line in OPTIMIZERS; its keyword parameters are its settings.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.errors import ConfigError
from jaxrlhf.types import Params

# By the last name of a leaf's path: with stacked layers a norm scale [L, D] has two dimensions too.
DECAYED = frozenset({"kernel", "embedding", "lora_a", "lora_b"})
# Virtual tokens begin as those of the vocabulary or the base's keys: no pull towards 0 is meant.
NOT_DECAYED = frozenset(
    {"scale", "bias", "dora_m", "ia3_in", "ia3_out", "soft_prompt", "prefix_k", "prefix_v"}
)


def decay_mask(params: Params) -> Any:
    """True for every leaf that weight decay shrinks: matrices and embeddings (as torch.optim.AdamW
    under transformers and TRL), never norms, biases, or an adapter's vectors and virtual tokens.

    Raises:
        ValueError: a leaf of neither list, so that a new kind of weight is decided, not guessed.
    """

    def decided(path: tuple[Any, ...], leaf: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        if name not in DECAYED and name not in NOT_DECAYED:
            raise ValueError(
                f"weight decay: {jax.tree_util.keystr(path)} is called neither one of "
                f"{sorted(DECAYED)} (decayed) nor of {sorted(NOT_DECAYED)} (not decayed); "
                "add its name to one of the lists in jaxrlhf/train/optim.py"
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decided, params)


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    moment_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Adam with bias correction. Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; decay
    decoupled as in Loshchilov & Hutter 2019, arXiv:1711.05101.

    Args:
        moment_dtype: storage of the first moment. The second stays fp32: in bf16 its moving
            average could not move, one part in 1/(1 - b2) being below the format's resolution.
    """
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(moment_dtype))


def adafactor(
    *, decay_rate: float = 0.8, clipping_threshold: float = 1.0, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Second moments factored into rows and columns: next to no optimizer memory.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4, without the relative step size:
    the learning rate means what it means elsewhere.
    """
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(clipping_threshold),
    )


def sgd(
    *, momentum: float = 0.0, moment_dtype: Literal["float32", "bfloat16"] = "float32"
) -> optax.GradientTransformation:
    """Gradient descent, with heavy-ball momentum if asked."""
    if momentum == 0.0:
        return optax.identity()
    return optax.trace(decay=momentum, accumulator_dtype=jnp.dtype(moment_dtype))


def constant(learning_rate: float, steps: int, final_ratio: float) -> optax.Schedule:
    """The same rate throughout; `final_ratio` has no meaning here."""
    return optax.constant_schedule(learning_rate)


def linear(learning_rate: float, steps: int, final_ratio: float) -> optax.Schedule:
    """A straight line down to final_ratio x the rate, held after `steps`."""
    return optax.linear_schedule(learning_rate, learning_rate * final_ratio, steps)


def cosine(learning_rate: float, steps: int, final_ratio: float) -> optax.Schedule:
    """Half a cosine down to final_ratio x the rate, held after `steps`."""
    return optax.cosine_decay_schedule(learning_rate, steps, alpha=final_ratio)


def make_schedule(
    learning_rate: float,
    schedule: str = "constant",
    *,
    warmup: float = 0,
    steps: int | None = None,
    final_ratio: float = 0.0,
) -> optax.Schedule:
    """The learning rate as a function of the optimizer step (0 for the first).

    Warm-up climbs to the full rate in `warmup` steps and starts at learning_rate / warmup: no step
    is spent at rate 0. The decay then spans the remaining steps and reaches its end one step after
    the last one; beyond that it stays there.

    Args:
        warmup: steps, or below 1 a share of `steps`.
        steps: optimizer steps planned in all; needed by every schedule that decays.
        final_ratio: the rate at the end as a share of `learning_rate`.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(_unknown("optim.schedule", schedule, SCHEDULES))
    if learning_rate < 0 or warmup < 0 or not 0 <= final_ratio <= 1:
        raise ConfigError(
            f"optim.learning_rate = {learning_rate}, optim.warmup = {warmup} must not be negative, "
            f"optim.final_ratio = {final_ratio} must lie in [0, 1]"
        )
    if steps is None and (schedule != "constant" or 0 < warmup < 1):
        raise ConfigError(f"optim.schedule = {schedule!r} with warmup = {warmup} needs train.steps")
    up = round(warmup * (steps or 0)) if warmup < 1 else int(warmup)
    if steps is not None and schedule != "constant" and up >= steps:
        raise ConfigError(f"optim.warmup = {up} steps must be fewer than the {steps} steps planned")
    after = SCHEDULES[schedule](learning_rate, max((steps or 0) - up, 1), final_ratio)
    if up == 0:
        return after
    rise = optax.linear_schedule(learning_rate / up, learning_rate, max(up - 1, 1))
    return optax.join_schedules([rise, after], [up])


def path_factors(factors: Mapping[str, float], params: Params) -> Any:
    """For every leaf its factor: that of the longest path in `factors` which leads to it, or 1.

    A path is keys joined by "/": "critic", "actor/layers/mlp".

    Raises:
        ConfigError: a path that leads to no leaf.
    """
    paths = [tuple(path.strip("/").split("/")) for path in factors]
    values = dict(zip(paths, factors.values(), strict=True))
    used: set[tuple[str, ...]] = set()
    starts: set[str] = set()

    def factor(path: tuple[Any, ...], leaf: Any) -> float:
        keys = tuple(str(getattr(key, "key", key)) for key in path)
        starts.update("/".join(keys[:n]) for n in (1, 2) if n < len(keys))
        found = [p for p in paths if keys[: len(p)] == p]
        used.update(found)
        return values[max(found, key=len)] if found else 1.0

    tree = jax.tree_util.tree_map_with_path(factor, params)
    if wrong := [path for path, keys in zip(factors, paths, strict=True) if keys not in used]:
        raise ConfigError(
            f"optim.rate_factors: {', '.join(wrong)}: no parameters there; there are "
            f"{', '.join(sorted(starts))}"
        )
    return tree


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies updates by the factors of `path_factors`: learning rates of their own."""

    def init(params: Params) -> optax.OptState:
        path_factors(factors, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.OptState, params: Params | None = None) -> Any:
        return jax.tree.map(jnp.multiply, updates, path_factors(factors, updates)), state

    return optax.GradientTransformation(init, update)


def make_optimizer(
    name: str = "adamw",
    learning_rate: float = 1e-5,
    *,
    schedule: str = "constant",
    warmup: float = 0,
    steps: int | None = None,
    final_ratio: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    rate_factors: Mapping[str, float] | None = None,
    **settings: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer and its schedule.

    Args:
        name: a key of OPTIMIZERS; `settings` are that function's keyword parameters (`b1`, `b2`,
            `eps`, `moment_dtype`, ...).
        schedule, warmup, steps, final_ratio: see `make_schedule`.
        weight_decay: per unit of learning rate, decoupled, on the leaves of `decay_mask`.
        clip_norm: the largest global norm of a gradient; None or 0 = no clipping.
        rate_factors: the learning rate (and with it the decay) of the parameters below a path is
            multiplied by this; see `path_factors`, whose errors `init` raises.

    Returns:
        (transformation, schedule). What the transformation says, times the schedule's rate of the
        step, is added to the parameters (`make_train_step` does). The optimizer's statistics are
        fp32 (see `adamw`) even where parameters are not.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(_unknown("optim.name", name, OPTIMIZERS))
    known = inspect.signature(OPTIMIZERS[name]).parameters
    if wrong := sorted(set(settings) - set(known)):
        raise ConfigError(
            f"optim.{', optim.'.join(wrong)}: {name} has no such setting; it has {', '.join(known)}"
        )
    if weight_decay < 0 or (clip_norm is not None and clip_norm < 0):
        raise ConfigError(
            f"optim.weight_decay = {weight_decay} and optim.clip_norm = {clip_norm} "
            "must not be negative"
        )
    rate = make_schedule(
        learning_rate, schedule, warmup=warmup, steps=steps, final_ratio=final_ratio
    )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(OPTIMIZERS[name](**settings))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if rate_factors:
        parts.append(scale_by_path(rate_factors))
    parts.append(optax.scale(-1.0))
    chain = optax.chain(*parts)

    def init(params: Params) -> optax.OptState:
        return chain.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates: Any, state: optax.OptState, params: Params | None = None) -> Any:
        updates, params = jax.tree.map(lambda x: x.astype(jnp.float32), (updates, params))
        return chain.update(updates, state, params)

    return optax.GradientTransformation(init, update), rate


def _unknown(field: str, value: str, table: dict[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(value, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field} = {value!r}: must be one of {', '.join(table)}{hint}"


SCHEDULES: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "sgd": sgd,
}
