# SPDX-License-Identifier: Apache-2.0
"""Log-probs or rewards of given completions.

`prompt + completion` is the exact text: BOS as the tokenizer adds it, EOS only with `append_eos`; a
chat ends its turns as its template does. Each row of the data gives one row, in order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.data import DataSection
from jaxrlhf.config.stages import ScoreConfig
from jaxrlhf.data.encode import SHORTENING, RowSet, encode_lm
from jaxrlhf.data.sources import SKIPPING, Source
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.parallel.distributed import is_primary, to_host
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.stages.models import Model, open_model
from jaxrlhf.stages.outputs import check_output, write_jsonl
from jaxrlhf.stages.room import check_rows
from jaxrlhf.stages.rows import evaluation_batches, renamed, source_specs


def score(config: ScoreConfig, output: Path, mesh: Mesh) -> tuple[dict[str, float], list[str]]:
    """Rows {logprob, token_logprobs, token_ids} of a language model, {reward} of a reward model."""
    path = Path(config.output) if config.output else output / "scores.jsonl"
    check_output(path)
    model = open_model(config.model, mesh, frozen=True)
    rows = scored_rows(source_specs(config.data), config, model)
    if model.kind == "reward" and not config.append_eos:
        print(
            "score: note: rows end where their text ends; a reward model learnt to judge at the "
            "end of finished completions, after EOS: append_eos=true if these are finished",
            flush=True,
        )

    results = score_rows(make_scorer(model), model, rows, config, mesh)
    name = "reward" if model.kind == "reward" else "logprob"
    mean = float(np.mean([row[name] for row in results]))
    if is_primary():
        write_jsonl(path, results)
        print(f"score: {len(results)} rows, mean {name} {mean:.4g}, in {path}", flush=True)
    return {f"mean_{name}": mean}, [path.name] if path.parent == output else []


# What the stage calls the settings of data that errors about rows speak of.
KEYS = {
    "data.max_length": "max_length",
    "data.template": "template",
    "'data.train={": "'data={",
    SHORTENING: "",
    SKIPPING: "",
}


def scored_rows(sources: Sequence[Source], config: ScoreConfig, model: Model) -> RowSet:
    """Every row of the sources, in order, as it will be scored.

    Raises:
        DataError: one cannot be scored, or is longer than max_length.
    """
    with renamed(KEYS):
        rows = encode_lm(
            sources,
            model.tokenizer,
            max_length=config.max_length,
            template=config.template,
            truncation="error",
            append_eos=config.append_eos,
            vocab_size=model.config.vocab_size,
            seed=config.seed,
            every_row=True,
        )
    check_rows(rows, model, "max_length")
    return rows


Said = Callable[[Any, Any], jax.Array]


def make_scorer(model: Model) -> Said:
    """The program `said(params, batch)`: rewards [B], or log-probs [B,T] of a language model."""

    @jax.jit
    def said(params: Any, batch: Any) -> jax.Array:
        function = row_scores if model.kind == "reward" else row_logprobs
        return function(params, model.config, model.runtime, batch)

    return said


def score_rows(
    said: Said, model: Model, rows: Any, config: ScoreConfig, mesh: Mesh
) -> list[dict[str, Any]]:
    """What `said` says of encoded rows, in their order."""
    batches = evaluation_batches(rows, DataSection(max_length=config.max_length), config.batch_size)
    results: list[dict[str, Any]] = [{}] * len(rows)
    for step, batch in enumerate(batches):
        values = to_host(said(model.params, put_batch(batch, mesh)))
        for b, i in enumerate(batches.indices_at(step)):
            if i < 0:
                continue
            if model.kind == "reward":
                results[i] = {"reward": float(values[b])}
                continue
            mask = batch.completion_mask[b]
            chosen = values[b][mask].astype(np.float64)
            results[i] = {
                "logprob": float(chosen.sum()),
                "token_logprobs": [float(x) for x in values[b][mask]],
                "token_ids": batch.tokens[b][mask].tolist(),
            }
    return results
