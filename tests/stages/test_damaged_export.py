# SPDX-License-Identifier: Apache-2.0
"""A run's own result is what the run wrote, to the bit, or it is not used."""

import json
import shutil

import pytest

from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ModelError
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.stages.models import open_model


def opened(place):
    section = STAGES["generate"].model_validate({"model": str(place), "prompt": ["x"]}).model
    return open_model(section, make_mesh(), frozen=True)


def test_a_changed_bit_of_a_runs_result_is_refused_by_name(models, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(models.base, run)
    opened(run)
    weights = run / "export" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # still a number
    with pytest.raises(ModelError, match=r"export/model\.safetensors is not the file that its run"):
        opened(run)
    opened(run / "export")  # as it is: nobody knows what it should be
    weights.write_bytes(good)
    opened(run)
    config = run / "export" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    with pytest.raises(ModelError, match=r"export/config\.json is not the file"):
        opened(run)
    (run / "export" / "README.md").write_text("mine")  # says nothing of the weights
    shutil.copy(models.base / "export" / "config.json", config)
    opened(run)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is not .*now it is missing"):
        opened(run)
