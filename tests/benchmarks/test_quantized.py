# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantized bases runs from end to end, on a small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quantized.py"


@pytest.mark.slow
def test_four_bits_are_fewer_bytes(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--work", str(tmp_path), "--layers", "2"]
    command += ["--formats", "None", "nf4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plain, few = (json.loads(out.read_text())["memory"][name] for name in ("None", "nf4"))
    # Two layers of 14.9 million weights, at 16 and at 4.5 bits; the rest is the same.
    saved = 2 * 14.909 * (16 - 4.5) / 8
    assert plain["frozen_mb"] - few["frozen_mb"] == pytest.approx(saved, abs=0.3)
    assert len(few["losses"]) == 2
    assert few["losses"] == pytest.approx(plain["losses"], abs=0.3)
