# SPDX-License-Identifier: Apache-2.0
"""The whole loop as users run it: the quickstart pipeline, in miniature."""

import json

import numpy as np
import pytest
from tiny import ROOT, SHAPE, metrics, read_jsonl

from jaxrlhf import cli
from jaxrlhf.models.weights import load_hf
from jaxrlhf.report.read import read_runs

pytestmark = pytest.mark.slow

SMALL = [
    "world.sizes={pretraining: 200, demonstrations: 150, prompts_train: 60, prompts_eval: 12}",
    f"base.model.init={json.dumps(SHAPE)}",
    "base.train={steps: 40, batch_size: 16}",
    "base.optim.warmup=2",
    "sft.train={steps: 10, batch_size: 16}",
    "sft.optim.warmup=2",
    "candidates.sampling={max_new_tokens: 16, batch_size: 32}",
    "candidates.n=3",
    "reward_model.train={steps: 4, epochs: null, batch_size: 16}",
    "dpo.train={steps: 4, epochs: null, batch_size: 16}",
    "ppo.train={steps: 2, batch_size: 16}",
    "ppo.sampling.max_new_tokens=16",
    "ppo.for_each={rl.kl_coef: [0.5, 0.03], optim.learning_rate: [1e-3, 1e-3]}",
    "eval_ppo.for_each={label: [PPO 0.5, PPO 0.03], eval.kl_coef: [0.5, 0.03]}",
    "eval_sft.eval={samples_per_prompt: 2, best_of: [1, 2], tilt: [0.5]}",
]
SAMPLED = ("eval_sft", "eval_dpo", "eval_ppo")
CONTRACT = ("config.yaml", "metrics.jsonl", "summary.json", "environment.json")
EXPORT = (
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "README.md",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The miniature's directory after one call of the command."""
    out = tmp_path_factory.mktemp("quickstart")
    short = [f"{name}.data.max_length=64" for name in ("base", "sft", "reward_model", "dpo", "ppo")]
    sampled = [f"{name}.sampling={{max_new_tokens: 16, batch_size: 32}}" for name in SAMPLED]
    small = [*SMALL, *short, *sampled]
    file = ROOT / "configs" / "pipelines" / "quickstart.yaml"
    assert cli.main(["run", str(file), "--output", str(out), *small]) == 0
    return out


TRAINED = ("base", "sft", "reward_model", "dpo", "ppo-0", "ppo-1")


def test_every_stage_leaves_what_a_run_directory_promises(folder):
    stages = json.loads((folder / "pipeline.json").read_text())["stages"]
    assert {stage["status"] for stage in stages} == {"done"}
    for stage in stages:
        run = folder / stage["dir"]
        found = json.loads((run / "summary.json").read_text())
        assert found["exit_reason"] == "done"
        assert found["steps_done"] == found["steps_planned"]
        assert found["wall_seconds"] > 0
        assert found["peak_memory_bytes"] > 1e8
        assert (run / "config.yaml").is_file()
        assert (run / "environment.json").is_file()
    for name in TRAINED:
        run = folder / name
        reward = name == "reward_model"
        for file in (*CONTRACT, *(f"export/{file}" for file in EXPORT)):
            generates = file == "export/generation_config.json"
            assert (run / file).is_file() != (reward and generates), (name, file)
        assert list((run / "checkpoints").glob("*/manifest.json"))
        assert list((run / "tensorboard").iterdir())
        assert load_hf(run / "export").kind == ("reward" if reward else "lm")
    assert not list(folder.rglob("*.partial"))


def test_every_stage_says_what_fed_it(folder):
    stages = {s["name"]: s for s in json.loads((folder / "pipeline.json").read_text())["stages"]}
    for name, stage in stages.items():
        found = json.loads((folder / stage["dir"] / "summary.json").read_text())
        contents = {stages[parent]["content"] for parent in stage["parents"]}
        if stage["stage"] not in ("report", "world"):
            # Of a stage's folder it may read one file: then the digest is that file's own.
            assert len(set(found["parents"].values()) & contents) > 0 or stage["parents"] == [
                "world"
            ], name
    sft = stages["sft"]["content"]
    for name in ("reward_model", "dpo", "ppo[0]"):
        folder_name = stages[name]["dir"]
        found = json.loads((folder / folder_name / "summary.json").read_text())
        assert found["parents"]["model.path"] == sft


def test_the_figures_are_there(folder):
    for name in ("eval_sft", "eval_dpo", "eval_ppo-0", "eval_ppo-1"):
        found = json.loads((folder / name / "eval.json").read_text())
        assert found["stage"] == "eval"
        assert 0 <= found["metrics"]["gold"] <= 1
        for metric in ("gold", "proxy", "kl"):
            low, high = found["intervals"][metric]
            assert low <= found["metrics"][metric] <= high
        assert found["samples"]
    sft = json.loads((folder / "eval_sft" / "eval.json").read_text())["metrics"]
    assert sft["kl"] == 0  # it is its own reference
    assert {"best_of_1/proxy", "best_of_2/proxy", "optimum/0.5"} <= set(sft)
    judged = json.loads((folder / "eval_reward" / "eval.json").read_text())
    assert 0 <= judged["metrics"]["accuracy"] <= 1
    base = metrics(folder / "base")
    assert base[-1]["loss"] < base[0]["loss"]
    for name in ("ppo-0", "ppo-1"):
        lines = metrics(folder / name)
        assert [line["ratio/first_off"] for line in lines] == [0, 0]
        assert lines[0]["kl"] == 0
    rankings = read_jsonl(folder / "rankings" / "rankings.jsonl")
    assert all(len(row["completions"]) == len(row["ranks"]) for row in rankings)


def test_the_report_shows_every_run(folder):
    [page] = (folder / "report").glob("*.html")
    text = page.read_text()
    assert "<svg" in text
    for word in ("SFT", "DPO", "PPO 0.5", "PPO 0.03", "reward_model"):
        assert word in text
    _, runs = read_runs([folder])
    assert len(runs) == 15
    assert all(run.finished for run in runs)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["dpo", "ppo-1"])
def test_transformers_says_the_same_of_an_exported_policy(folder, name):
    import jax.numpy as jnp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxrlhf.models.config import Runtime
    from jaxrlhf.models.heads import logits
    from jaxrlhf.models.transformer import hidden_states

    export = folder / name / "export"
    row = read_jsonl(folder / "rankings" / "pairs_eval.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = np.asarray([tokenizer(row["prompt"] + row["chosen"])["input_ids"]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(export)(torch.tensor(ids)).logits.numpy()
    model = load_hf(export)
    ones = jnp.ones_like(jnp.asarray(ids))
    positions = jnp.arange(ids.shape[1])[None]
    hidden = hidden_states(model.params, model.config, Runtime(), jnp.asarray(ids), positions, ones)
    np.testing.assert_allclose(logits(model.params, model.config, hidden), theirs, atol=1e-4)


def test_a_reward_model_judges_finished_completions_after_eos(folder, tmp_path, capsys):
    row = read_jsonl(folder / "rankings" / "pairs_eval.jsonl")[0]
    data, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    data.write_text(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}))
    command = ["score", "-m", str(folder / "reward_model" / "export"), str(data), "-o", str(out)]
    found = {}
    for finished in ("false", "true"):
        assert cli.main([*command, f"append_eos={finished}"]) == 0
        assert ("append_eos=true" in capsys.readouterr().out) == (finished == "false")
        found[finished] = read_jsonl(out)[0]["reward"]
    assert found["false"] != found["true"]


@pytest.mark.torch
def test_transformers_gives_the_same_scores_as_the_exported_reward_model(folder, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export = folder / "reward_model" / "export"
    pairs = folder / "rankings" / "pairs_eval.jsonl"
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in read_jsonl(pairs)[:4]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.jsonl"
    assert cli.main(["score", "-m", str(export), str(data), "-o", str(out)]) == 0
    ours = [row["reward"] for row in read_jsonl(out)]
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForSequenceClassification.from_pretrained(export)
    batch = tokenizer(
        [r["prompt"] + r["completion"] for r in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
