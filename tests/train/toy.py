# SPDX-License-Identifier: Apache-2.0
"""A small two-layer regression with masks, float64-checkable, that all training tests share."""

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
