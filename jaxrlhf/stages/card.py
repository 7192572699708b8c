# SPDX-License-Identifier: Apache-2.0
"""The model card that goes with an exported model."""

from pathlib import Path
from typing import Any

from jaxrlhf.config.load import to_yaml
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.models.quantization import format_in
from jaxrlhf.stages.models import Adapted, Model
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
    lines = _head(
        command,
        recipe.kind,
        recipe.adapted,
        recipe.pad_token_id,
        f"trained with jaxrlhf\n\nMethod: {METHODS[command]}. Starting point: `{_origin(config)}`.",
    )
    rows = _rows(metrics)
    if rows:
        lines += ["## Figures at the end of training", "", "| metric | value |", "|---|---|", *rows]
    told = config.model_copy(update={"output_dir": None})  # where it ran is nobody's business
    lines += ["", "## Settings", "", "```yaml", to_yaml(told).rstrip(), "```", ""]
    return "\n".join(lines)


def export_card(
    model: Model, pad_token_id: int | None, checks: list[str], note: str | None = None
) -> str:
    """README.md of a folder that `export` wrote: what it is, how to use it, what was checked."""
    told = f"exported by jaxrlhf\n\nFrom `{Path(model.source).name}`."
    told += "" if note is None else f" {note}"
    lines = _head("export", model.kind, model.adapted, pad_token_id, told)
    lines += ["## Checked", "", *(f"- {check}" for check in checks), ""]
    return "\n".join(lines)


def merged_note(model: Model) -> str | None:
    """What is to be said of a merged model whose base was quantized, or of an adapter of one."""
    now = format_in(model.params)
    trained = model.adapted.quantized if model.adapted is not None else None
    if now is None and trained is None:
        return None
    what = "Weights" if model.adapted is None else "An adapter and its base"
    if now is None:
        return (
            f"{what}, merged. The adapter was trained on that base quantized to {trained}; here it "
            "stands on the base as it was before, so outputs differ slightly from training's."
        )
    return (
        f"{what}{', merged' if model.adapted is not None else ''}. The projections of the base "
        f"were quantized to {now} and multiplied out again: the values, in a wider dtype, with "
        "which the quantized model computes."
    )


def _head(
    tag: str, kind: str, adapted: Adapted | None, pad_token_id: int | None, told: str
) -> list[str]:
    """The lines that every card begins with."""
    reward = kind == "reward"
    ours = adapted is not None and adapted.adapter.kind == "bottleneck"  # PEFT has none
    library = "transformers" if adapted is None else "jaxrlhf" if ours else "peft"
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    lines = [
        *("---", f"library_name: {library}", "tags:", "- jaxrlhf", f"- {tag}", "---"),
        f"# {'Reward model' if reward else 'Language model'}"
        f"{'' if adapted is None else ' (adapter)'}, {told}",
        "",
        *(["PEFT has no bottleneck adapters and cannot read this folder.", ""] if ours else []),
        "```python",
        *(_loading_ours() if ours else _loading(auto, reward, adapted, pad_token_id)),
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
            f"`pad_token_id` is {pad_token_id}, an id that never occurs as a real token: "
            "transformers reads the score at the last token that is not padding, so padding with "
            "the end-of-text token would read it one token too early. The score is meant to be "
            "read at the end-of-text token: append it to the text.",
            "",
        ]
    if reward and adapted is not None and adapted.adapter.kind == "soft_prompt":
        lines += [
            "PEFT hands transformers embeddings instead of ids here, so that it reads the score at "
            "the last position, padding or not: give it one text at a time.",
            "",
        ]
    return lines


def _loading_ours() -> list[str]:
    """The lines that load an adapter that no other library knows."""
    return ["import jaxrlhf", "model = jaxrlhf.load(folder)"]


def _loading(
    auto: str, reward: bool, adapted: Adapted | None, pad_token_id: int | None
) -> list[str]:
    """The lines that load the model."""
    tokenizer = [
        f"from transformers import AutoTokenizer, {auto}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if adapted is None:
        return [*tokenizer, f"model = {auto}.from_pretrained(folder)"]
    labels = ", num_labels=1" if reward else ""
    lines = [
        *tokenizer,
        "from peft import PeftModel",
        f"base = {auto}.from_pretrained({adapted.named()!r}{labels})",
        "model = PeftModel.from_pretrained(base, folder)",
    ]
    if reward:  # the base's config knows nothing of it
        lines.append(f"model.config.pad_token_id = {pad_token_id}")
    return lines


def _origin(config: TrainingConfig) -> str:
    return config.model.path or "fresh weights"


def _rows(metrics: dict[str, Any]) -> list[str]:
    return [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
