# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: how often they are computed. (test_parity.py holds them to transformers.)"""

import jax
import jax.numpy as jnp
import numpy as np
from model_rows import CONFIGS

from jaxrlhf.models.config import Runtime
from jaxrlhf.models.rope import rope_angles
from jaxrlhf.models.transformer import abstract_params, hidden_states

CONFIG = CONFIGS["llama"]


def test_cosines_and_sines_are_those_of_the_angles():
    positions = jnp.arange(96).reshape(2, 48) * 37
    size = CONFIG.rotary_dim
    speeds = (CONFIG.rope_theta ** -(np.arange(0, size, 2) / size)).astype(np.float32)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * speeds
    for found, expected in zip(
        jax.jit(rope_angles, static_argnums=0)(CONFIG, positions),
        jax.jit(lambda angles: (jnp.cos(angles), jnp.sin(angles)))(angles),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_they_are_computed_once_for_all_heads_and_layers():
    rows = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def forward(params, tokens):
        ones = jnp.ones_like(tokens)
        positions = jnp.cumsum(ones, axis=1) - 1 + tokens[:, :1]
        return hidden_states(params, CONFIG, Runtime(unroll=True), tokens, positions, ones)

    assert CONFIG.num_layers > 1
    program = jax.jit(forward).lower(abstract_params(CONFIG), rows).compile().as_text()
    assert program.count(" cosine(") == program.count(" sine(") == 1
