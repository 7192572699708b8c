# SPDX-License-Identifier: Apache-2.0
"""A function's keyword-only parameters are the keys of its section."""

import re
from typing import Literal

import pytest

from jaxrlhf.config import signatures
from jaxrlhf.config.load import load, to_yaml
from jaxrlhf.errors import ConfigError


def plain(chosen, ref_chosen, *, beta: float = 0.1, label_smoothing: float | None = None):
    return chosen, ref_chosen, beta, label_smoothing


def fancy(
    chosen,
    *,
    kind: Literal["a", "b", 3] = "a",
    n: int = 2,
    on: bool = False,
    word: str = "x",
    many: tuple[float, ...] = (1.0,),
    needed: float,
):
    return chosen, kind, n, on, word, many, needed


TABLE = {"dpo": plain, "fancy": fancy}


def dpo(*overrides):
    return load(
        "dpo",
        [],
        ["model=/m", "data=/d.jsonl", *overrides],
        lambda config: signatures.check(config, {"loss.name": TABLE}),
    )


def test_defaults_are_filled_and_values_converted():
    config = dpo("loss.beta=1")
    assert config.loss.model_extra == {"beta": 1.0, "label_smoothing": None}
    assert type(config.loss.beta) is float
    assert signatures.keywords(plain, config.loss) == {"beta": 1.0, "label_smoothing": None}
    assert signatures.statistics(plain) == ("chosen", "ref_chosen")
    assert "beta: 1.0" in to_yaml(config)


def test_another_name_has_other_keys():
    config = dpo("loss.name=fancy", "loss.needed=2", "loss.kind=b", "loss.many=[1, 2]")
    assert config.loss.model_extra["many"] == (1.0, 2.0)
    with pytest.raises(ConfigError, match=r"loss\.beta .*unknown key for the chosen loss\.name"):
        dpo("loss.name=fancy", "loss.needed=2", "loss.beta=1")
    with pytest.raises(ConfigError, match=r"loss\.needed: is needed: a number"):
        dpo("loss.name=fancy")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.kind=c", "expected one of a, b, 3; got 'c'"),
        ("loss.n=2.5", "expected a whole number; got 2.5"),
        ("loss.n=true", "expected a whole number; got true"),
        ("loss.on=1", "expected true or false; got 1"),
        ("loss.word=3", "expected text; got 3"),
        ("loss.many=[1, x]", "expected a list, each a number"),
        ("loss.needed=.nan", "expected a number; got nan"),
        ("loss.needed=null", "expected a number; got null"),
        ("loss.wrod=x", "did you mean loss.word?"),
    ],
)
def test_wrong_types_name_what_is_accepted(override, expected):
    needed = [] if override.startswith("loss.needed") else ["loss.needed=1"]
    with pytest.raises(ConfigError) as caught:
        dpo("loss.name=fancy", *needed, override)
    assert expected in str(caught.value)
    assert f"({override})" in str(caught.value)


def test_an_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"expected one of dpo, fancy; .*did you mean fancy\?"):
        dpo("loss.name=fancee")


def test_both_passes_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        dpo("optim.lr=1", "loss.bata=2")
    assert "optim.learning_rate" in str(caught.value)
    assert "did you mean loss.beta?" in str(caught.value)


def test_functions_that_always_take_part_share_a_section():
    def clip(values, *, value_clip: float = 0.2, epochs: int = 1):
        return values, value_clip, epochs

    config = load(
        "ppo",
        [],
        ["model=/m", "data=/d.jsonl", "reward=a:b", "train.steps=1", "rl.advantage=dpo"],
        lambda c: signatures.check(c, {"rl.advantage": TABLE, "rl.values": clip}),
    )
    assert config.rl.value_clip == 0.2
    # a parameter that the section declares takes the section's value
    assert signatures.keywords(clip, config.rl) == {"value_clip": 0.2, "epochs": 4}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.beta=-1", "expected a number > 0; got -1"),
        ("loss.beta=0", "expected a number > 0; got 0"),
        ("loss.label_smoothing=0.5", "expected a number >= 0 and < 0.5; got 0.5"),
        ("loss.label_smoothing=-0.1", "expected a number >= 0 and < 0.5; got -0.1"),
    ],
)
def test_a_parameter_keeps_the_limits_of_its_annotation(override, said):
    from jaxrlhf.stages import check_algorithms

    words = ["model=/m", "data=/d.jsonl"]
    with pytest.raises(ConfigError, match=re.escape(said)):
        load("dpo", [], [*words, override], check_algorithms)
    assert load("dpo", [], [*words, "loss.beta=1"], check_algorithms).loss.beta == 1
    words += ["reward=a:b", "train.steps=1"]
    said = "rl.clip_eps_high (rl.clip_eps_high=0): expected a number > 0 or null; got 0"
    with pytest.raises(ConfigError, match=re.escape(said)):
        load("ppo", [], [*words, "rl.clip_eps_high=0"], check_algorithms)
