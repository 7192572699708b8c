# SPDX-License-Identifier: Apache-2.0
"""A weighted list of rewards, as `reward:` of a stage gives it."""

import numpy as np
import pytest

from jaxrlhf.config.model import ModelSection
from jaxrlhf.config.reward import RewardTerm
from jaxrlhf.errors import ConfigError
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.stages.completions import make_judge

FUNCTIONS = """
def length(prompts, completions, **columns):
    return [len(text) / 8 for text in completions]

def wanted(prompts, completions, answer, **columns):
    return [float(a in text) for a, text in zip(answer, completions)]
"""


def judge_of(*terms):
    return make_judge([RewardTerm(**term) for term in terms], ModelSection(), None, make_mesh())


def test_the_total_is_the_weighted_sum_and_every_part_keeps_its_own_scale(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(FUNCTIONS)
    judge = judge_of(
        {"source": f"{file}:length", "weight": -0.5},
        {"source": f"{file}:wanted", "weight": 2.0, "name": "right"},
    )
    prompts, texts = ["a?", "b?"], ["a", "no way"]
    scores = judge(prompts, texts, {"answer": ["a", "b"]}, None)
    assert {name: x.tolist() for name, x in scores.items()} == {
        "length": [0.125, 0.75],
        "right": [1.0, 0.0],
    }
    total = judge.total(scores)
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, np.float32([2 - 0.0625, -0.375]))


def test_two_rewards_of_one_name_are_refused(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match="second one named 'length'"):
        judge_of({"source": f"{file}:length"}, {"source": f"{file}:length", "weight": 2})
