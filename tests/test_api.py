# SPDX-License-Identifier: Apache-2.0
"""The commands as functions: rows and functions in memory, and what help() says."""

import inspect
import subprocess
import sys

import pytest
from tiny import FEW, read_jsonl

import jaxrlhf
from jaxrlhf import api


def test_rows_in_memory_are_kept_in_the_run_and_resumed_by_content(
    tiny, stories, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = read_jsonl(tiny.demonstrations)
    keys = {"model": stories, "train.steps": 1, **FEW}
    dry = jaxrlhf.sft(data=rows, dry_run=True, **keys)
    assert dry.exit_code == 0
    assert list(tmp_path.iterdir()) == []
    run = jaxrlhf.sft(data=rows, **keys)
    assert run.exit_code == 0
    [file] = (run.path / "rows").iterdir()
    assert read_jsonl(file) == rows
    assert f"source: {file.resolve()}" in (run.path / "config.yaml").read_text()

    capsys.readouterr()
    again = jaxrlhf.sft(data=rows, output=run.path, **keys)
    assert "resuming at step 1" in capsys.readouterr().out
    assert again.summary["content"] == run.summary["content"]
    with pytest.raises(jaxrlhf.ConfigError, match=r"the content of data\.train\.0\.source changed"):
        jaxrlhf.sft(data=rows[1:], output=run.path, **keys)

    # A run is a model, and what is reported on.
    assert isinstance(jaxrlhf.load(run).generate("a", max_new_tokens=1), str)
    assert jaxrlhf.write_report(run) == run.path.resolve() / "report.html"


SCRIPT = """
import sys, jaxrlhf
from jaxrlhf.stages.functions import load_function
from jaxrlhf.config.python_values import function_name
def reward(prompts, completions, **columns):
    return [1.0] * len(prompts)
print("begun")
assert load_function(function_name(reward, "reward")) is reward
"""


def test_a_function_of_the_script_itself_does_not_run_it_again(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.stdout == "begun\n", done.stderr


@pytest.mark.parametrize("name", jaxrlhf.COMMANDS)
def test_help_shows_a_call(name):
    text = inspect.getdoc(getattr(api, name)) or ""
    assert name == "stage" or f"jaxrlhf.{name}(" in text or name == "load", text
    assert "jaxrlhf.write_report(" in (jaxrlhf.write_report.__doc__ or "")
