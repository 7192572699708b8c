# SPDX-License-Identifier: Apache-2.0
"""The reward model's page: reliability diagram, floors it has to beat, length bias."""

import math

from jaxrlhf.evaluation.intervals import wilson_interval
from jaxrlhf.evaluation.results import METRICS, Calibration
from jaxrlhf.report.chart import Line, Point, chart, number, whisker
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.models import Model, name_tag
from jaxrlhf.report.read import Run
from jaxrlhf.report.tables import metrics_of, show, show_interval

FLOORS = ("accuracy", "accuracy/ceiling", "accuracy/bag_of_words", "accuracy/longer_wins")
LENGTH = (
    "accuracy/when_longer",
    "accuracy/when_shorter",
    "length_bias/prefers_longer",
    "length_bias/correlation",
    "length_bias/margin_correlation",
)


def reward_models(runs: list[Run], models: list[Model]) -> list[Element]:
    """One row of cards for each model that judges pairs."""
    elements: list[Element] = []
    for model in models:
        table = model.result.calibration
        cards = [_reliability(model, table)] if table and table.count else []
        if "accuracy" in model.result.metrics:
            cards.append(_floors(model))
        if cards:
            elements += [
                h("h3", name_tag(model), cls="stage-name"),
                h("div", cards, cls="grid2"),
                h(
                    "details",
                    h("summary", f"All figures of {model.label}"),
                    h("div", metrics_of([model], models), cls="card"),
                ),
            ]
    if elements:
        note = (
            "Left: when the model says it is 80 % sure, is it right 80 % of the time? On the "
            "dashed line it is; below, it is too sure of itself. Bars show where the pairs are. "
            "Right: accuracy beside rules that understand nothing."
        )
        elements.insert(0, h("p", note, cls="note"))
    return elements


def _reliability(model: Model, table: Calibration) -> Element:
    tallest = max(b.count for b in table.bins) or 1
    bars = [
        (
            b.low,
            b.high,
            b.count / tallest,
            f"{b.count:,} pairs between {b.low:.2f} and {b.high:.2f}",
        )
        for b in table.bins
        if b.count
    ]
    points = []
    for b in table.bins:
        if b.count and math.isfinite(b.accuracy):
            low, high = wilson_interval(min(b.accuracy * b.count, b.count), b.count)
            title = f"says {b.confidence:.0%}, right {b.accuracy:.0%}, {b.count:,} pairs"
            points.append(Point(b.confidence, b.accuracy, low, high, title))
    colour = model.colour if model.colour != "base" else "c0"
    floor = min([0.5, *(p.low for p in points if p.low is not None)])
    picture = chart(
        [Line(points, colour, marker="circle", style="fine")],
        x_label="how sure the model is", y_label="how often it is right", width=460, height=330,
        x_range=(0.5, 1.0), y_range=(max(0.0, math.floor(floor * 10) / 10), 1.0), diagonal=True,
        bars=bars, percent_x=True, percent_y=True, description="reliability diagram",
    )  # fmt: skip
    text = (
        f"Expected calibration error {number(table.ece)} in {len(table.bins)} equal bins of "
        f"confidence from 50 to 100 %, {table.count:,} pairs, ties half right."
    )
    return h("div", picture, h("p", text, cls="small"), cls="card")


def _floors(model: Model) -> Element:
    m, intervals = model.result.metrics, model.result.intervals
    chosen = [n for n in FLOORS if math.isfinite(m.get(n, math.nan))]
    ends = [x for n in chosen for x in (m[n], *intervals.get(n, ())) if math.isfinite(x)]
    span = (min([0.45, *ends]), max([0.55, *ends]) + 0.02)
    rows = []
    for name in chosen:
        info = METRICS[name]
        own = name == "accuracy"
        colour = ("c0" if model.colour == "base" else model.colour) if own else "quiet"
        picture = whisker(
            m[name], *(intervals.get(name) or (None, None)), span=span, colour=colour,
            marker="circle" if own else "diamond", reference=0.5, title=info.title,
        )  # fmt: skip
        label = "this model" if own else info.title
        rows.append(
            h(
                "tr",
                h("th", label, scope="row", cls="best pin" if own else "pin"),
                h("td", picture, cls="wide"),
                h("td", show(m[name], info), show_interval(intervals.get(name), info), cls="num"),
            )
        )
    head = h("tr", h("th", "pair accuracy"), h("th", "dashed: chance"), h("th", ""))
    lengths = [
        h("tr", h("th", METRICS[n].title, scope="row"), h("td", show(m[n], METRICS[n]), cls="num"))
        for n in LENGTH
        if n in m
    ]
    return h(
        "div",
        h("table", h("thead", head), h("tbody", rows), cls="runs"),
        h("h3", "Length bias", cls="stage-name") if lengths else None,
        h("table", h("tbody", lengths)) if lengths else None,
        cls="card",
    )
