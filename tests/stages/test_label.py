# SPDX-License-Identifier: Apache-2.0
"""The label stage: what is trained on may be chosen, what is held out is always all of it."""

import json

from jaxrlhf.config.stages import LabelConfig
from jaxrlhf.data.synthetic.world import World
from jaxrlhf.stages.world import label


def test_the_way_of_pairing_changes_only_what_is_trained_on(tmp_path):
    world = World(3)
    (tmp_path / "world.json").write_text(json.dumps({"seed": 3, "vocab_size": 448}))
    with open(tmp_path / "completions.jsonl", "w") as file:
        for prompt in world.prompts(40):
            replies = [world.oracle(prompt), "no.", "we are sorry.", world.oracle(prompt)[:20]]
            for reply in replies:
                file.write(json.dumps({"prompt": prompt.text, "completion": reply}) + "\n")

    def made(how):
        output = tmp_path / how
        output.mkdir()
        config = LabelConfig(
            world=str(tmp_path),
            completions=str(tmp_path / "completions.jsonl"),
            pairs=how,
            eval_fraction=0.3,
        )
        metrics, _ = label(config, output)
        return metrics, [
            (output / f"pairs_{part}.jsonl").read_text().splitlines() for part in ("train", "eval")
        ]

    whole, (train, held_out) = made("all")
    apart, (train_apart, held_out_apart) = made("apart")
    assert held_out_apart == held_out
    assert apart["accuracy/ceiling"] == whole["accuracy/ceiling"]
    assert len(train) == 2 * len(train_apart), "6 pairs of 4, of which 3 are two places apart"
    assert set(train_apart) < set(train)
    prompts = [{json.loads(row)["prompt"] for row in rows} for rows in (train, held_out)]
    assert not prompts[0] & prompts[1]
