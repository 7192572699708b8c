# SPDX-License-Identifier: Apache-2.0
"""The headline: what got better, by how much, how sure that is, and what speaks against it."""

import math
from pathlib import Path

from jaxrlhf.evaluation.goodhart import overoptimised
from jaxrlhf.evaluation.results import Comparison, Interval, Metric
from jaxrlhf.report.chart import number, whisker
from jaxrlhf.report.html import Child, Element, h
from jaxrlhf.report.models import (
    Model,
    comparison,
    headline_metric,
    metric_info,
    name_tag,
    own_point,
)
from jaxrlhf.report.read import Run
from jaxrlhf.report.tables import show, show_interval

SHOWN_ALARMS = 4


def headline(title: str, runs: list[Run], models: list[Model]) -> list[Element]:
    """The page's header, from the eyebrow to the alarms."""
    metric = headline_metric(models)
    top: list[Element] = [h("p", title, cls="eyebrow")]
    if metric is not None:
        top += _policies(metric, models)
    elif judged := [m for m in models if m.result.calibration or "accuracy" in m.result.metrics]:
        top += _reward_model(judged[0], models)
    elif models:
        names = ", ".join(m.label for m in models[:4])
        top += [
            h("h1", f"{names}: measured, with nothing to compare to"),
            h("p", "Evaluate a baseline in the same run to see what got better.", cls="lead"),
        ]
    else:
        top += _training(runs)
    top += _unfinished(runs)
    return top


def _policies(metric: str, models: list[Model]) -> list[Element]:
    info = metric_info(metric, models)
    judged = [(m, c) for m in models if (c := comparison(m, metric)) is not None]
    sign = -1.0 if info.better == "lower" else 1.0
    sortable = [x for x in judged if math.isfinite(x[1].delta)] or judged
    best, change = max(sortable, key=lambda x: sign * x[1].delta)
    word = direction(change, info)
    what = info.title
    base = next((m for m in models if m.result.is_baseline), None)
    known = base is not None and Path(base.result.model).name == change.baseline
    than = base.label if base is not None and known else change.baseline
    text = {
        "better": f"{best.label} is better than {than}",
        "worse": f"No model is better than {than}",
        "unclear": f"No clear difference from {than} yet",
    }[word]
    level = f"{100 * best.result.level:.0f} %"
    lead = [
        f"{best.label}: {what} went from {show(change.before, info)} to {show(change.after, info)}"
    ]
    if change.interval:
        lead.append(
            f", a change of {_signed(change.delta, info)} ({level} interval "
            f"{_signed(change.interval[0], info)} to {_signed(change.interval[1], info)})"
        )
    if change.win_rate is not None:
        lead.append(f". It wins {100 * change.win_rate:.0f} % of {change.count:,} paired replies")
        if change.win_rate_interval:
            lead.append(f" ({_range_percent(change.win_rate_interval)}), ties counted half")
    lead.append(".")
    share = best.result.metrics.get("objective/share_of_gain", math.nan)
    if metric == "objective" and math.isfinite(share):
        most = best.result.metrics.get("objective/optimum", math.nan)
        lead.append(f" That is {100 * share:.0f} % of what any policy could gain at this")
        lead.append(f" coefficient (J at most {number(most)}).")
    if metric in ("proxy", "objective"):
        lead.append(
            " This is the score that was optimised; without an independent (gold) score it says "
            "little about quality."
        )
    elements = [h("h1", text), h("p", "".join(lead), cls="lead")]
    elements.append(_tiles(best, change, info, word, than, models))
    elements.append(_forest(metric, info, models))
    if notices := _alarms(models):
        elements.append(h("div", notices, cls="alarms"))
    return elements


def direction(change: Comparison, info: Metric) -> str:
    """ "better", "worse" or "unclear": whether the interval of the change excludes 0."""
    sign = -1.0 if info.better == "lower" else 1.0
    low, high = change.interval or (change.delta, change.delta)
    low, high = sorted((sign * low, sign * high))
    if low > 0:
        return "better"
    return "worse" if high < 0 else "unclear"


def _tiles(
    best: Model, change: Comparison, info: Metric, word: str, than: str, models: list[Model]
):
    tone = {"better": "good", "worse": "bad", "unclear": ""}[word]
    tiles = [_tile(_signed(change.delta, info), f"{info.title}, {best.label}", tone)]
    if change.win_rate is not None:
        tiles.append(_tile(f"{100 * change.win_rate:.0f} %", f"win rate against {than}"))
    if (kl := best.result.metrics.get("kl")) is not None:
        tiles.append(_tile(number(kl), "nats of KL from the reference"))
    reward = next((m for m in models if m.result.calibration), None)
    if reward is not None:
        accuracy = reward.result.metrics.get("accuracy", reward.result.calibration.accuracy)  # type: ignore[union-attr]
        tiles.append(_tile(f"{100 * accuracy:.1f} %", f"pair accuracy of {reward.label}"))
    own = len(best.result.alarms)
    others = sum(len(m.result.alarms) for m in models) - own
    label = f"alarm{'' if own == 1 else 's'}, {best.label}"
    label += f"; {others} for other models" if others else ""
    tiles.append(_tile(str(own), label, "warn" if own else "good"))
    return h("div", tiles, cls="tiles")


def _tile(value: str, label: str, tone: str = "") -> Element:
    return h("div", h("b", value, cls=tone or None), h("span", label), cls="card tile")


def _alarms(models: list[Model]) -> list[Element]:
    found = []
    points = [p for m in models if (p := own_point(m)) is not None]
    pairs = overoptimised(points)
    if pairs:
        modest, greedy = max(pairs, key=lambda x: (x[0].gold or 0) - (x[1].gold or 0))
        found.append(
            (
                "alarm",
                f"{greedy.label} has a higher proxy score than {modest.label} "
                f"({number(greedy.proxy)} against {number(modest.proxy)}) yet a lower gold score "
                f"({number(greedy.gold)} against {number(modest.gold)}), both beyond their "
                "intervals: past that point it pleases the reward model, not the user.",
            )
        )
    rows = [_notice(severity, text) for severity, text in found]
    rung = [m for m in models if m.result.alarms]
    rung.sort(key=lambda m: -sum(a.severity == "alarm" for a in m.result.alarms))
    for model in rung:
        alarms = model.result.alarms
        worst = "alarm" if any(a.severity == "alarm" for a in alarms) else "warning"
        rows.append(
            _notice(worst, h("b", model.label), h("ul", [h("li", a.message) for a in alarms]))
        )
    if len(rows) > SHOWN_ALARMS:
        more = h("details", h("summary", "more"), rows[SHOWN_ALARMS:])
        rows = [*rows[:SHOWN_ALARMS], more]
    return rows


def _notice(severity: str, *children: Child) -> Element:
    kind = "alarm" if severity == "alarm" else "warning"
    return h("div", h("b", kind.capitalize()), h("div", list(children)), cls=f"notice is-{kind}")


def _forest(metric: str, info: Metric, models: list[Model]) -> Element:
    rows = [m for m in models if math.isfinite(m.result.metrics.get(metric, math.nan))]
    ends = [
        x
        for m in rows
        for x in (m.result.metrics[metric], *m.result.intervals.get(metric, ()))
        if math.isfinite(x)
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    pad = 0.04 * (high - low) or 1.0
    base = next((m for m in rows if m.result.is_baseline), None)
    reference = base.result.metrics[metric] if base else None
    body = []
    sign = -1.0 if info.better == "lower" else 1.0
    key: dict[str, float] = {m.label: sign * m.result.metrics[metric] for m in rows}
    for m in sorted(rows, key=lambda m: (not m.result.is_baseline, -key[m.label])):
        value, interval = m.result.metrics[metric], m.result.intervals.get(metric)
        change = comparison(m, metric)
        tone = {"better": "good", "worse": "bad", "unclear": None}[
            direction(change, info) if change else "unclear"
        ]
        body.append(
            h(
                "tr",
                h("th", name_tag(m), scope="row", cls="pin"),
                h(
                    "td",
                    whisker(
                        value,
                        *(interval or (None, None)),
                        span=(low - pad, high + pad),
                        colour=m.colour,
                        marker=m.marker,
                        reference=reference,
                        title=f"{m.label}: {show(value, info)}",
                    ),
                    cls="wide",
                ),
                h(
                    "td",
                    _signed(change.delta, info) if change else "baseline" if m is base else "–",
                    show_interval(change.interval, info, signed=True) if change else None,
                    cls=f"num {tone or ''}".strip(),
                    data_label="change",
                ),
                h(
                    "td",
                    f"{100 * change.win_rate:.0f} %"
                    if change and change.win_rate is not None
                    else "–",
                    h("span", _range_percent(change.win_rate_interval), cls="ci")
                    if change and change.win_rate_interval
                    else None,
                    cls="num",
                    data_label="win rate",
                ),
                h("td", show(value, info), show_interval(interval, info), cls="num value"),
            )
        )
    arrow = {"higher": ", higher is better", "lower": ", lower is better"}.get(info.better, "")
    unit = f" [{info.unit}]" if info.unit else ""
    table = h(
        "table",
        h(
            "thead",
            h(
                "tr",
                h("th", "model", cls="pin"),
                h("th", ""),
                h("th", "change", cls="num"),
                h("th", "win rate", cls="num"),
                h("th", "value", cls="num value"),
            ),
        ),
        h("tbody", body),
        cls="runs",
    )
    title = f"{info.title}{unit}{arrow}"
    level = (
        f"bars: {100 * models[0].result.level:.0f} % intervals; dashed: the baseline; change and "
        "win rate: against the baseline's replies in the same evaluation"
    )
    return h("div", h("h3", title), h("p", level, cls="small"), table, cls="card tiles-after")


def _reward_model(model: Model, models: list[Model]) -> list[Element]:
    m, intervals = model.result.metrics, model.result.intervals
    info = metric_info("accuracy", models)
    accuracy = m.get("accuracy", math.nan)
    low = intervals.get("accuracy", (accuracy, accuracy))[0]
    floors = {
        "a bag of words": m.get("accuracy/bag_of_words", math.nan),
        "the longer-wins rule": m.get("accuracy/longer_wins", math.nan),
        "chance": 0.5,
    }
    name, floor = max(((k, v) for k, v in floors.items() if math.isfinite(v)), key=lambda x: x[1])
    if low > floor:
        title = f"{model.label} knows more than {name}"
    elif accuracy > floor:
        title = f"{model.label} is not clearly better than {name}"
    else:
        title = f"{model.label} does not beat {name}"
    text = f"It picks the preferred reply in {show(accuracy, info)} of {model.result.count:,} pairs"
    if "accuracy" in intervals:
        text += f" ({_range_percent(intervals['accuracy'])})"
    text += f"; {name} reaches {show(floor, info)}."
    return [h("h1", title), h("p", text, cls="lead")]


LOSSES = ("loss", "nats_per_token", "pair_loss")


def _training(runs: list[Run]) -> list[Element]:
    """Without any evaluation: what the learning curves say, and that they are not evidence."""
    for run in runs:
        for name in LOSSES:
            splits = run.curves.get(name, {})
            split = "eval" if len(splits.get("eval", [])) > 1 else "train"
            line = [v for _, v in splits.get(split, []) if math.isfinite(v)]
            if len(line) > 1:
                verb = "fell" if line[-1] < line[0] else "did not fall"
                return [
                    h("h1", f"{run.name}: {split} {name} {verb}"),
                    h(
                        "p",
                        f"From {number(line[0])} to {number(line[-1])}. Nothing was evaluated yet, "
                        "so this says how training went, not whether the model got better.",
                        cls="lead",
                    ),
                ]
    return [
        h("h1", "Nothing to show yet"),
        h("p", "No evaluation and no learning curve was found in these folders.", cls="lead"),
    ]


def _unfinished(runs: list[Run]) -> list[Element]:
    late = [r for r in runs if not r.finished]
    if not late:
        return []
    names = ", ".join(f"{r.name} ({r.status})" for r in late[:6])
    names += f" and {len(late) - 6} more" if len(late) > 6 else ""
    one = "run is" if len(late) == 1 else "runs are"
    return [
        h(
            "div",
            h("b", "Unfinished"),
            h("span", f"{len(late)} {one} not finished: {names}. Figures may still change."),
            cls="notice is-warning tiles-after",
        )
    ]


def _signed(value: float, info: Metric) -> str:
    text = show(value, info)
    return f"+{text}" if value > 0 else text


def _range_percent(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"
