# SPDX-License-Identifier: Apache-2.0
"""The models a report speaks of: one for each evaluation, with one colour wherever it is drawn."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from jaxrlhf.evaluation.alarms import find_alarms
from jaxrlhf.evaluation.goodhart import share_of_gain
from jaxrlhf.evaluation.results import METRICS, Comparison, CurvePoint, EvalResult, Metric
from jaxrlhf.report.chart import COLOURS, swatch
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.read import Run

SHAPES = ("circle", "square", "triangle", "diamond")
# What a headline is made of, most trustworthy first.
HEADLINE = ("gold", "objective", "valence", "proxy", "accuracy", "nats_per_token", "perplexity")


@dataclass(frozen=True)
class Model:
    """An evaluated model; `result.alarms` are filled in from the metrics where none were stored."""

    label: str
    result: EvalResult
    colour: str
    marker: str
    run: Run

    @property
    def judged_as_policy(self) -> bool:
        """Whether it writes completions (and is not a reward model)."""
        return self.result.calibration is None or "gold" in self.result.metrics


def find_models(runs: list[Run]) -> list[Model]:
    """All evaluations of all runs, baselines first, with unique labels and fixed colours."""
    pairs = [(run, result) for run in runs for result in run.results]
    pairs.sort(key=lambda pair: not pair[1].is_baseline)
    models: list[Model] = []
    taken: set[str] = set()
    coloured = 0
    for run, result in pairs:
        label = result.label or _label(run, result, runs)
        if label in taken:
            label = f"{label} ({run.name})"
        while label in taken:
            label += "'"
        taken.add(label)
        if result.is_baseline:
            colour, marker = "base", "circle"
        else:
            colour = f"c{coloured % COLOURS}"
            marker = SHAPES[(coloured + coloured // COLOURS) % len(SHAPES)]
            coloured += 1
        models.append(Model(label, result, colour, marker, run))
    base = next((m for m in models if m.result.is_baseline), None)
    return [_with_share(_with_alarms(m, base), models) for m in models]


def _label(run: Run, result: EvalResult, runs: list[Run]) -> str:
    """The run that was judged, where its name can be recognised; else the model's own name."""
    known = {r.name for r in runs}
    name = Path(result.model).name or result.model
    if name in known:
        return name
    if len(run.results) == 1 and run.stage == "eval" and len(run.parents) == 1:
        return run.parents[0]
    return name or run.name


def _with_alarms(model: Model, base: Model | None) -> Model:
    if model.result.alarms or base is None or model is base:
        return model
    found = find_alarms(base.result.metrics, model.result.metrics, model.result.comparisons)
    return replace(model, result=replace(model.result, alarms=tuple(found)))


def _with_share(model: Model, models: list[Model]) -> Model:
    """With the share of the possible gain in J, where the base's samples gave the largest J at the
    model's own KL coefficient. The base is no distance from itself: its J is its reward."""
    own = model.result.metrics
    name = f"optimum/{own.get('objective/coef', math.nan):g}"
    base = next((m for m in models if m.result.is_baseline and name in m.result.metrics), None)
    if base is None or base is model or "objective" not in own:
        return model
    theirs = base.result
    share = share_of_gain(own["objective"], theirs.metrics["proxy"], theirs.metrics[name])
    found = {"objective/optimum": theirs.metrics[name], "objective/share_of_gain": share}
    intervals = dict(model.result.intervals)
    if name in theirs.intervals:
        intervals["objective/optimum"] = theirs.intervals[name]
    return replace(model, result=replace(model.result, metrics=own | found, intervals=intervals))


def judged_runs(runs: list[Run], models: list[Model]) -> dict[str, Model]:
    """{run name: the model that came of it}, for runs whose model was judged."""
    by_label = {m.label: m for m in models}
    by_place = {os.path.abspath(m.result.model): m for m in models}
    itself = {m.run.name: m for m in models if m.run.curves}
    found = {
        run.name: by_place.get(os.path.abspath(run.folder))
        or itself.get(run.name)
        or by_label.get(run.name)
        for run in runs
    }
    return {name: m for name, m in found.items() if m is not None}


def run_colours(runs: list[Run], models: list[Model]) -> dict[str, str]:
    """{run name: colour}: a run whose model was judged has that model's colour everywhere."""
    colours = {m.label: m.colour for m in models}
    colours |= {name: m.colour for name, m in judged_runs(runs, models).items()}
    free = [f"c{i}" for i in range(COLOURS)]
    count = 0
    for run in runs:
        if run.name not in colours and run.curves:
            unused = [c for c in free if c not in colours.values()]
            colours[run.name] = unused[0] if unused else free[count % COLOURS]
            count += 1
    return colours


def headline_metric(models: list[Model]) -> str | None:
    """The metric the verdict is about: the first of HEADLINE that a comparison has, else any."""
    named = [c.metric for m in models for c in m.result.comparisons]
    return next((name for name in HEADLINE if name in named), named[0] if named else None)


def comparison(model: Model, metric: str) -> Comparison | None:
    """The model's comparison by `metric`, if it has one."""
    return next((c for c in model.result.comparisons if c.metric == metric), None)


def metric_info(name: str, models: list[Model]) -> Metric:
    """How to show a metric; "proxy" and "gold" under the names the evaluation gave them."""
    info = METRICS.get(name, Metric(name.replace("_", " ")))
    for model in models:
        if given := model.result.names.get(name):
            extra = f" ({name})" if name in ("gold", "proxy") and name not in given else ""
            return replace(info, title=f"{given}{extra}")
    return info


def name_tag(model: Model) -> Element:
    """A model's name with its mark, as in the legend."""
    return h("span", swatch(model.colour, model.marker, joined=False), model.label, cls="name")


def own_point(model: Model) -> CurvePoint | None:
    """The model's own place in the reward-against-KL plane, if its KL was measured."""
    m = model.result.metrics
    kl = m.get("kl", 0.0 if model.result.is_baseline else math.nan)
    if not math.isfinite(kl):
        return None
    return CurvePoint(
        "base" if model.result.is_baseline else "run",
        model.label,
        kl,
        proxy=m.get("proxy"),
        gold=m.get("gold"),
        objective=m.get("objective"),
        distinct_2=m.get("distinct_2"),
        intervals=dict(model.result.intervals),
    )
