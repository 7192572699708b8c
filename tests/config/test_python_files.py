# SPDX-License-Identifier: Apache-2.0
"""Names read from Python files without running them are the names that running them gives."""

import pytest

from jaxrlhf.config.python_files import functions_of, keys_of
from jaxrlhf.config.schema import leaves
from jaxrlhf.config.stages import STAGES
from jaxrlhf.losses.policy import POLICY_LOSSES
from jaxrlhf.losses.preference import PREFERENCE_LOSSES
from jaxrlhf.losses.reward import REWARD_LOSSES
from jaxrlhf.ops.advantages import ESTIMATORS


@pytest.mark.parametrize(
    ("command", "key", "table"),
    [
        ("dpo", "loss.name", PREFERENCE_LOSSES),
        ("reward", "loss.name", REWARD_LOSSES),
        ("ppo", "rl.advantage", ESTIMATORS),
        ("ppo", "rl.policy_loss", POLICY_LOSSES),
    ],
)
def test_the_names_of_algorithms_are_the_keys_of_their_tables(command, key, table):
    mark = leaves(STAGES[command])[key][0].table
    assert mark is not None
    assert keys_of(mark.file, mark.table) == tuple(table)


def test_functions_are_the_public_ones_at_the_top_and_nothing_is_run(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import nothing_here\n1 / 0\ndef f(p):\n    def inner(): ...\ndef _g(): ...\n"
        "class A:\n    def h(self): ...\nasync def k(): ...\n"
    )
    assert functions_of(file) == ("f", "k")
    file.write_text("def f(:")
    assert functions_of(file) == functions_of(tmp_path / "absent.py") == ()
