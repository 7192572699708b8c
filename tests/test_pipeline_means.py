# SPDX-License-Identifier: Apache-2.0
"""A stage repeated over seeds: its mean is printed and written down, each experiment by itself."""

import json

import pytest

from jaxrlhf.config.pipeline import load_pipeline
from jaxrlhf.pipeline import run_pipeline
from jaxrlhf.stages.training import StageResult

PIPELINE = """
stages:
  - name: judge
    stage: reward
    model: {folder}
    data: {{train: rows.jsonl, eval_fraction: 0.5}}
    for_each:
      optim.learning_rate: [0.1, 0.1, 0.2, 0.2]
      seed: [1, 2, 1, 2]
  - name: sweep
    stage: reward
    model: {folder}
    data: rows.jsonl
    for_each: {{optim.learning_rate: [0.1, 0.2]}}
"""


def test_means_over_seeds(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=tmp_path))

    def run_stage(stage, config, folder, **options):
        metrics = {"eval/accuracy": config.optim.learning_rate + config.seed, "loss": 0.5}
        summary = {"exit_reason": "done", "content": "x", "metrics": metrics}
        (folder / "summary.json").write_text(json.dumps(summary))
        return StageResult(folder, 0, metrics)

    monkeypatch.setattr("jaxrlhf.stages.run_stage", run_stage)
    plan = load_pipeline(file)
    for _ in range(2):  # the second time every stage is skipped, and the means are the same
        assert run_pipeline(plan, tmp_path / "out").exit_code == 0
        written = json.loads((tmp_path / "out/pipeline.json").read_text())
        found = written["repeats"]
        assert [(f["name"], f["values"], f["runs"], f["over"]) for f in found] == [
            ("judge", {"optim.learning_rate": 0.1}, 2, ["seed"]),
            ("judge", {"optim.learning_rate": 0.2}, 2, ["seed"]),
        ]
        assert found[1]["metrics"]["eval/accuracy"]["mean"] == pytest.approx(1.7)
        assert len(written["stages"]) == 6
        shown = capsys.readouterr().out
        line = "judge optim.learning_rate=0.2: eval/accuracy 1.7000 [-4.6531, 8.0531], mean of 2"
        assert line in shown
        assert "loss" not in shown
