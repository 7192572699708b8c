# SPDX-License-Identifier: Apache-2.0
"""Training some of a model's own parameters."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model_rows import CONFIGS, RUNTIME, assert_same_bits, batch, logits, params, random_rows

from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.only import parse_only
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.transformer import abstract_params

CONFIG = CONFIGS["llama"]


def tree(*heads):
    gone = {"score", "value", "lm_head"} - set(heads)
    return {key: value for key, value in params("llama").items() if key not in gone}


def halves(*texts, heads=()):
    return parse_only(texts, CONFIG).split(tree(*heads))


def shapes(found):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


@pytest.mark.parametrize("texts", [("last 1",), ("last 2",), ("layers/mlp", "embed"), (".*bias",)])
def test_the_halves_are_the_whole(texts):
    if texts == (".*bias",):
        with pytest.raises(ConfigError, match=r"'\.\*bias' matches no parameter; there are embed"):
            halves(*texts)
        return
    trained, frozen = halves(*texts)
    assert_same_bits(join(trained, frozen), tree())


def test_the_last_layer_is_the_last_row_of_stacked_leaves():
    trained, frozen = halves("last 1")
    whole = shapes(tree())
    assert set(shapes(trained)) == {name for name in whole if name.startswith("layers/")}
    for name, shape in shapes(trained).items():
        assert shape == (1, *whole[name][1:])
        assert shapes(frozen)[name] == shape  # the first of two
    assert "embed/embedding" in shapes(frozen)


@pytest.mark.slow
def test_its_gradient_is_that_of_the_whole_and_the_rest_stays():
    rows = batch(random_rows(3, (8, 6)))
    trained, frozen = halves("last 1", "embed")

    def loss(whole):
        return jnp.square(logits(whole, CONFIG, RUNTIME, *rows)).mean()

    own = jax.grad(lambda half: loss(join(half, frozen)))(trained)
    whole = jax.grad(loss)(tree())
    assert set(shapes(own)) == set(shapes(trained))
    for name in ("q", "o"):
        got, want = (g["layers"]["attention"][name]["kernel"] for g in (own, whole))
        np.testing.assert_allclose(got[0], want[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(
        own["embed"]["embedding"], whole["embed"]["embedding"], rtol=1e-5, atol=1e-8
    )


def test_new_heads_train_whatever_is_named():
    trained, _ = halves("heads", heads=("score", "value"))
    assert set(trained) == {"score", "value"}
    trained, _ = halves("final_norm", heads=("score",))
    assert set(trained) == {"score", "final_norm"}


def test_shapes_split_as_arrays_do():
    only = parse_only(("last 1",), CONFIG)
    for a, b in zip(only.split(abstract_params(CONFIG)), only.split(tree()), strict=True):
        assert shapes(a) == shapes(b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last 3", "'last 3' of 2 layers; say 1 to 2"),
        ("heads", "nothing would train"),
        ("layers/(", "nor a regular expression"),
        ("layer/x", "matches no parameter"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        halves(text)
