# SPDX-License-Identifier: Apache-2.0
"""Small commands around a model or a data set: report, chat, data show, data pairs."""

import io
import json
import sys
import tempfile
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxrlhf.config.stages import (
    ChatConfig,
    DataPairsConfig,
    DataShowConfig,
    ReportConfig,
)
from jaxrlhf.data import pairs, sources
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.show import escape, show
from jaxrlhf.data.templates import choose_template
from jaxrlhf.data.tokenizer import add_control_tokens, decode_continuation, load_tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.report import write_report
from jaxrlhf.sampling import make_sampler
from jaxrlhf.stages.completions import stop_ids, without_stop
from jaxrlhf.stages.models import open_model
from jaxrlhf.stages.outputs import check_output
from jaxrlhf.stages.room import check_sampling
from jaxrlhf.stages.rows import renamed, source_specs
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import stage_key


def report(config: ReportConfig, output: Path) -> tuple[dict[str, float], list[str]]:
    """The page; in a pipeline it lies in the report's own folder."""
    path = Path(config.output) if config.output else output / "report.html"
    written = write_report([Path(run) for run in config.runs], path)
    print(f"report: {written}", flush=True)
    return {}, [written.name] if written.parent == output else []


def chat(config: ChatConfig, mesh: Mesh) -> None:
    """Reads lines from the terminal and answers; an empty line or end of input leaves.

    What the terminal would obey in an answer is spelled out, what is no UTF-8 in a line replaced.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    model = open_model(config.model, mesh, kind="lm", frozen=True)
    sampling = config.sampling
    talks = config.template is not None or model.tokenizer.chat_template is not None
    if talks:
        with renamed({"data.template": "template"}):
            model = talking(model, [choose_template(model.tokenizer, config.template)])
    tokenizer = model.tokenizer
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
        with renamed({"data.template": "template"}):
            ids = encode_prompt(turns if talks else line, tokenizer, template=config.template)
        check_sampling(model, len(ids), sampling.max_new_tokens)
        [found] = sampler(model.params, [ids], jax.random.fold_in(key, number))
        text = decode_continuation(tokenizer, ids, without_stop(found, tokenizer))
        print(escape(text.strip() if talks else line + text), flush=True)
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
    tokenizer = load_tokenizer(run if run.is_dir() else place)
    add_control_tokens(tokenizer, config.model.add_tokens)
    show(
        source_specs(data.train),
        tokenizer,
        rows=config.rows,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        template=data.template,
        truncation=data.truncation,
        completion_only=data.completion_only,
        append_eos=data.append_eos,
        on_bad_row=data.on_bad_row,
        seed=config.seed,
    )


def data_pairs(config: DataPairsConfig) -> None:
    """Rankings or ratings to pairs, into a file or onto standard output."""
    specs = source_specs(config.data)
    with tempfile.TemporaryDirectory() as folder, renamed({sources.SKIPPING: ""}):
        path = Path(config.output) if config.output else Path(folder) / "pairs.jsonl"
        check_output(path)
        counts = pairs.write_pairs(
            specs, path, how=config.pairs, ties=config.ties, seed=config.seed
        )
        if config.output:
            print(f"data pairs: {json.dumps(counts)} in {path}", flush=True)
        else:
            print(path.read_text(encoding="utf-8"), end="")
