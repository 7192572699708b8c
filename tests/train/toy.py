# SPDX-License-Identifier: Apache-2.0
"""A small two-layer regression with masks, float64-checkable, that all training tests share."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

AXES = {
    "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
    "norm": {"scale": ("mlp",)},
    "down": {"kernel": ("mlp", "embed")},
}


def params(seed=0, embed=16, mlp=32):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "up": {
            "kernel": jax.random.normal(k1, (embed, mlp)) / embed**0.5,
            "bias": jnp.zeros((mlp,)),
        },
        "norm": {"scale": jnp.ones((mlp,))},
        "down": {"kernel": jax.random.normal(k2, (mlp, embed)) / mlp**0.5},
    }


def batch(step=0, rows=8, length=6, embed=16, ragged=True):
    rng = np.random.default_rng(1000 + step)
    mask = rng.integers(0, 2, (rows, length)) if ragged else np.ones((rows, length))
    if ragged:
        mask[0] = 1
        mask[1] = 0  # rows without a single token
        mask[-1] = 0
    return {
        "x": rng.normal(size=(rows, length, embed)).astype(np.float32),
        "y": rng.normal(size=(rows, length, embed)).astype(np.float32),
        "weights": (mask / mask.sum()).astype(np.float32),
    }


def loss_fn(trainable, frozen, batch, key):
    hidden = jnp.tanh(batch["x"] @ trainable["up"]["kernel"] + trainable["up"]["bias"])
    out = (hidden * trainable["norm"]["scale"]) @ trainable["down"]["kernel"]
    out = out + frozen.get("shift", 0.0)
    error = ((out - batch["y"]) ** 2).mean(-1)
    weights = batch["weights"]
    rows = (weights > 0).sum()
    return (error * weights).sum(), {
        "error": ((error * weights).sum(), weights.sum()),
        "tokens": (rows, weights.sum()),
    }


def run(
    folder,
    steps=12,
    save_every=3,
    eval_every=4,
    poison=(),
    pause=0.0,
    keep_last=2,
    mesh=None,
    signal_at=(),
    stop_after_nonfinite=5,
    log_every=1,
    best="error",
    score=None,
):
    """A whole training run of the toy, resumed where its folder says: what a stage does."""
    from jaxrlhf.parallel import distributed
    from jaxrlhf.parallel.mesh import make_mesh
    from jaxrlhf.parallel.rules import put_batch, use_mesh
    from jaxrlhf.train.checkpoint import Checkpoints
    from jaxrlhf.train.digest import content_digest
    from jaxrlhf.train.loop import train
    from jaxrlhf.train.metrics import MetricWriter
    from jaxrlhf.train.optim import make_optimizer
    from jaxrlhf.train.state import place_state
    from jaxrlhf.train.step import at_scheduled_rate, jit_train_step, make_train_step

    distributed.initialize()
    tx, schedule = make_optimizer(
        "adamw", 3e-2, schedule="cosine", warmup=2, steps=steps, weight_decay=0.1
    )
    mesh = make_mesh(**(mesh or {}))
    with use_mesh(mesh):
        state, where, _ = place_state(params(), tx, mesh, AXES, ema=True)
        checkpoints = Checkpoints(
            folder, meta={"stage": "toy"}, keep_last=keep_last, best=best, best_mode="min"
        )
        start, so_far = 0, None
        if (step := checkpoints.latest()) is not None:
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
            )
            state, start = checkpoints.restore(abstract, step)
            so_far = checkpoints.read_meta(start)["record"]
        train_step = make_train_step(loss_fn, tx, accum=2, ema_decay=0.9)
        step_fn = at_scheduled_rate(jit_train_step(train_step, where, mesh), schedule, mesh)

        def advance(state, step):
            rows = batch(step)
            if step in poison:
                rows["y"][0, 0, 0] = np.nan
            for _ in range(list(signal_at).count(step)):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            return step_fn(
                state, {}, put_batch(rows, mesh), jax.random.fold_in(jax.random.key(3), step)
            )

        held_out = put_batch(batch(999), mesh)
        error = jax.jit(lambda p, rows: loss_fn(p, {}, rows, None)[1])
        score = score or (lambda params, step: error(params, held_out))
        with MetricWriter(folder, start=start) as writer:
            outcome = train(
                advance,
                state,
                start=start,
                steps=steps,
                writer=writer,
                checkpoints=checkpoints,
                evaluate=lambda state, step: score(state.params, step),
                eval_every=eval_every,
                stop_after_nonfinite=stop_after_nonfinite,
                save_every=save_every,
                log_every=log_every,
                so_far=so_far,
                sample=lambda state, step: [{"prompt": "p", "completion": f"c{step}"}],
            )
    return {
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "step": outcome.step,
        "start": start,
        "digest": content_digest(outcome.state),
        "steps": checkpoints.steps(),
        "best": checkpoints.best(),
        "message": outcome.message,
        "tokens": outcome.tokens,
    }


def record(folder):
    """Everything a run wrote that must not depend on how often it was interrupted."""
    lines = []
    for file in ("metrics.jsonl", "samples.jsonl"):
        for line in (Path(folder) / file).read_text().splitlines():
            lines.append({k: v for k, v in json.loads(line).items() if not k.startswith("time/")})
    contents = {}
    for manifest in sorted((Path(folder) / "checkpoints").glob("*/manifest.json")):
        if not manifest.parent.name.isdecimal():  # a damaged one, moved aside
            continue
        found = json.loads(manifest.read_text())
        contents[found["step"]] = (found["content"], found["metrics"], found["leaves"])
    return lines, contents
