# SPDX-License-Identifier: Apache-2.0
"""Completions of prompts, as rows {prompt, completion, token_ids, logprobs, finish_reason}."""

import json
import tempfile
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrlhf.config.stages import GenerateConfig
from jaxrlhf.data.encode import PromptSet, encode_prompts
from jaxrlhf.data.show import escape
from jaxrlhf.data.sources import SKIPPING
from jaxrlhf.parallel.distributed import is_primary
from jaxrlhf.stages.completions import Completions, make_completer
from jaxrlhf.stages.models import Model, open_model
from jaxrlhf.stages.outputs import check_output, write_jsonl
from jaxrlhf.stages.rows import renamed, source_specs
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import stage_key

# What the stage calls the settings of data that errors about prompts speak of.
KEYS = {
    "data.max_length": "max_prompt_length",
    "data.truncation": "truncation",
    "data.template": "template",
    "'data.train={": "'prompts={",
    SKIPPING: "",
}


def prompts_of(config: GenerateConfig, model: Model) -> PromptSet:
    """The prompts given as text, then those of the sources."""
    specs: list[Any] = source_specs(config.prompts)
    with tempfile.TemporaryDirectory() as folder, renamed(KEYS):
        if config.prompt:
            file = Path(folder) / "prompt.jsonl"
            rows = [json.dumps({"prompt": text}) + "\n" for text in config.prompt]
            file.write_text("".join(rows), encoding="utf-8")
            specs = [{"source": str(file)}, *specs]
        return encode_prompts(
            specs,
            model.tokenizer,
            max_length=config.max_prompt_length,
            template=config.template,
            truncation=config.truncation,
            vocab_size=model.config.vocab_size,
            seed=config.seed,
        )


def completions_of(config: GenerateConfig, mesh: Mesh) -> Completions:
    """The completions that a configuration asks for."""
    model = open_model(config.model, mesh, kind="lm", frozen=True)
    prompts = prompts_of(config, model)
    model = talking(model, prompts.templates)
    complete = make_completer(model, config.sampling, mesh)
    return complete(model.params, prompts, config.n, stage_key(config.seed, "generate"))


def generate(
    config: GenerateConfig, output: Path, mesh: Mesh
) -> tuple[dict[str, float], list[str]]:
    """Writes the completions; prints them where the prompts were given as text."""
    path = Path(config.output) if config.output else output / "completions.jsonl"
    check_output(path)
    found = completions_of(config, mesh)
    if is_primary():
        if config.prompt and not config.prompts:
            for prompt, text in zip(found.prompts, found.texts, strict=True):
                print(escape(f"{prompt}{text}\n"), flush=True)
        if config.output or output != Path():
            write_jsonl(path, rows_of(found))
            print(f"generate: {len(found)} completions in {path}", flush=True)
    metrics = {
        "completions": float(len(found)),
        "completions/mean_length": float(found.lengths.mean()),
        "completions/eos_rate": sum(r == "stop" for r in found.finish_reasons) / len(found),
    }
    return metrics, [path.name] if path.parent == output else []


def rows_of(found: Completions) -> list[dict[str, Any]]:
    """Completions as rows of a jsonl file. The prompt's other columns come along, save those that
    have the name of what was sampled."""
    sampled = {
        "prompt": found.prompts,
        "completion": found.texts,
        "token_ids": found.token_ids,
        "logprobs": found.logprobs,
        "finish_reason": found.finish_reasons,
    }
    columns = sampled | {k: v for k, v in found.columns.items() if k not in sampled}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(found))]
