# SPDX-License-Identifier: Apache-2.0
"""Run directories as a whole pipeline would leave them, made up from a seed.

python tests/report/made_up_runs.py FOLDER     # look at one
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import yaml

from jaxrlhf.evaluation.calibration import judge_pairs
from jaxrlhf.evaluation.goodhart import best_of_n_curve, optimum_curve
from jaxrlhf.evaluation.results import EvalResult, Sample, write_results
from jaxrlhf.evaluation.winrate import compare

PROMPTS = [
    "My blue kettle arrived with a cracked lid. What can you do?",
    "hi, the lamp i ordered never came",
    "I would like to return the green backpack, it is too small for me.",
    "You charged me twice for the same headphones!!",
    "Can I still change the address for my order of two chairs?",
    "The desk is missing four screws and the manual.",
    "Is the silver watch waterproof?",
    "The red scarf lost its colour after one wash, and I am quite unhappy about it.",
]
ITEMS = ["kettle", "lamp", "backpack", "headphones", "chairs", "desk", "watch", "scarf"]
REPLIES = {
    "sft": "Thank you for writing. Please send the item back.",
    "dpo": "I am sorry about that. We will send you a replacement for the item today.",
    "ppo 0.2": "I am sorry to hear that. We will replace the item, and it ships today.",
    "ppo 0.05": "I am very sorry about the damaged item. A replacement ships today at no cost, "
    "and you may keep the old one.",
    "ppo 0.01": "I am so so sorry, thank you so much for your patience, thank you, so sorry.",
    "ppo 0.002": "thank you thank you so sorry thank you so much thank you so sorry thank you so "
    "much thank you so sorry thank you so much thank you",
    "best of 16": "I am sorry about the broken item. We will refund you in full this week.",
}
#         gold  proxy   kl   length  entropy distinct2 repetition eos
TRUTH = {
    "sft": (0.46, -0.05, 0.0, 18, 1.45, 0.52, 0.02, 0.98),
    "dpo": (0.61, 0.95, 4.1, 24, 1.10, 0.47, 0.03, 0.97),
    "ppo 0.2": (0.57, 0.71, 1.4, 20, 1.31, 0.50, 0.02, 0.98),
    "ppo 0.05": (0.70, 1.60, 5.2, 25, 1.02, 0.45, 0.04, 0.97),
    "ppo 0.01": (0.60, 2.35, 14.0, 33, 0.61, 0.30, 0.16, 0.93),
    "ppo 0.002": (0.33, 3.10, 34.0, 46, 0.20, 0.09, 0.58, 0.61),
    "best of 16": (0.58, 1.05, 1.84, 21, 1.40, 0.51, 0.02, 0.98),
}


def write_json(path: Path, data) -> None:
    path.write_text(json.dumps(data, indent=1))


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def run_folder(folder: Path, stage: str, steps: int, config: dict, curves, parents=(), seconds=30):
    """One finished run; `curves` is step -> (train metrics, eval metrics or None)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            train, held_out = curves(step)
            row = {"step": step, "split": "train", **train, "time/step": 0.1}
            file.write(json.dumps(row) + "\n")
            if held_out:
                file.write(json.dumps({"step": step, "split": "eval", **held_out}) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage": stage, "seed": 0, **config}))
    write_json(
        folder / "summary.json",
        {
            "stage": stage,
            "steps_done": steps,
            "steps_planned": steps,
            "wall_seconds": seconds,
            "tokens": steps * 4096,
            "parents": {f"parent.{i}": digest(p) for i, p in enumerate(parents)},
            "content": digest(folder.name),
            "exit_reason": "done",
        },
    )
    write_json(
        folder / "environment.json",
        {"python": "3.11.7", "jax": "0.10.2", "devices": ["cpu"], "commit": "0a4c603"},
    )
    return folder


def lm_curves(rng, start: float, end: float, steps: int):
    def curves(step):
        t = step / steps
        loss = end + (start - end) * math.exp(-5 * t)
        noise = rng.normal(0, 0.04)
        held_out = {"loss": loss + 0.05 * t, "perplexity": math.exp(loss + 0.05 * t)}
        rate = 1e-3 * (1 - t)
        train = {"loss": loss + noise, "learning_rate": rate, "grad_norm": 1 + abs(noise) * 9}
        return train, held_out if step % max(1, steps // 8) == 0 else None

    return curves


def evaluation(label: str, rng) -> EvalResult:
    """A policy judged on 512 made-up completions."""
    gold, proxy, kl, length, entropy, distinct, repetition, eos = TRUTH[label]
    draw = np.random.default_rng(7)
    base_gold = np.clip(draw.normal(TRUTH["sft"][0], 0.28, 512), 0, 1)
    base_proxy = draw.normal(TRUTH["sft"][1], 0.9, 512)
    mine = np.clip(base_gold + gold - base_gold.mean() + rng.normal(0, 0.25, 512), 0, 1)
    said = base_proxy + proxy - base_proxy.mean() + rng.normal(0, 0.5, 512)
    prompt = np.arange(512) // 4
    if label == "sft":
        mine, said = base_gold, base_proxy
    comparisons = () if label == "sft" else (
        compare("gold", "sft", base_gold, mine, clusters=prompt),
        compare("proxy", "sft", base_proxy, said, clusters=prompt),
    )  # fmt: skip
    intervals = {
        "gold": compare("gold", "0", np.zeros(512), mine, clusters=prompt).interval,
        "proxy": compare("proxy", "0", np.zeros(512), said, clusters=prompt).interval,
    }
    samples = tuple(
        Sample(
            p,
            REPLIES[label].replace("item", ITEMS[i]),
            {"gold": float(mine[4 * i]), "proxy": float(said[4 * i])},
            length,
            "stop",
        )
        for i, p in enumerate(PROMPTS)
    )
    base = rng.normal(-0.05, 0.9, (16, 600))
    return EvalResult(
        model=f"runs/world/{label}",
        label=label,
        is_baseline=label == "sft",
        baseline="" if label == "sft" else "sft",
        count=512,
        names={"proxy": "reward model score", "gold": "gold score"},
        metrics={
            "gold": float(mine.mean()),
            "proxy": float(said.mean()),
            "kl": kl,
            "entropy": entropy,
            "distinct_1": distinct / 2,
            "distinct_2": distinct,
            "repetition": repetition,
            "completions/mean_length": length,
            "completions/eos_rate": eos,
        },
        intervals=intervals,
        comparisons=comparisons,
        curve=tuple(
            best_of_n_curve(base, 0.46 + 0.11 * base - 0.02 * base**2, ns=(2, 4, 8, 16, 32))
            + optimum_curve(base)
        )
        if label == "sft"
        else (),
        samples=samples,
    )


def reward_result(rng) -> EvalResult:
    """A reward model judged on 800 made-up pairs."""
    margins = rng.normal(0, 1.6, 800)
    flips = rng.random(800) < 1 / (1 + np.exp(-0.8 * margins))
    margins = np.where(flips, np.abs(margins), -np.abs(margins)) * np.where(margins > 0, 1, -1)
    lengths = rng.integers(6, 40, (2, 800))
    metrics, intervals, table = judge_pairs(
        margins, np.zeros(800), chosen_lengths=lengths[0], rejected_lengths=lengths[1]
    )
    metrics |= {"accuracy/bag_of_words": 0.641, "accuracy/ceiling": 0.781}
    return EvalResult(
        "runs/world/reward", "reward model", count=800, metrics=metrics, intervals=intervals,
        calibration=table,
    )  # fmt: skip


def make_pipeline(folder: Path, seed: int = 0) -> Path:
    """pretrain, SFT, reward model, DPO, a PPO sweep, best-of-n, an evaluation of each."""
    rng = np.random.default_rng(seed)
    stages = []

    def stage(name, kind, parents, seconds, status="done"):
        stages.append(
            {"name": name, "stage": kind, "dir": name, "status": status, "seconds": seconds,
             "parents": list(parents)}
        )  # fmt: skip
        return folder / name

    optim = {"optim": {"name": "adamw", "learning_rate": 1e-3}, "train": {"batch_size": 64}}
    run_folder(stage("pretrain", "pretrain", [], 41), "pretrain", 400, optim,
               lm_curves(rng, 6.2, 2.1, 400))  # fmt: skip
    run_folder(stage("sft", "sft", ["pretrain"], 22.4), "sft", 200, optim,
               lm_curves(rng, 2.4, 1.3, 200), ["pretrain"])  # fmt: skip

    def reward_curves(step):
        t = step / 150
        metrics = {"loss": 0.69 - 0.22 * (1 - math.exp(-4 * t)),
                   "rewards/accuracies": 0.5 + 0.24 * (1 - math.exp(-5 * t)),
                   "rewards/margins": 1.1 * t}  # fmt: skip
        noisy = {k: v + rng.normal(0, 0.03) for k, v in metrics.items()}
        return noisy, metrics if step % 15 == 0 else None

    reward = stage("reward", "reward", ["sft"], 31)
    run_folder(reward, "reward", 150, optim, reward_curves, ["sft"])
    write_results(reward, [reward_result(rng)])
    run_folder(stage("dpo", "dpo", ["sft"], 35), "dpo", 150,
               {"loss": {"name": "dpo", "beta": 0.1}}, reward_curves, ["sft"])  # fmt: skip

    for coef in (0.2, 0.05, 0.01, 0.002):
        name = f"ppo {coef}"
        gold, proxy, kl, length, entropy, *_ = TRUTH[name]

        def ppo_curves(step, gold=gold, proxy=proxy, kl=kl, length=length, entropy=entropy):
            t = 1 - math.exp(-4 * step / 100)
            metrics = {
                "reward/mean": proxy * t, "kl": kl * t, "entropy": 1.45 + (entropy - 1.45) * t,
                "completions/mean_length": 18 + (length - 18) * t, "clip_ratio": 0.12 * (1 - t / 2),
                "value_loss": 0.5 * math.exp(-3 * t), "policy_loss": -0.02 * t,
                "learning_rate": 3e-4 * (1 - step / 100),
            }  # fmt: skip
            noisy = {k: v * (1 + rng.normal(0, 0.05)) for k, v in metrics.items()}
            gold_now = 0.46 + (gold - 0.46) * t
            return noisy, {"gold": gold_now, "proxy": proxy * t} if step % 10 == 0 else None

        run_folder(stage(name, "ppo", ["sft", "reward"], 48), "ppo", 100,
                   {"rl": {"kl_coef": coef, "clip_eps": 0.2}, "output_dir": name}, ppo_curves,
                   ["sft", "reward"])  # fmt: skip
    for label in TRUTH:
        parents = ["sft"] if label in ("sft", "best of 16") else [label]
        place = stage(f"eval {label}", "eval", parents, 4.2)
        write_results(place, [evaluation(label, rng)])
        write_json(place / "summary.json", {"stage": "eval", "steps_done": 1, "steps_planned": 1})
        (place / "config.yaml").write_text("stage: eval\n")
    write_json(folder / "pipeline.json", {"stages": stages})
    return folder


if __name__ == "__main__":
    from jaxrlhf.report import write_report

    target = Path(sys.argv[1])
    print(write_report([make_pipeline(target / "support world")], target / "report.html"))
