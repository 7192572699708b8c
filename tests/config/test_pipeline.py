# SPDX-License-Identifier: Apache-2.0
"""Pipelines: defaults, references, repetitions, and every error of every stage at once."""

import pytest

from jaxrlhf.config.pipeline import load_pipeline, resolve
from jaxrlhf.errors import ConfigError

TEXT = """\
seed: 3
defaults: {train: {batch_size: 16}, rl.gae_lambda: 0.9, learning_rate: 0.5}
stages:
  - {stage: world}
  - {stage: sft, model: ./base, data: stage:world/demonstrations.jsonl}
  - {name: rm, stage: reward, model: stage:sft, data: stage:world/pairs.jsonl, seed: 9}
  - name: sweep
    stage: ppo
    model: stage:sft
    data: stage:world/prompts.jsonl
    reward: [stage:rm, "a.b:f"]
    train.steps: 10
    for_each: {rl.kl_coef: [0.01, 0.1, 1]}
  - {name: judged, stage: eval, prompts: p.jsonl, gold: "a.b:f", for_each: {model: stage:sweep}}
  - {stage: report, runs: [stage:rm, stage:sweep]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(TEXT)
    return path


def plan_of(file, *overrides):
    plan = load_pipeline(file, overrides)
    return plan, {stage.name: stage for stage in plan.stages}


def errors_of(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(file, overrides)
    return str(caught.value)


def test_stages_in_order_with_folders_parents_and_values(file):
    plan, stages = plan_of(file)
    assert [s.folder for s in plan.stages] == [
        *["world", "sft", "rm", "sweep-0", "sweep-1", "sweep-2"],
        *["judged-0", "judged-1", "judged-2", "report"],
    ]
    assert stages["sweep[1]"].parents == ("sft", "world", "rm")
    assert stages["sweep[1]"].values == {"rl.kl_coef": 0.1}
    assert stages["sweep[2]"].config.rl.kl_coef == 1.0
    assert stages["judged[2]"].config.model.path == "stage:sweep[2]"
    assert stages["judged[2]"].parents == ("sweep[2]",)
    assert stages["report"].config.runs == ["stage:rm", *(f"stage:sweep[{i}]" for i in range(3))]
    assert plan.output_dir == "runs/loop"


def test_defaults_reach_the_stages_that_have_the_key_and_a_stage_overrides_them(file):
    _, stages = plan_of(file)
    assert stages["sft"].config.train.batch_size == 16
    assert stages["sft"].config.optim.learning_rate == 0.5
    assert stages["sweep[0]"].config.rl.model_extra == {"gae_lambda": 0.9}
    assert [stages[n].config.seed for n in ("world", "sft", "rm")] == [3, 3, 9]
    _, stages = plan_of(file, "sft.train.batch_size=8", "defaults.train.batch_size=32", "seed=4")
    assert stages["sft"].config.train.batch_size == 8
    assert stages["rm"].config.train.batch_size == 32
    assert [stages[n].config.seed for n in ("world", "sft", "rm")] == [4, 4, 9]


def test_overrides_change_one_stage_also_its_repetitions(file):
    plan, stages = plan_of(file, "sweep.for_each.rl.kl_coef=[1, 2]", "sweep.train.steps=7")
    assert len(plan.stages) == 8
    assert stages["sweep[1]"].config.rl.kl_coef == 2.0
    assert stages["sweep[0]"].config.train.steps == 7


def test_a_setting_that_for_each_replaces_is_refused_with_the_way_that_works(file):
    said = errors_of(file, "sweep.rl.kl_coef=0.2", "judged.model=./m")
    assert "sweep: rl.kl_coef (sweep.rl.kl_coef=0.2): the values of rl.kl_coef are those" in said
    assert "say sweep.for_each.rl.kl_coef=[0.2] to have it" in said
    assert "say judged.for_each.model=[./m]" in said
    plan, stages = plan_of(file, "sweep.for_each.rl.kl_coef=[0.2]")
    assert [s.name for s in plan.stages if s.group == "sweep"] == ["sweep[0]"]
    assert stages["sweep[0]"].config.rl.kl_coef == 0.2
    # TRL's name is the same key; a value that all stages share is none of the stage's own.
    _, stages = plan_of(file, "sweep.for_each.beta=[0.3, 0.4]", "defaults.rl.kl_coef=1")
    assert [stages[f"sweep[{i}]"].values for i in (0, 1)] == [
        {"rl.kl_coef": 0.3},
        {"rl.kl_coef": 0.4},
    ]


def test_a_later_file_changes_stages_by_name_and_appends_others(file, tmp_path):
    later = tmp_path / "more.yaml"
    later.write_text(
        "output_dir: out\n"
        "stages: [{name: sft, stage: sft, seed: 7}, {stage: export, model: stage:sft}]"
    )
    plan = load_pipeline([file, later])
    assert plan.output_dir == str(tmp_path / "out")
    assert plan.stages[1].config.seed == 7
    assert plan.stages[1].config.model.path == str(tmp_path / "base")
    assert plan.stages[-1].stage == "export"


def test_several_keys_go_in_step(file):
    _, stages = plan_of(file, "sweep.for_each.seed=[5, 6, 7]")
    pairs = [
        (stages[f"sweep[{i}]"].config.seed, stages[f"sweep[{i}]"].config.rl.kl_coef)
        for i in range(3)
    ]
    assert pairs == [(5, 0.01), (6, 0.1), (7, 1.0)]
    assert "one length" in errors_of(file, "sweep.for_each.seed=[5, 6]")


def test_a_repeated_key_may_hold_mappings_and_lists(file):
    _, stages = plan_of(
        file, "sweep.for_each.optim.rate_factors=[{critic: 2}, {critic: 3}, {actor/layers: 1}]"
    )
    found = [stages[f"sweep[{i}]"] for i in range(3)]
    factors = [{"critic": 2}, {"critic": 3}, {"actor/layers": 1}]
    assert [stage.config.optim.rate_factors for stage in found] == factors
    # As JSON has them: these are written into pipeline.json.
    assert [stage.values["optim.rate_factors"] for stage in found] == factors


def test_references_become_folders(file):
    plan, stages = plan_of(file)
    folders = {s.name: f"/runs/{s.folder}" for s in plan.stages}
    config = resolve(stages["sweep[0]"].config, folders)
    assert config.data.train[0].source == "/runs/world/prompts.jsonl"
    assert config.reward[0].source == "/runs/rm"
    assert config.reward[1].source == "a.b:f"
    assert resolve(stages["report"].config, folders).runs[-1] == "/runs/sweep-2"
    assert config.rl == stages["sweep[0]"].config.rl


def test_every_error_of_every_stage_is_said_at_once(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        TEXT.replace("model: stage:sft\n", "model: stage:stf\n")
        .replace("gold:", "golt:")
        .replace("stage:rm, stage:sweep", "stage:later, 'stage:sweep[3]', stage:../x")
        .replace("rl.gae_lambda", "nothing.known")
    )
    text = errors_of(file, "swep.seed=1", "sft.optim.lr=3", "rm.model=stage:rm")
    for expected in (
        "sweep: model.path (" + str(file) + ":9): stf is not an earlier stage; did you mean sft?",
        "judged: golt (" + str(file) + ":14): unknown key; did you mean gold?",
        "report: runs.0 (" + str(file) + ":15): later is not an earlier stage",
        "'stage:../x' is not a reference",
        f"defaults.nothing.known ({file}:2): no stage of this pipeline has it",
        "swep.seed=1: an override is NAME.key=value for a stage NAME; did you mean sweep?",
        "sft: optim.lr (sft.optim.lr=3): unknown key; did you mean optim.learning_rate?",
        "rm: model.path (rm.model=stage:rm): rm is not an earlier stage",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "stages: is needed"),
        ("stages: []", "is needed"),
        ("stages: [sft]", "a stage is a mapping"),
        ("stages: [{stage: stf}]", "did you mean sft?"),
        ("stages: [{name: x}]", "is needed: one of world"),
        ("stages: [{stage: chat}]", "got 'chat'"),
        ("stages: [{stage: world}, {stage: world}]", "world names two stages"),
        ("stages: [{stage: world, name: ../x}]", "cannot name a stage"),
        ("stages: [{stage: world, name: defaults}]", "cannot name a stage"),
        ("stages: [{stage: world, output_dir: x}]", "the pipeline gives each stage its folder"),
        ("stages: [{stage: world, for_each: 3}]", "for_each"),
        ("stages: [{stage: world, for_each: {seed: 3}}]", "expected a list of values"),
        ("seed: x\nstages: [{stage: world}]", "seed (p.yaml:1): expected a whole number"),
        ("stags: 3", "did you mean stages?"),
        (
            "stages: [{stage: world, for_each: {seed: [1, 2]}}, "
            "{stage: label, world: stage:world, completions: c.jsonl}]",
            "world is repeated 2 times; say which, world[0] to world[1]",
        ),
        (
            "stages: [{stage: world}, "
            "{stage: label, world: 'stage:world[0]', completions: c.jsonl}]",
            "there is no world[0]: it is not repeated",
        ),
    ],
)
def test_what_is_no_pipeline_is_said(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(text)
    assert expected in errors_of("p.yaml")


def test_the_folder_may_have_a_number_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("stages: [{stage: score, model: ./m, data: d.jsonl}]\n")
    for name in ("20240601", "1e5", "null", "true"):
        plan = load_pipeline("a.yaml", [f"output_dir={name}"])
        assert plan.output_dir == str(tmp_path / name)


@pytest.mark.parametrize("text", ["defaults: 5", "defaults: [a]", "output_dir: [a]"])
def test_what_is_no_mapping_or_path_is_said(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(f"{text}\nstages: [{{stage: score, model: ./m, data: d.jsonl}}]\n")
    with pytest.raises(ConfigError, match=f"{text.split(':')[0]} .*a.yaml:1.*: expected a"):
        load_pipeline(file)
