# SPDX-License-Identifier: Apache-2.0
"""The embedded world's files, and rankings by its simulated labelers."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config.stages import LabelConfig, WorldConfig
from jaxrlhf.data import sources
from jaxrlhf.data.pairs import to_pairs
from jaxrlhf.data.synthetic import World, label_rankings
from jaxrlhf.errors import DataError
from jaxrlhf.stages.rows import renamed


def write_world(config: WorldConfig, output: Path) -> tuple[dict[str, float], list[str]]:
    """pretrain, demonstrations, prompts_train, prompts_eval (.jsonl) and tokenizer/."""
    sizes = config.sizes
    seed = config.seed if config.world_seed is None else config.world_seed
    world = World(seed, vocab_size=sizes.vocabulary)
    world.write(
        output,
        pretraining=sizes.pretraining,
        demonstrations=sizes.demonstrations,
        prompts_train=sizes.prompts_train,
        prompts_eval=sizes.prompts_eval,
    )
    # What a labelling stage needs to meet the same labelers again.
    settings = {"seed": seed, "vocab_size": sizes.vocabulary}
    (output / "world.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    files = ["pretrain.jsonl", "demonstrations.jsonl", "prompts_train.jsonl", "prompts_eval.jsonl"]
    print(f"world: {output}: {', '.join(files)}, tokenizer", flush=True)
    return {}, [*files, "tokenizer/tokenizer.json", "world.json"]


def read_world(folder: Path) -> World:
    """The world whose files a world stage wrote into `folder`."""
    try:
        settings = json.loads((folder / "world.json").read_text(encoding="utf-8"))
        return World(settings["seed"], vocab_size=settings["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: no world.json there; `world` is the folder a world stage wrote"
        ) from error


def label(config: LabelConfig, output: Path) -> tuple[dict[str, float], list[str]]:
    """rankings.jsonl, and the comparisons made of them: pairs_train.jsonl, pairs_eval.jsonl.

    Prompts are held out whole. The figure `accuracy/ceiling` is how often the labelers' mean
    utility agrees with the single, noisy ranking on the held-out pairs: no reward model, however
    good, can be expected to agree with them more often.
    """
    assert config.world is not None
    world = read_world(Path(config.world))
    rows = label_rankings(_grouped(config), world, config.seed)
    held_out: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    agree: list[float] = []
    for row in rows:
        evaluated = _share(row["prompt"], config.seed) < config.eval_fraction
        # What is held out stays whole: the figures of two ways to train are about the same pairs.
        how = "all" if evaluated else config.pairs
        for better, worse, _ in to_pairs([-rank for rank in row["ranks"]], how=how):
            texts = row["completions"]
            if texts[better] == texts[worse]:
                continue  # the same words twice: nothing to prefer
            pair = {"prompt": row["prompt"], "chosen": texts[better], "rejected": texts[worse]}
            (held_out if evaluated else training).append(pair)
            if evaluated:
                gap = row["utilities"][better] - row["utilities"][worse]
                agree.append(0.5 if gap == 0 else float(gap > 0))
    if not training or not held_out:
        raise DataError(
            f"label: {len(training)} training and {len(held_out)} held-out pairs came of "
            f"{len(rows)} prompts; give more completions, or another eval_fraction"
        )
    for name, content in (
        ("rankings.jsonl", rows),
        ("pairs_train.jsonl", training),
        ("pairs_eval.jsonl", held_out),
    ):
        with open(output / name, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    metrics = {
        "pairs_train": float(len(training)),
        "pairs_eval": float(len(held_out)),
        "accuracy/ceiling": float(np.mean(agree)),
    }
    print(
        f"label: {len(rows)} prompts ranked by {len(world.labelers)} labelers, "
        f"{len(training)} + {len(held_out)} pairs, ceiling {metrics['accuracy/ceiling']:.3f}",
        flush=True,
    )
    return metrics, ["rankings.jsonl", "pairs_train.jsonl", "pairs_eval.jsonl"]


def _grouped(config: LabelConfig) -> list[dict[str, Any]]:
    """Rows {prompt, completions}: the completions of each prompt gathered, in order."""
    grouped: dict[str, list[str]] = {}
    for source in config.completions:
        with renamed({sources.SKIPPING: ""}):
            found = sources.load_rows(source.model_dump())
        for row, origin in zip(found, found.origins, strict=True):
            if "prompt" not in row or "completion" not in row:
                raise DataError(f"{origin}: prompt and completion are needed; it has {sorted(row)}")
            grouped.setdefault(row["prompt"], []).append(row["completion"])
    return [{"prompt": p, "completions": c} for p, c in grouped.items() if len(c) > 1]


def _share(prompt: str, seed: int) -> float:
    """A number in [0, 1) that is the prompt's own: it decides on which side of the split it is."""
    return zlib.crc32(f"{seed}/{prompt}".encode()) / 2**32
