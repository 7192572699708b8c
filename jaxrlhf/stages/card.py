# SPDX-License-Identifier: Apache-2.0
"""The model card that goes with an exported model."""

from typing import Any

from jaxrlhf.config.load import to_yaml
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.models.quantization import format_in
from jaxrlhf.stages.models import Model
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
    adapted = recipe.adapted
    library = "transformers" if adapted is None else "peft"
    front = ["---", f"library_name: {library}", "tags:", "- jaxrlhf", f"- {command}", "---"]
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    lines = [
        *front,
        f"# {'Reward model' if reward else 'Language model'}"
        f"{'' if adapted is None else ' (adapter)'}, trained with jaxrlhf",
        "",
        f"Method: {METHODS[command]}. Starting point: `{_origin(config)}`.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {auto}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *_loading(auto, recipe),
        "```",
        "",
    ]
    if adapted is not None and adapted.quantized is not None:
        lines += [
            f"Its base was quantized to {adapted.quantized} while it trained, so on the base as it "
            "is, which the lines above load, its outputs differ slightly from those of training. "
            "`jaxrlhf export FOLDER --format merged` makes a whole model of exactly what was "
            "trained: the base quantized and multiplied out again, plus the adapter "
            "(`onto=original`: of the base as it is).",
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


def merged_card(model: Model) -> str | None:
    """README.md of a merged model whose base was quantized, or of an adapter of such a base."""
    now = format_in(model.params)
    trained = model.adapted.quantized if model.adapted is not None else None
    if now is None and trained is None:
        return None
    what = "Weights" if model.adapted is None else "An adapter and its base"
    if now is None:
        told = (
            f"{what}, merged. The adapter was trained on that base quantized to {trained}; here it "
            "stands on the base as it was before, so outputs differ slightly from training's."
        )
    else:
        told = (
            f"{what}{', merged' if model.adapted is not None else ''}. The projections of the base "
            f"were quantized to {now} and multiplied out again: the values, in a wider dtype, with "
            "which the quantized model computes."
        )
    return "\n".join(["---", "library_name: transformers", "tags:", "- jaxrlhf", "---", told, ""])


def _loading(auto: str, recipe: Recipe) -> list[str]:
    """The lines that load the model."""
    if recipe.adapted is None:
        return [f"model = {auto}.from_pretrained(folder)"]
    labels = ", num_labels=1" if recipe.kind == "reward" else ""
    lines = [
        "from peft import PeftModel",
        f"base = {auto}.from_pretrained({recipe.adapted.named()!r}{labels})",
        "model = PeftModel.from_pretrained(base, folder)",
    ]
    if recipe.kind == "reward":  # the base's config knows nothing of it
        lines.append(f"model.config.pad_token_id = {recipe.pad_token_id}")
    return lines


def _origin(config: TrainingConfig) -> str:
    return config.model.path or "fresh weights"


def _rows(metrics: dict[str, Any]) -> list[str]:
    return [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
