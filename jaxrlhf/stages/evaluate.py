# SPDX-License-Identifier: Apache-2.0
"""Figures of one model with their intervals, written to eval.json.

What is measured follows from what is given: text gives perplexity, comparisons give the accuracy
and calibration of a reward model (or of a language model's log-probs), prompts give completions and
with them proxy and gold scores, KL to a reference, win rates against a baseline.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.data import DataSection
from jaxrlhf.config.stages import EvalConfig
from jaxrlhf.data.encode import RowSet, encode_prompts
from jaxrlhf.data.show import stage_of
from jaxrlhf.data.tokenizer import decode, ids_digest
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation.alarms import find_alarms
from jaxrlhf.evaluation.calibration import bag_of_words, correct, judge_pairs, reliability
from jaxrlhf.evaluation.goodhart import best_of_n_curve, optimum, optimum_curve
from jaxrlhf.evaluation.intervals import bootstrap_mean
from jaxrlhf.evaluation.perplexity import perplexity
from jaxrlhf.evaluation.results import (
    Comparison,
    CurvePoint,
    EvalResult,
    Sample,
    write_results,
)
from jaxrlhf.evaluation.text_metrics import describe_completions
from jaxrlhf.evaluation.winrate import compare
from jaxrlhf.models.rows import row_logprobs
from jaxrlhf.ops.masking import masked_sum
from jaxrlhf.parallel.distributed import is_primary, to_host
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.stages.completions import (
    Completions,
    judge_completions,
    make_completer,
    make_judge,
    make_kl,
)
from jaxrlhf.stages.models import Model, open_model
from jaxrlhf.stages.preference import make_logprobs
from jaxrlhf.stages.reward import make_scorer
from jaxrlhf.stages.rows import evaluation_batches, lm_rows, pair_rows, source_specs
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import check_fits, stage_key

SEED = "eval"  # two models are sampled with the same keys: what differs is the models


@dataclasses.dataclass
class _Findings:
    """What is found about one model, gathered part by part."""

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    curve: list[CurvePoint] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    alarms: list[Any] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    calibration: Any = None
    count: int = 0


def evaluate(config: EvalConfig, output: Path, mesh: Mesh) -> tuple[dict[str, float], list[str]]:
    """Measures everything that the configuration gives material for."""
    model = open_model(config.model, mesh, frozen=True)
    label = config.label or _label(config, output)
    found = _Findings()
    if config.data.holds_out:
        _on_rows(config, model, mesh, found)
    if config.prompts:
        if model.kind != "lm":
            raise ConfigError(
                f"prompts: {model.source} is a reward model, which completes nothing; give "
                "comparisons as data.eval"
            )
        _on_prompts(config, model, mesh, found)
    result = EvalResult(
        model=model.source,
        label=label,
        is_baseline=config.baseline is None and config.reference == config.model.path,
        baseline=_short(config.baseline) if config.baseline else "",
        count=found.count,
        names=found.names,
        metrics=found.metrics,
        intervals=found.intervals,
        level=config.eval.confidence,
        comparisons=tuple(found.comparisons),
        calibration=found.calibration,
        curve=tuple(found.curve),
        alarms=tuple(found.alarms),
        samples=tuple(found.samples),
        notes=tuple(found.notes),
    )
    if is_primary():
        write_results(output, [result])
        _print(label, found)
    return found.metrics, ["eval.json"]


def _label(config: EvalConfig, output: Path) -> str:
    return _short(config.model.path or "") or output.name


def _short(place: str) -> str:
    """How a model is called in tables: the last part of its place."""
    return Path(place).name or place


def _on_rows(config: EvalConfig, model: Model, mesh: Mesh, found: _Findings) -> None:
    """Perplexity of text; accuracy and calibration on comparisons."""
    data = config.data
    if stage_of(source_specs(data.eval or data.train), data.on_bad_row) == "pairs":
        metrics, intervals = _on_pairs(config, model, mesh, found)
    else:
        if model.kind != "lm":
            raise ConfigError(
                f"data.eval: {model.source} is a reward model and needs comparisons, not text"
            )
        train, rows, _ = lm_rows(_only_held_out(data), model, config.seed)
        rows = train if rows is None else rows

        @jax.jit
        def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            logprobs = row_logprobs(params, model.config, model.runtime, batch)
            mask = batch.completion_mask
            return masked_sum(logprobs, mask, axis=1), mask.sum(1)

        batches = evaluation_batches(rows, data, config.batch_size)
        parts = [
            [to_host(x) for x in sums(model.params, put_batch(batch, mesh))] for batch in batches
        ]
        logprobs, counts = (batches.in_row_order(part) for part in zip(*parts, strict=True))
        metrics, intervals = perplexity(logprobs, counts, **_resampling(config))
        found.count = len(rows)
    found.metrics |= metrics
    found.intervals |= intervals


def _resampling(config: EvalConfig) -> dict[str, Any]:
    """How intervals are made."""
    return {
        "samples": config.eval.bootstrap,
        "level": config.eval.confidence,
        "seed": config.seed,
    }


def _only_held_out(data: DataSection) -> DataSection:
    """The same without the rows to learn from, where the held-out ones have files of their own."""
    return data.model_copy(update={"train": data.eval, "eval": []}) if data.eval else data


def _on_pairs(
    config: EvalConfig, model: Model, mesh: Mesh, found: _Findings
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Accuracy and calibration of a reward model, or of a language model's (implicit) rewards."""
    data = config.data if config.eval.baselines else _only_held_out(config.data)
    train, pairs, _ = pair_rows(data, model, config.seed)
    pairs = train if pairs is None else pairs
    batches = evaluation_batches(pairs, data, config.batch_size)
    if model.kind == "reward":
        scores = make_scorer(model.config, model.runtime, batches, mesh)(model.params)
    else:
        logprobs = make_logprobs(model.config, model.runtime, mesh)
        scores = logprobs(model.params, batches)
        if config.reference:
            reference = _other(config, config.reference, model, mesh)
            scores = config.eval.beta * (scores - logprobs(reference.params, batches))
            found.notes.append(
                f"accuracy is that of the implicit reward {config.eval.beta:g} x log(model / "
                f"{_short(config.reference)})"
            )
        else:
            found.notes.append("accuracy is that of the language model's own completion log-probs")
    chosen, rejected = scores.astype(np.float64).T
    metrics, intervals, found.calibration = judge_pairs(
        chosen,
        rejected,
        chosen_lengths=pairs.chosen.lengths,
        rejected_lengths=pairs.rejected.lengths,
        clusters=pairs.groups,
        bins=config.eval.calibration_bins,
        **_resampling(config),
    )
    if config.eval.baselines:
        sides = (train.chosen, train.rejected, pairs.chosen, pairs.rejected)
        margins = bag_of_words(*(_completions(side, model) for side in sides))
        table = reliability(margins, bins=config.eval.calibration_bins)
        metrics |= {"accuracy/bag_of_words": table.accuracy, "ece/bag_of_words": table.ece}
        intervals["accuracy/bag_of_words"] = bootstrap_mean(
            correct(margins), clusters=pairs.groups, **_resampling(config)
        )
    found.count = len(pairs)
    return metrics, intervals


def _completions(rows: RowSet, model: Model) -> list[str]:
    """The texts of completions, as the model sees them: what was cut off is not there."""
    return [decode(model.tokenizer, row.tokens[row.completion_mask].tolist()) for row in rows]


def _on_prompts(config: EvalConfig, model: Model, mesh: Mesh, found: _Findings) -> None:
    """Completions: their text, proxy and gold, KL, and the same of a baseline beside them."""
    n = config.eval.samples_per_prompt
    prompts = encode_prompts(
        source_specs(config.prompts),
        model.tokenizer,
        max_length=config.data.max_prompt_length or config.data.max_length,
        template=config.data.template,
        truncation=config.data.truncation,
        on_bad_row=config.data.on_bad_row,
        vocab_size=model.config.vocab_size,
        seed=config.seed,
    )
    options = _resampling(config)
    judges = {
        "proxy": make_judge(config.proxy, config.model, model, mesh),
        "gold": make_judge(config.gold, config.model, model, mesh),
    }
    judges = {name: judge for name, judge in judges.items() if judge.scorers}
    found.names = {name: " + ".join(judge.scorers) for name, judge in judges.items()}
    key = stage_key(config.seed, SEED)

    def complete(who: Model) -> Completions:
        who = talking(who, prompts.templates)
        completer = make_completer(who, config.sampling, mesh, batch_size=config.batch_size)
        return completer(who.params, prompts, n, key)

    def scores_of(said: Completions) -> dict[str, np.ndarray]:
        totals = {}
        for name, judge in judges.items():
            parts = judge_completions(judge, said, mesh, batch_size=config.batch_size)
            totals[name] = judge.total(parts).astype(np.float64)
            if len(parts) > 1:
                totals |= {f"{name}/{k}": v.astype(np.float64) for k, v in parts.items()}
        return totals

    said = complete(model)
    found.count = len(said)
    scores = scores_of(said)
    if config.reference:
        reference = _other(config, config.reference, model, mesh)
        temperature = config.sampling.temperature or 1.0
        nats = make_kl(model, reference, mesh, temperature=temperature)(
            model.params, said, config.batch_size
        )
        scores["kl"] = nats
        if config.eval.kl_coef is not None and "proxy" in scores:
            scores["objective"] = scores["proxy"] - config.eval.kl_coef * nats
            found.metrics["objective/coef"] = config.eval.kl_coef
    for name, values in scores.items():
        found.metrics[name] = float(values.mean())
        found.intervals[name] = bootstrap_mean(values, clusters=said.groups, **options)
    variety = [i for i in range(len(said)) if i % n < config.eval.distinct_samples]
    found.metrics |= describe_completions(
        said.texts,
        lengths=said.lengths.tolist(),
        finish_reasons=said.finish_reasons,
        variety=variety,
    )
    if n > 1 and "proxy" in scores:
        _curves(config, scores, len(prompts), n, found)
    theirs = their_scores = None
    if config.baseline:
        theirs = complete(_other(config, config.baseline, model, mesh))
        their_scores = scores_of(theirs)
        name = _short(config.baseline)
        compared = list(judges)
        if "objective" in scores and config.baseline == config.reference:
            their_scores["objective"] = their_scores["proxy"]  # no distance from itself
            compared.append("objective")
        for metric in compared:
            found.comparisons.append(
                compare(
                    metric,
                    name,
                    their_scores[metric],
                    scores[metric],
                    clusters=said.groups,
                    **options,
                )
            )
        before = {k: float(v.mean()) for k, v in their_scores.items()} | describe_completions(
            theirs.texts,
            lengths=theirs.lengths.tolist(),
            finish_reasons=theirs.finish_reasons,
            variety=variety,
        )
        found.alarms = find_alarms(before, found.metrics, found.comparisons)
    found.samples = _samples(said, scores, theirs, their_scores, config.eval.samples, n)


def _other(config: EvalConfig, place: str, model: Model, mesh: Mesh) -> Model:
    other = open_model(config.model, mesh, path=place, kind="lm", frozen=True)
    check_fits("model", ids_digest(model.tokenizer), place, ids_digest(other.tokenizer))
    return other


def _curves(
    config: EvalConfig, scores: dict[str, np.ndarray], prompts: int, n: int, found: _Findings
) -> None:
    """Best-of-n of this model, and the best that any policy could reach starting from it."""
    proxy = scores["proxy"].reshape(prompts, n)
    gold = scores["gold"].reshape(prompts, n) if "gold" in scores else None
    if config.eval.best_of:
        points = best_of_n_curve(proxy, gold, ns=config.eval.best_of, level=config.eval.confidence)
        found.curve += points
        for point in points:
            for name, value in (("proxy", point.proxy), ("gold", point.gold)):
                if value is not None:
                    found.metrics[f"best_of_{point.n}/{name}"] = value
                    if name in point.intervals:
                        found.intervals[f"best_of_{point.n}/{name}"] = point.intervals[name]
    if config.eval.tilt:
        found.curve += optimum_curve(proxy, gold)
        for coef in config.eval.tilt:
            best = optimum(proxy, coef, gold, level=config.eval.confidence)
            name = f"optimum/{coef:g}"
            found.metrics |= {
                name: best.objective,
                f"{name}/kl": best.kl,
                f"{name}/proxy": best.proxy,
            }
            if best.interval is not None:
                found.intervals[name] = best.interval


def _samples(
    said: Completions,
    scores: dict[str, np.ndarray],
    theirs: Completions | None,
    their_scores: dict[str, np.ndarray] | None,
    count: int,
    n: int,
) -> list[Sample]:
    """The first completion of each of the first prompts, beside the baseline's."""

    def of(values: dict[str, np.ndarray] | None, i: int) -> dict[str, float]:
        return {name: float(x[i]) for name, x in (values or {}).items()}

    return [
        Sample(
            prompt=_text(said.prompts[i]),
            completion=said.texts[i],
            scores=of(scores, i),
            length=int(said.lengths[i]),
            finish_reason=said.finish_reasons[i],
            baseline_completion=None if theirs is None else theirs.texts[i],
            baseline_scores=of(their_scores, i),
        )
        for i in range(0, min(count * n, len(said)), n)
    ]


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _print(label: str, found: _Findings) -> None:
    """The table on the terminal."""
    for name, value in found.metrics.items():
        low, high = found.intervals.get(name, (None, None))
        interval = "" if low is None else f"  [{low:.4g}, {high:.4g}]"
        print(f"eval {label}: {name} {value:.4g}{interval}", flush=True)
    for comparison in found.comparisons:
        rate, interval = comparison.win_rate, comparison.win_rate_interval
        shown = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
        print(
            f"eval {label}: wins {rate:.3f}{shown} of its prompts against {comparison.baseline} "
            f"by {comparison.metric}",
            flush=True,
        )
    for alarm in found.alarms:
        print(f"eval {label}: {alarm.severity}: {alarm.message}", flush=True)
