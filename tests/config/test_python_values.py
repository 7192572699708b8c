# SPDX-License-Identifier: Apache-2.0
"""Rows and functions given as Python objects become what a file of settings could hold."""

import functools
import json

import pytest

from jaxrlhf.config.python_values import function_name, settings_of
from jaxrlhf.errors import ConfigError

ROWS = [{"prompt": "a", "completion": "ü", "source": "web"}, {"prompt": "b", "completion": "c"}]


def judge(prompts, completions, **columns):
    return [0.0] * len(prompts)


@functools.wraps(judge)
def wrapped(prompts, completions, **columns):
    return judge(prompts, completions)


class Judge:
    def method(self, prompts, completions):
        return []

    def __call__(self, prompts, completions):
        return []


@pytest.mark.parametrize("keys", [{"data": ROWS}, {"train_dataset": ROWS}, {"data.train": ROWS}])
def test_rows_are_a_file_named_by_what_it_holds(keys):
    found, files = settings_of("sft", keys)
    [(name, text)] = files.items()
    assert list(found.values()) == [f"stage:rows/{name}"]
    assert [json.loads(line) for line in text.splitlines()] == ROWS
    assert settings_of("sft", {"data": ROWS[:1]})[1].keys().isdisjoint(files)


def test_rows_may_stand_wherever_a_source_may():
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    mixed = [{"source": "a.jsonl", "weight": 2}, {"source": data, "weight": 1}, "b.jsonl"]
    found, files = settings_of("dpo", {"data": {"train": mixed, "eval": ROWS}})
    kept, written, file = found["data"]["train"]
    assert (kept, file) == ({"source": "a.jsonl", "weight": 2}, "b.jsonl")
    assert written["source"].startswith("stage:rows/source-")
    assert len(files) == 2
    splits = DatasetDict({"train": data, "eval": data})
    found, _ = settings_of("sft", {"data": splits})
    assert found["data"]["train"].startswith("stage:rows/train-")
    found, files = settings_of(
        "generate", {"prompts": ROWS, "prompt": ["x"], "sampling": {"stop": []}}
    )
    assert len(files) == 1


def test_a_function_is_named_by_its_file():
    name = f"{__file__}:judge"
    assert function_name(judge, "reward") == function_name(wrapped, "reward") == name
    found, _ = settings_of("ppo", {"reward": [judge, {"source": judge, "weight": 2}, "a.b:f"]})
    assert found["reward"] == [name, {"source": name, "weight": 2}, "a.b:f"]


def test_a_function_that_no_file_holds_is_refused_with_the_way():
    def inner(prompts, completions):
        return []

    exec(compile("def cell(p, c): ...", "/tmp/ipykernel_1/2.py", "exec"), globals())
    cell = globals()["cell"]
    for function in (
        lambda p, c: [],
        inner,
        Judge().method,
        Judge(),
        functools.partial(judge),
        cell,
    ):
        with pytest.raises(ConfigError, match=r"write it into a file, say rewards\.py, and give"):
            settings_of("ppo", {"reward": function})


def test_other_objects_are_no_settings():
    with pytest.raises(ConfigError, match="data: set is no value of a setting; rows are a list"):
        settings_of("sft", {"data": {"a"}})
    with pytest.raises(ConfigError, match="model: function is no value of a setting"):
        settings_of("sft", {"model": judge})
    with pytest.raises(ConfigError, match="data: row 1 cannot be written down"):
        settings_of("sft", {"data": [ROWS[0], {"prompt": {1}}]})
