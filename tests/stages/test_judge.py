# SPDX-License-Identifier: Apache-2.0
"""A weighted list of rewards, as `reward:` of a stage gives it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_in_processes

from jaxrlhf.config.model import ModelSection
from jaxrlhf.config.reward import RewardTerm
from jaxrlhf.errors import ConfigError, JaxrlhfError
from jaxrlhf.parallel import distributed
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.stages import completions
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


def test_a_reward_model_s_nan_is_an_error_that_names_the_sample(tmp_path, monkeypatch):
    model = SimpleNamespace(tokenizer=None, params=None, config=None, runtime=None)
    monkeypatch.setattr(completions, "open_model", lambda *args, **kwargs: model)
    monkeypatch.setattr(completions, "ids_digest", lambda tokenizer: "the same")
    # The last row is filler: whatever is said of it counts nothing.
    monkeypatch.setattr(completions, "row_scores", lambda params, config, runtime, rows: rows)
    judge = make_judge([RewardTerm(source="runs/judge")], ModelSection(), model, make_mesh())
    scores = judge(["a?", "b?"], ["a", "b"], {}, jnp.asarray([1.0, 2.0, np.nan]))
    assert scores["judge"].tolist()[:2] == [1.0, 2.0]
    with pytest.raises(JaxrlhfError, match=r"runs/judge returned nan for sample 1.*'b\?'.*'b'"):
        judge(["a?", "b?"], ["a", "b"], {}, jnp.asarray([1.0, np.nan, 3.0]))


OWN = """
import os

def process(prompts, completions, **columns):
    return [float(os.environ["JAX_PROCESS_ID"]) + 0.7] * len(completions)
"""


def scored(source):
    with distributed.together():
        return judge_of({"source": source})(["a?", "b?"], ["a", "b"], {}, None)["process"].tolist()


@pytest.mark.slow
def test_every_process_has_the_first_one_s_scores_of_a_function(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(OWN)
    found = run_in_processes(2, scored, source=f"{file}:process")
    assert found == [np.float32([0.7, 0.7]).tolist()] * 2
