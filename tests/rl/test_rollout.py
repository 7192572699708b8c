# SPDX-License-Identifier: Apache-2.0
"""What is counted of a rollout."""

import jax.numpy as jnp
import numpy as np

from jaxrlhf.rl.rollout import first_of_their_kind


def test_completions_are_compared_within_their_prompt_up_to_their_own_length():
    rows = [
        # prompt, completion; what stands after a row's mask is anything
        ([1, 5, 6, 0], [0, 1, 1, 0]),
        ([1, 5, 6, 9], [0, 1, 1, 0]),  # the same
        ([1, 5, 6, 9], [0, 1, 1, 1]),  # longer
        ([2, 5, 6, 0], [0, 1, 1, 0]),  # another prompt's
        ([2, 7, 6, 0], [0, 1, 1, 0]),
        ([2, 5, 6, 3], [0, 1, 1, 0]),  # as the first of its prompt
    ]
    tokens, masks = (jnp.asarray(x) for x in zip(*rows, strict=True))
    found = first_of_their_kind(tokens, masks.astype(bool), 3)
    assert np.asarray(found).tolist() == [True, False, True, True, True, False]
    alone = first_of_their_kind(tokens, masks.astype(bool), 1)
    assert np.asarray(alone).all()
