# SPDX-License-Identifier: Apache-2.0
"""The model card that goes with an exported model."""

from typing import Any

from jaxrlhf.config.load import to_yaml
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.stages.recipe import Recipe

METHODS = {
    "pretrain": "language modelling on plain text",
    "sft": "supervised fine-tuning",
    "reward": "reward modelling on comparisons (Bradley-Terry)",
    "dpo": "preference optimisation on comparisons",
    "ppo": "reinforcement learning (PPO)",
}


def model_card(
    command: str, config: TrainingConfig, recipe: Recipe, metrics: dict[str, float]
) -> str:
    """README.md of the exported folder: what it is, how it was made, how to use it."""
    reward = recipe.kind == "reward"
    front = ["---", "library_name: transformers", "tags:", "- jaxrlhf", f"- {command}", "---"]
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    lines = [
        *front,
        f"# {'Reward model' if reward else 'Language model'}, trained with jaxrlhf",
        "",
        f"Method: {METHODS[command]}. Starting point: `{_origin(config)}`.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {auto}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder)",
        "```",
        "",
    ]
    if reward:
        lines += [
            f"`pad_token_id` is {recipe.pad_token_id}, an id that never occurs as a real token: "
            "transformers reads the score at the last token that is not padding, so padding with "
            "the end-of-text token would read it one token too early. The score is meant to be "
            "read at the end-of-text token: append it to the text.",
            "",
        ]
    rows = _rows(metrics)
    if rows:
        lines += ["## Figures at the end of training", "", "| metric | value |", "|---|---|", *rows]
    told = config.model_copy(update={"output_dir": None})  # where it ran is nobody's business
    lines += ["", "## Settings", "", "```yaml", to_yaml(told).rstrip(), "```", ""]
    return "\n".join(lines)


def _origin(config: TrainingConfig) -> str:
    return config.model.path or "fresh weights"


def _rows(metrics: dict[str, Any]) -> list[str]:
    return [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
