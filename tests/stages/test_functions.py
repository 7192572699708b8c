# SPDX-License-Identifier: Apache-2.0
"""An error in somebody's reward function names the line that raised it."""

import pytest

from jaxrlhf.errors import ConfigError, JaxrlhfError
from jaxrlhf.stages.functions import call_reward, load_function


def test_an_error_in_a_reward_names_its_innermost_line_in_that_file(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import json\n\ndef inner(x):\n    return json.loads(x)\n\n"
        "def crash(prompts, completions, **columns):\n    return [inner(c) for c in completions]\n"
    )
    function = load_function(f"{file}:crash")
    with pytest.raises(JaxrlhfError) as error:
        call_reward(function, "crash", ["a"], ["{"], {})
    assert str(error.value).endswith(f"({file}:4)")  # not the line in json that raised it

    file.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ConfigError) as error:
        load_function(f"{file}:crash")
    assert str(error.value).endswith(f"division by zero ({file}:2)")
