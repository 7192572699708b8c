# SPDX-License-Identifier: Apache-2.0
"""Plots over training and over distance: learning curves, and reward against KL."""

import math
import re

from jaxrlhf.evaluation.results import METRICS, CurvePoint
from jaxrlhf.report.chart import Line, Point, chart, number, swatch, thin_out
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.models import Model, judged_runs, metric_info, own_point, run_colours
from jaxrlhf.report.read import Run

SERIES = {
    "best_of_n": ("best of n from the base", "quiet", "dashed", "dot"),
    "optimum": ("the best any policy can do", "front", "", ""),
}
PLANES = ("gold", "proxy")


def reward_against_kl(runs: list[Run], models: list[Model]) -> list[Element]:
    """Gold and proxy against KL for every model, with best-of-n and the frontier beside them."""
    points = [(m, p) for m in models if (p := own_point(m)) is not None]
    others: dict[str, list[CurvePoint]] = {}
    for m in models:
        for p in m.result.curve:
            if math.isfinite(p.kl) and p not in others.setdefault(p.series, []):
                others[p.series].append(p)
    if sum(p.series == "run" for _, p in points) + len(others) == 0:
        return []
    panels, drawn = [], set()
    for plane in PLANES:
        lines = []
        for series, curve in others.items():
            line = _curve(series, curve, plane)
            if line.points:
                lines.append(line)
                drawn.add(series)
        for m, p in points:
            if (y := getattr(p, plane)) is not None:
                low, high = p.intervals.get(plane, (None, None))
                title = f"{p.label}: {number(y)} at {number(p.kl)} nats"
                place = Point(p.kl, y, low, high, title)
                lines.append(Line([place], m.colour, joined=False, marker=m.marker))
        own = [line for line in lines if not line.joined]
        if len(own) < 2 and not (own and others):
            continue
        info = metric_info(plane, models)
        panels.append(
            h(
                "div",
                chart(
                    lines, x_label="KL to the reference [nats per completion, root scale]",
                    y_label=info.title, width=460, height=330, root_x=True,
                    description=f"{info.title} against KL",
                ),
                cls="card",
            )
        )  # fmt: skip
    if not panels:
        return []
    marks = [
        h("span", swatch(m.colour, m.marker, joined=False), m.label)
        for m, p in points
        if any(getattr(p, plane) is not None for plane in PLANES)
    ]
    for series in others:
        if series in drawn:
            name, colour, style, marker = SERIES.get(series, (series, "quiet", "", "dot"))
            marks.append(h("span", swatch(colour, marker, style), name))
    note = (
        "Each mark is one model, with the confidence interval of its score; further right is "
        "further from the reference. A proxy that keeps rising where gold falls is a reward model "
        "being exploited."
    )
    return [
        h("p", note, cls="note"),
        h("div", marks, cls="legend"),
        h("div", panels, cls="grid2"),
        *(h("details", h("summary", title), table) for title, table in _in_numbers(models)),
    ]


def _in_numbers(models: list[Model]) -> list[tuple[str, Element]]:
    """What samples of a model allow, as tables: best of n, and the optimum at some coefficients."""
    found = []
    for m in models:
        metrics, intervals = m.result.metrics, m.result.intervals
        best = [p for p in m.result.curve if p.series == "best_of_n"]
        with_gold = any(p.gold is not None for p in best)
        planes = PLANES[::-1] if with_gold else ("proxy",)
        rows = [
            _figures(
                p.label,
                _cell(p.kl),
                _cell(None),
                *(_cell(getattr(p, plane), p.intervals.get(plane)) for plane in planes),
            )
            for p in best
        ]
        rows += [
            _figures(
                f"the optimum at coefficient {name.removeprefix('optimum/')}",
                _cell(metrics.get(f"{name}/kl")),
                _cell(metrics[name], intervals.get(name)),
                _cell(metrics.get(f"{name}/proxy")),
                *([_cell(None)] * with_gold),
            )
            for name in metrics
            if re.fullmatch(r"optimum/[^/]+", name)
        ]
        if not rows:
            continue
        heads = ["", "KL, nats", "largest J", *(metric_info(p, models).title for p in planes)]
        head = h("tr", [h("th", text, cls="num" if text else "pin") for text in heads])
        table = h("table", h("thead", head), h("tbody", rows))
        title = f"Best of n and the optimum, from samples of {m.label}"
        found.append((title, h("div", h("div", table, cls="scroll"), cls="card")))
    return found


def _figures(label: str, *cells: Element) -> Element:
    return h("tr", h("th", label, scope="row", cls="pin"), list(cells))


def _cell(value: float | None, interval: tuple[float, float] | None = None) -> Element:
    small = h("span", " to ".join(map(number, interval)), cls="ci") if interval else None
    return h("td", number(value) if value is not None else "–", small, cls="num")


def _curve(series: str, curve: list[CurvePoint], plane: str) -> Line:
    _, colour, style, marker = SERIES.get(series, (series, "quiet", "", "dot"))
    points = []
    for p in sorted(curve, key=lambda p: p.kl):
        if (y := getattr(p, plane)) is not None:
            low, high = p.intervals.get(plane, (None, None))
            title = f"{p.label}: {number(y)} at {number(p.kl)} nats"
            points.append(Point(p.kl, y, low, high, title))
    return Line(points, colour, marker=marker, style=style)


# Which curves are shown first; the others are folded away.
ORDER = (
    r"^loss$", r"nats_per_token", r"perplexity", r"accurac", r"gold", r"valence", r"proxy",
    r"^reward", r"scores?/", r"objective", r"margins?", r"^kl|/kl", r"entropy", r"mean_length",
    r"eos_rate", r"distinct", r"clip_ratio", r"loss$", r"value", r"",
)  # fmt: skip
LAST = re.compile(r"learning_rate|^lr|grad_norm|tokens|epoch|memory|throughput")
SHOWN = 6
STEPS = {"ppo": "iteration"}


def learning_curves(runs: list[Run], models: list[Model]) -> list[Element]:
    """Small multiples for each stage, one panel a metric, all runs of that stage in one panel."""
    colours, known = run_colours(runs, models), judged_runs(runs, models)
    stages: dict[str, list[Run]] = {}
    for run in runs:
        if run.curves:
            stages.setdefault(run.stage or "run", []).append(run)
    elements: list[Element] = []
    for stage, group in stages.items():
        names = list(dict.fromkeys(name for run in group for name in run.curves))
        names.sort(key=_rank)
        told = [n for n in names if not _told_elsewhere(n, names, group)]
        drawn = [(n, p) for n in told if (p := _panel(n, stage, group, colours)) is not None]
        telling = [p for n, p in drawn if not LAST.search(n) and not _constant(n, group)]
        first = telling[:SHOWN] or [panel for _, panel in drawn][:SHOWN]
        rest = [panel for _, panel in drawn if panel not in first]
        legend = [h("span", swatch(colours[r.name]), _known_as(r, known)) for r in group]
        legend = legend if len(group) > 1 else []
        splits = {s for run in group for line in run.curves.values() for s in line}
        if {"train", "eval"} <= splits:
            both = colours[group[0].name] if len(group) == 1 else "quiet"
            legend.append(h("span", swatch(both, "", "fine"), "train"))
            legend.append(h("span", swatch(both, "dot"), "held out"))
        block = [h("h3", stage), h("div", legend, cls="legend") if legend else None]
        block.append(h("div", first, cls="grid3"))
        if rest:
            word = f"{len(rest)} more curve{'s' * (len(rest) > 1)}"
            block.append(h("details", h("summary", word), h("div", rest, cls="grid3")))
        if (table := _final(group, names)) is not None:
            block.append(h("details", h("summary", "Final figures"), table))
        if first:
            elements.append(h("div", block, cls="stage"))
    return elements


def _known_as(run: Run, known: dict[str, Model]) -> str:
    """The run's name, behind that of the model that came of it."""
    label = known[run.name].label if run.name in known else run.name
    return run.name if label == run.name else f"{label} ({run.name})"


def _lines(name: str, group: list[Run]) -> dict[tuple[str, str], list]:
    """{(run, split): points} of a metric."""
    return {
        (run.name, split): points
        for run in group
        for split, points in run.curves.get(name, {}).items()
    }


def _told_elsewhere(name: str, names: list[str], group: list[Run]) -> bool:
    """Whether another metric draws all of its lines: as many or, if it comes first, the same."""
    own = _lines(name, group)
    for other in names:
        lines = _lines(other, group)
        if other == name or any(not _same(lines.get(key), own[key]) for key in own):
            continue
        if len(lines) > len(own) or names.index(other) < names.index(name):
            return True
    return False


def _same(a: list | None, b: list) -> bool:
    """Whether two lines would be drawn on each other: equal but for rounding."""
    return (
        a is not None
        and len(a) == len(b)
        and all(
            x == u and (y == v or math.isclose(y, v, rel_tol=1e-4) or (y != y and v != v))
            for (x, y), (u, v) in zip(a, b, strict=True)
        )
    )


def _constant(name: str, group: list[Run]) -> bool:
    values = {y for points in _lines(name, group).values() for _, y in points}
    return len(values) == 1


def _final(group: list[Run], names: list[str]) -> Element | None:
    """The last value of every metric, runs side by side; what the summary says where it does."""
    rows = []
    for name in names:
        for split in ("eval", "train"):
            cells = []
            for run in group:
                given = run.summary.get("metrics")
                given = given if isinstance(given, dict) else {}
                value = given.get(f"eval/{name}" if split == "eval" else name)
                line = run.curves.get(name, {}).get(split)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    value = line[-1][1] if line else None
                cells.append(value)
            if any(v is not None for v in cells):
                what = f"{name}, held out" if split == "eval" else name
                row = [h("td", number(v), cls="num") for v in cells]
                rows.append(h("tr", h("th", what, scope="row", cls="pin"), row))
    if not rows:
        return None
    head = h("tr", h("th", "metric", cls="pin"), [h("th", r.name, cls="num") for r in group])
    table = h("table", h("thead", head), h("tbody", rows))
    return h("div", h("div", table, cls="scroll"), cls="card")


def _rank(name: str) -> tuple[bool, int, str]:
    place = next(i for i, pattern in enumerate(ORDER) if re.search(pattern, name))
    return bool(LAST.search(name)), place, name


def _panel(name: str, stage: str, group: list[Run], colours: dict[str, str]) -> Element | None:
    lines = []
    for run in group:
        splits = run.curves.get(name, {})
        held_out = bool(splits.get("eval"))
        for split in sorted(splits, reverse=True):  # train below eval
            points = [Point(x, y) for x, y in splits[split]]
            fine = "fine" if held_out and split != "eval" else ""
            dots = split == "eval" and len(points) <= 30
            few = len([p for p in points if math.isfinite(p.y)]) < 3
            lines.append(
                Line(
                    thin_out(points),
                    colours[run.name],
                    marker="dot" if dots or few else "",
                    style=fine,
                )
            )
    if not any(line.points for line in lines):
        return None
    finite = [p.y for line in lines for p in line.points if math.isfinite(p.y)]
    if finite and max(finite) == min(finite) and len(finite) > 2:
        # A constant needs no picture.
        return h(
            "div",
            h("h3", metric_info(name, []).title),
            h("p", f"{number(finite[0])} throughout", cls="small"),
            cls="card",
        )
    info = metric_info(name, [])
    unit = f" [{info.unit}]" if info.unit else ""
    title = (info.title if name in METRICS or "/" not in name else name) + unit
    picture = chart(lines, x_label=STEPS.get(stage, "step"), y_label=title)
    return h("div", picture, cls="card")
