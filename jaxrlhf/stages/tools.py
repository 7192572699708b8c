# SPDX-License-Identifier: Apache-2.0
"""Small commands around a model or a data set: export, report, chat, data show, data pairs."""

import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config.stages import (
    ChatConfig,
    DataPairsConfig,
    DataShowConfig,
    ExportConfig,
    ReportConfig,
)
from jaxrlhf.data import pairs
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.show import show
from jaxrlhf.data.tokenizer import decode_continuation, load_tokenizer
from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models.quantization import is_quantized
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.models.weights import load_hf, save_hf
from jaxrlhf.report import write_report
from jaxrlhf.sampling import make_sampler
from jaxrlhf.stages.adapted import merged, write_adapter
from jaxrlhf.stages.card import merged_card
from jaxrlhf.stages.completions import stop_ids, without_stop
from jaxrlhf.stages.models import Model, open_model, quantized_base
from jaxrlhf.stages.reward import unused_token
from jaxrlhf.stages.rows import source_specs
from jaxrlhf.stages.training import stage_key
from jaxrlhf.train.digest import content_digest
from jaxrlhf.types import LMBatch, Params


def export(config: ExportConfig, output: Path, mesh: Mesh) -> tuple[dict[str, float], list[str]]:
    """A model as an HF folder (an adapter merged into it) or an adapter as a PEFT folder, read back
    and compared bit by bit; merged weights also by the logits they give."""
    model = _to_export(config, mesh)
    if config.format != "hf" and model.adapted is None:
        raise ConfigError(
            f"format = {config.format}: {model.source} is no adapter but a whole model; say hf"
        )
    folder = Path(config.output) if config.output else output / "export"
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: nothing there is overwritten; name another -o")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if config.format == "peft":
        assert model.adapted is not None
        write_adapter(partial, model.params, model.adapted, model.config, model.kind)
    else:
        whole, card = model, None
        if model.adapted is not None or is_quantized(model.params):
            whole = merged(model, config.model.param_dtype)
            print(f"export: {merging_error(model, whole)}", flush=True)
            card = merged_card(model)
        save_hf(
            partial,
            whole.params,
            model.config,
            kind=model.kind,
            pad_token_id=unused_token(model) if model.kind == "reward" else None,
            hf_config=model.hf_config,
            model_card=card,
        )
        back = load_hf(partial, kind=model.kind)
        if content_digest(back.params) != content_digest(whole.params):
            raise ModelError(f"{partial}: the exported weights differ when read back")
    model.tokenizer.save_pretrained(partial)
    if folder.exists():
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    print(f"export: {model.source} is in {folder}", flush=True)
    return {}, []


def _to_export(config: ExportConfig, mesh: Mesh) -> Model:
    """The model as it is to be exported: an adapter of a quantized base on that very base, unless
    `onto` says the original or `model.quantize` something else."""
    section = config.model
    if section.quantize is None and config.onto == "trained" and config.format != "peft":
        assert section.path is not None
        section = section.model_copy(update={"quantize": quantized_base(section.path)})
    return open_model(section, mesh)


def merging_error(model: Model, whole: Model) -> str:
    """How far a merged model's outputs are from those of base and adapter, on random tokens.

    Raises:
        ModelError: by more than rounding explains.
    """
    size = (4, min(64, model.config.max_positions))
    tokens = jax.random.randint(jax.random.key(0), size, 0, model.config.vocab_size)
    rows = LMBatch(
        tokens,
        jnp.broadcast_to(jnp.arange(size[1]), size),
        jnp.ones(size, jnp.int32),
        jnp.ones(size, bool),
    )
    outputs = row_scores if model.kind == "reward" else row_logprobs

    @jax.jit
    def difference(a: Params, b: Params) -> tuple[jax.Array, jax.Array]:
        x, y = (outputs(params, model.config, model.runtime, rows) for params in (a, b))
        return jnp.abs(x - y).max(), jnp.abs(x).max()

    off, largest = map(float, difference(model.params, whole.params))
    what = "scores" if model.kind == "reward" else "log-probs"
    # Of rounding to float32, or to bfloat16 with its 8 bits.
    bound = (1e-3 if model.runtime.dtype == "float32" else 0.1) * max(1.0, largest)
    if not off <= bound:
        raise ModelError(f"{model.source}: merged, its {what} are off by {off:.2g} ({bound:.2g})")
    if model.adapted is None:
        return f"multiplied out, its {what} are within {off:.2g} of those of the quantized model"
    return f"merged, its {what} are within {off:.2g} of those of base and adapter"


def report(config: ReportConfig, output: Path) -> tuple[dict[str, float], list[str]]:
    """The page; in a pipeline it lies in the report's own folder."""
    path = Path(config.output) if config.output else output / "report.html"
    written = write_report([Path(run) for run in config.runs], path)
    print(f"report: {written}", flush=True)
    return {}, [written.name] if written.parent == output else []


def chat(config: ChatConfig, mesh: Mesh) -> None:
    """Reads lines from the terminal and answers; an empty line or end of input leaves."""
    model = open_model(config.model, mesh, kind="lm", frozen=True)
    tokenizer, sampling = model.tokenizer, config.sampling
    talks = config.template is not None or tokenizer.chat_template is not None
    sampler = make_sampler(
        model.config,
        model.runtime,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop_ids=stop_ids(sampling, model),
        batch_size=1,
    )
    turns = [{"role": "system", "content": config.system}] if config.system else []
    print(
        "an empty line ends the chat"
        if talks
        else "no chat template: the model continues your text"
    )
    key = stage_key(config.seed, "chat")
    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        turns.append({"role": "user", "content": line})
        ids = encode_prompt(turns if talks else line, tokenizer, template=config.template)
        [found] = sampler(model.params, [ids], jax.random.fold_in(key, number))
        text = decode_continuation(tokenizer, ids, without_stop(found, tokenizer))
        print(text.strip() if talks else line + text, flush=True)
        turns.append({"role": "assistant", "content": text.strip()})
        number += 1


def data_show(config: DataShowConfig) -> None:
    """Rows as the model will see them."""
    place = config.model.tokenizer or config.model.path
    if place is None:
        raise ConfigError(
            "model.path: is needed to tokenize; give -m MODEL or model.tokenizer=PATH"
        )
    run = Path(place) / "tokenizer"
    data = config.data
    show(
        source_specs(data.train),
        load_tokenizer(run if run.is_dir() else place),
        rows=config.rows,
        max_length=data.max_length,
        template=data.template,
        truncation=data.truncation,
        completion_only=data.completion_only,
        on_bad_row=data.on_bad_row,
        seed=config.seed,
    )


def data_pairs(config: DataPairsConfig) -> None:
    """Rankings or ratings to pairs, into a file or onto standard output."""
    specs = source_specs(config.data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(config.output) if config.output else Path(folder) / "pairs.jsonl"
        counts = pairs.write_pairs(specs, path, how=config.pairs, ties=config.ties)
        if config.output:
            print(f"data pairs: {json.dumps(counts)} in {path}", flush=True)
        else:
            print(path.read_text(encoding="utf-8"), end="")
