# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: a narrow mlp on what attention, or the mlp, is about to add.

layers/{attention,mlp}_bottleneck/down/{kernel [L,D,r], bias [L,r]}
layers/{attention,mlp}_bottleneck/up/{kernel [L,r,D], bias [L,D]}
"""

from typing import Any

import jax

from jaxrlhf.models.products import multiply

PLACES = ("attention", "mlp")


def bottleneck(x: jax.Array, leaves: dict[str, Any]) -> jax.Array:
    """x + up(gelu(down(x))) of x [..., D]; x itself as long as `up` is zero.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2 (after both branches);
    Pfeiffer et al. 2020, arXiv:2005.00247, put one after the mlp alone. GELU is the exact one.
    """

    def project(x: jax.Array, part: dict[str, jax.Array]) -> jax.Array:
        y = multiply(x, part["kernel"])
        return y + part["bias"].astype(y.dtype)

    inner = jax.nn.gelu(project(x, leaves["down"]), approximate=False)
    return x + project(inner, leaves["up"])
