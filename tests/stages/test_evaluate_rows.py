# SPDX-License-Identifier: Apache-2.0
"""Evaluation on comparisons: what training held out, implicit rewards, and the floor."""

import json

import numpy as np
import pytest
from tiny import read_jsonl, run, write_jsonl

from jaxrlhf.errors import ConfigError, DataError


def found(folder, **keys):
    assert run("eval", folder, **{"data.max_length": 64, "batch_size": 8, **keys}).exit_code == 0
    return json.loads((folder / "eval.json").read_text())


def test_what_training_held_out_is_judged_alike(tiny, models, tmp_path):
    keys = {"data.train": str(tiny.pairs), "data.eval_fraction": 0.2}
    metrics = found(tmp_path, model=str(models.judge), **keys)["metrics"]
    trained = json.loads((models.judge / "summary.json").read_text())["metrics"]
    for name in ("accuracy", "pair_loss", "ece", "accuracy/longer_wins"):
        np.testing.assert_allclose(metrics[name], trained[f"eval/{name}"], rtol=1e-5, err_msg=name)


def test_the_floor_is_learnt_from_the_rows_to_learn_from(tiny, models, tmp_path):
    rows = read_jsonl(tiny.pairs)
    polite = [{**row, "chosen": " thanks", "rejected": row["rejected"]} for row in rows]
    unknown = [{**row, "chosen": " qqq", "rejected": " zzz zzz zzz"} for row in rows[:10]]
    train = write_jsonl(tmp_path / "train.jsonl", polite)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*polite[:30], *unknown])
    keys = {"data.train": str(train), "data.eval": str(held_out), "eval.baselines": True}
    told = found(tmp_path / "eval", model=str(models.judge), **keys)
    assert told["count"] == 40
    # thirty are told apart by a word; of the others it knows none: ties, counted half
    assert told["metrics"]["accuracy/bag_of_words"] == pytest.approx(35 / 40)
    low, high = told["intervals"]["accuracy/bag_of_words"]
    assert low < 35 / 40 < high
    assert 0 < told["metrics"]["ece/bag_of_words"] < 0.5
    with pytest.raises(ConfigError, match="baselines learns from"):
        found(tmp_path, **{**keys, "model": str(models.judge), "data.train": []})


def test_an_implicit_reward_is_a_difference_from_the_reference(tiny, models, tmp_path):
    keys = {"model": str(models.base), "data.train": str(tiny.pairs), "data.folds": 4}
    same = found(tmp_path / "same", **keys, reference=str(models.base))
    assert same["metrics"]["accuracy"] == 0.5
    assert same["metrics"]["margin/std"] == 0
    assert same["metrics"]["pair_loss"] == pytest.approx(np.log(2))
    own = found(tmp_path / "own", **keys)
    assert own["metrics"]["margin/std"] > 0
    assert "own completion log-probs" in own["notes"][0]


def test_scores_come_in_the_order_of_the_data(tiny, models, tmp_path):
    rows = [{"prompt": "", "completion": "thanks " * n + "please"} for n in (9, 1, 6, 3, 8, 2, 5)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    keys = {"model": str(models.base), "data": str(data), "batch_size": 2}
    assert run("score", tmp_path / "run", **keys).exit_code == 0
    counts = [len(row["token_ids"]) for row in read_jsonl(tmp_path / "run" / "scores.jsonl")]
    assert np.argsort(counts).tolist() == np.argsort([len(r["completion"]) for r in rows]).tolist()


def test_intervals_cover_what_was_asked_for(tiny, models, tmp_path):
    held_out = write_jsonl(tmp_path / "text.jsonl", read_jsonl(tiny.text)[:24])
    for name, model, data in (
        ("text", models.base, held_out),
        ("pairs", models.judge, tiny.pairs),
    ):
        widths = []
        for level in (0.5, 0.99):
            keys = {"data.eval": str(data), "eval.confidence": level, "data.max_length": 32}
            told = found(tmp_path / f"{name}-{level}", model=str(model), **keys)
            assert told["level"] == level
            low, high = told["intervals"]["accuracy" if name == "pairs" else "nats_per_token"]
            widths.append(high - low)
        assert widths[0] < 0.5 * widths[1]


def test_prompts_are_read_as_data_says(models, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "where is my order"}, {"x": 1}])
    keys = {"model": str(models.base), "prompts": str(prompts), "sampling.max_new_tokens": 4}
    with pytest.raises(DataError, match=r"prompts.jsonl:2"):
        found(tmp_path / "bad", **keys)
    skip = keys | {"data.on_bad_row": "skip"}
    for limit in ({"data.max_length": 2}, {"data.max_prompt_length": 2}):
        with pytest.raises(DataError, match=r"prompts.jsonl:1: \d+ tokens, more than"):
            found(tmp_path / "long", **skip, **limit, **{"data.truncation": "error"})
    assert found(tmp_path / "one", **skip)["count"] == 1
