# SPDX-License-Identifier: Apache-2.0
"""The happy-stories reward against values computed by hand."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location(
        "valence_reward", ROOT / "configs" / "rewards" / "valence.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_hand_on_a_lexicon_of_our_own(module, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "vader"
    folder.mkdir(parents=True)
    (folder / "vader_lexicon.txt").write_text("good\t2.0\t0\t[]\nsad\t-1.5\t0\t[]\n")
    monkeypatch.setenv("JAXRLHF_ASSETS", str(tmp_path))
    got = module.valence(
        ["good good", "", "", ""], ["A GOOD, sad dog.", "", " ... ", "good"], column=[0] * 4
    )
    assert got == [pytest.approx(0.5 / 4), 0.0, 0.0, 2.0]  # the prompt does not count


def test_by_hand_on_the_real_lexicon(module, shared, monkeypatch):
    monkeypatch.setenv("JAXRLHF_ASSETS", str(shared))
    # happy 2.7, sad -2.1, love 3.2, good 1.9
    got = module.valence(["", ""], ['"Happy!" said the sad dog', "I love a good, good day."])
    assert got == [pytest.approx((2.7 - 2.1) / 5), pytest.approx((3.2 + 1.9 + 1.9) / 6)]


def test_a_missing_lexicon_says_what_to_set(module, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRLHF_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="JAXRLHF_ASSETS"):
        module.valence([""], ["x"])
