# SPDX-License-Identifier: Apache-2.0
"""Tables: metrics of all models, settings that differ, environment, and what is missing."""

import json
import math
from typing import Any

from jaxrlhf.evaluation.results import Interval, Metric
from jaxrlhf.report.chart import number
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.models import Model, metric_info, name_tag
from jaxrlhf.report.read import Run

GROUPS = (
    ("What was wanted", ("gold", "proxy", "objective", "valence", "win_rate", "reward")),
    ("How far it moved, how varied it stayed", ("kl", "entropy", "distinct", "repetition", "self")),
    ("Length and endings", ("completions/", "length/")),
    ("Language modelling", ("nats_per", "perplexity", "bits_per")),
    ("Preferences", ("accuracy", "ece", "pair", "brier", "margin", "length_bias", "rewards/")),
    ("Other", ("",)),
)


def show(value: float | None, info: Metric) -> str:
    """A metric's value in its own notation."""
    if info.percent and value is not None and math.isfinite(value):
        return f"{100 * value:.1f} %".replace("-", "−")
    return number(value)


def show_interval(interval: Interval | None, info: Metric, *, signed: bool = False):
    """The interval as a small second line, or None."""
    if interval is None:
        return None
    low, high = (
        ("+" if signed and x > 0 else "") + show(x, info).removesuffix(" %") for x in interval
    )
    return h("span", f"{low} to {high}" + (" %" if info.percent else ""), cls="ci")


def metrics_table(runs: list[Run], models: list[Model]) -> list[Element]:
    """Every metric of every model; the best of a row is bold where "better" has a direction."""
    policies = [m for m in models if m.judged_as_policy]
    if not policies:  # reward models have a section of their own
        return []
    table = h("div", h("div", metrics_of(policies, models), cls="scroll"), cls="card")
    return [h("p", _LEGEND, cls="note"), table]


_LEGEND = (
    "Small print is the confidence interval. Bold is the best of a row, among the trained models, "
    "where better has a direction."
)


ELSEWHERE = ("best_of_", "optimum/")  # what samples of the base allow: beside its plot (curves.py)


def metrics_of(shown: list[Model], models: list[Model]) -> Element:
    """A table of every metric that `shown` have, one column a model."""
    names = list(dict.fromkeys(name for m in shown for name in m.result.metrics))
    names = [name for name in names if not name.startswith(ELSEWHERE)]
    rows: list[Element] = []
    placed: set[str] = set()
    for title, starts in GROUPS:
        group = [n for start in starts for n in names if n.startswith(start) and n not in placed]
        group = list(dict.fromkeys(group))
        placed.update(group)
        if group:
            rows.append(h("tr", h("th", title, colspan=len(shown) + 1), cls="group"))
            rows += [_row(name, shown, models) for name in group]
    head = [h("th", name_tag(m), cls="num", scope="col") for m in shown]
    return h("table", h("thead", h("tr", h("th", "metric", cls="pin"), head)), h("tbody", rows))


def _row(name: str, shown: list[Model], models: list[Model]) -> Element:
    info = metric_info(name, models)
    values = {
        m.label: m.result.metrics[name]
        for m in shown
        if not m.result.is_baseline and math.isfinite(m.result.metrics.get(name, math.nan))
    }
    best = None
    # Objectives at several KL coefficients are several objectives.
    coefs = {m.result.metrics.get("objective/coef") for m in shown if m.label in values}
    if info.better and len(values) > 1 and not (name == "objective" and len(coefs) > 1):
        best = (max if info.better == "higher" else min)(values.values())
    cells = []
    for m in shown:
        value = m.result.metrics.get(name)
        top = best is not None and m.label in values and value == best
        cells.append(
            h(
                "td",
                h("span", show(value, info), cls="best" if top else None),
                show_interval(m.result.intervals.get(name), info),
                cls="num",
            )
        )
    arrow = {"higher": " ↑", "lower": " ↓"}.get(info.better, "")
    unit = h("span", f" {info.unit}", cls="small") if info.unit else None
    return h("tr", h("th", info.title + arrow, unit, scope="row", cls="pin"), cells)


def settings(runs: list[Run], models: list[Model]) -> list[Element]:
    """Settings in which runs of one stage differ, every run's whole configuration, environment."""
    elements: list[Element] = []
    stages: dict[str, list[Run]] = {}
    for run in runs:
        if run.config:
            stages.setdefault(run.stage or "run", []).append(run)
    for stage, group in stages.items():
        if (table := _differences(group)) is not None:
            scroll = h("div", table, cls="scroll")
            title = f"{stage}: settings that differ"
            if len(group) > WIDEST:
                inside = [h("details", h("summary", f"{title}, {len(group)} runs"), scroll)]
            else:
                inside = [h("h3", title), scroll]
            elements.append(h("div", inside, cls="card tiles-after"))
    whole = [
        h("details", h("summary", run.name), h("pre", run.config_text[:20_000]))
        for run in runs
        if run.config_text.strip()
    ]
    if whole:
        elements.append(h("div", h("h3", "Resolved configuration"), whole, cls="card tiles-after"))
    if (table := _environment(runs)) is not None:
        elements.append(
            h("div", h("h3", "Environment"), h("div", table, cls="scroll"), cls="card tiles-after")
        )
    return elements


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


WIDEST = 5  # runs side by side that are read without scrolling


def _setting(value: Any) -> str:
    """A setting for a narrow column: places by the end of their path, lists without brackets."""
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v not in (None, {}, [])}
        if set(kept) <= {"source", "weight"} and kept.get("weight", 1) == 1:
            return _setting(kept.get("source"))
        return ", ".join(f"{k} {_setting(v)}" for k, v in kept.items())
    text = _text(value)
    parts = text.split("/")
    return text if len(text) <= 24 or len(parts) < 3 else "…/" + "/".join(parts[-2:])


def _differences(group: list[Run]) -> Element | None:
    absent = object()
    keys = list(dict.fromkeys(key for run in group for key in run.config))
    # Where a run writes to is its name once more.
    keys = [k for k in keys if k not in ("output_dir", "output")]
    differ = [k for k in keys if len({_text(r.config.get(k, absent)) for r in group}) > 1]
    if len(group) < 2 or not differ:
        return None
    head = h("tr", h("th", "setting", cls="pin"), [h("th", r.name, cls="num") for r in group])
    rows = [
        h(
            "tr",
            h("th", h("code", key), scope="row", cls="pin"),
            [
                h("td", _setting(r.config[key]) if key in r.config else "–", cls="num")
                for r in group
            ],
        )
        for key in differ[:40]
    ]
    return h("table", h("thead", head), h("tbody", rows))


def _environment(runs: list[Run]) -> Element | None:
    seen: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for key, value in run.environment.items():
            seen.setdefault(key, {}).setdefault(_text(value), []).append(run.name)
    if not seen:
        return None
    rows = []
    for key, values in seen.items():
        if len(values) == 1:
            text: list[Any] = [next(iter(values))]
        else:
            text = [h("div", f"{v} ({', '.join(names)})") for v, names in values.items()]
        rows.append(h("tr", h("th", h("code", key), scope="row"), h("td", text)))
    return h("table", h("tbody", rows))


def missing(runs: list[Run], models: list[Model]) -> list[Element]:
    """What could not be read or was never written, run by run."""
    rows = [h("li", h("b", run.name), f": {what}") for run in runs for what in run.missing]
    rows += [
        h("li", h("b", model.label), f": {note}") for model in models for note in model.result.notes
    ]
    if not any(run.results for run in runs):
        rows.insert(0, h("li", "No run has an eval.json: run an eval stage for evidence."))
    return [h("div", h("ul", rows), cls="card")] if rows else []
