# SPDX-License-Identifier: Apache-2.0
"""Which stage was fed by which, how far each came, and how long it took."""

from jaxrlhf.report.chart import number
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.read import Run, content_of, steps_of

WIDE, TALL, GAP_X, GAP_Y, LANE = 168, 44, 46, 14, 10


def lineage(runs: list[Run], models: list) -> list[Element]:
    """A drawing of the pipeline where parents are known, and a table of all runs."""
    elements = []
    known = {r.name for r in runs}
    if any(p in known for r in runs for p in r.parents):
        elements.append(h("div", h("div", _drawing(runs), cls="scroll"), cls="card"))
    head = ("run", "stage", "status", "steps", "time", "fed by", "content")
    rows = []
    for run in runs:
        done, planned = steps_of(run)
        steps = "–" if done is None else f"{done:,.0f}"
        if planned is not None:
            steps += f" of {planned:,.0f}"
        digest = content_of(run)
        rows.append(
            h(
                "tr",
                h("th", run.name, scope="row", cls="pin"),
                h("td", run.stage or "–"),
                h("td", _pill(run)),
                h("td", steps, cls="num"),
                h("td", duration(run.seconds), cls="num"),
                h("td", ", ".join(run.parents) or "–"),
                h("td", h("code", digest[:12] or "–"), cls="num"),
            )
        )
    titles = [h("th", t, cls="num" if t in ("steps", "time") else None) for t in head]
    table = h("table", h("thead", h("tr", titles)), h("tbody", rows))
    elements.append(h("div", h("div", table, cls="scroll"), cls="card tiles-after"))
    return elements


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 10 s, 2 h 5 min."""
    if seconds is None or seconds != seconds:
        return "–"
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _pill(run: Run) -> Element:
    tone = "ok" if run.finished else "ko" if run.status in ("failed", "missing") else "no"
    return h("span", run.status, cls=f"pill {tone}")


def _bend(x: float, y: float, to: float) -> str:
    """From (x, y) through the gap between two columns to another height."""
    middle, end = x + GAP_X / 2, x + GAP_X
    return f"C{middle} {y:.1f} {middle} {to:.1f} {end} {to:.1f}"


def _drawing(runs: list[Run]) -> Element:
    # An evaluation at the end of a branch says nothing here that its model does not.
    feeds = {p for run in runs for p in run.parents}
    runs = [r for r in runs if r.stage != "eval" or r.name in feeds]
    depth: dict[str, int] = {}
    for run in runs:  # pipelines list parents before children
        depth[run.name] = max((depth[p] + 1 for p in run.parents if p in depth), default=0)
    columns: dict[int, list[Run]] = {}
    for run in runs:
        columns.setdefault(depth[run.name], []).append(run)
    rows = max(len(c) for c in columns.values())
    width = len(columns) * (WIDE + GAP_X) - GAP_X + 2
    height = rows * (TALL + GAP_Y) - GAP_Y + 2
    place = {}
    for x, column in columns.items():
        top = (height - len(column) * (TALL + GAP_Y) + GAP_Y) / 2
        for y, run in enumerate(column):
            place[run.name] = (1 + x * (WIDE + GAP_X), top + y * (TALL + GAP_Y))
    # What skips a column goes below all boxes, in a lane of its own for each stage it comes from.
    far = (p for r in runs for p in r.parents if depth[r.name] - depth.get(p, depth[r.name]) > 1)
    lanes = {name: height + LANE * (i + 1) for i, name in enumerate(dict.fromkeys(far))}
    height += LANE * (len(lanes) + 1) if lanes else 0
    svg = h(
        "svg", viewBox=f"0 0 {width} {height:.0f}", width=width, height=f"{height:.0f}",
        role="img", aria_label="stages and what fed them", cls="dag",
    )  # fmt: skip
    for run in runs:
        x1, y1 = place[run.name]
        for parent in run.parents:
            if parent in place and depth[parent] < depth[run.name]:
                x0, y0 = place[parent]
                x0, y0, y = x0 + WIDE, y0 + TALL / 2, y1 + TALL / 2
                path = f"M{x0} {y0:.1f}"
                if depth[run.name] - depth[parent] > 1:
                    path += _bend(x0, y0, lanes[parent]) + f"H{x1 - GAP_X}"
                    x0, y0 = x1 - GAP_X, lanes[parent]
                svg.append(h("path", d=path + _bend(x0, y0, y), cls="edge"))
    for run in runs:
        x, y = place[run.name]
        kind = "done" if run.finished else "open"
        name = run.name if len(run.name) <= 22 else run.name[:21] + "…"
        svg.append(
            h(
                "g",
                h("title", run.name),
                h("rect", x=x, y=f"{y:.1f}", width=WIDE, height=TALL, rx=8, cls=f"node {kind}"),
                h("text", name, x=x + 11, y=f"{y + 18:.1f}", cls="title"),
                h("text", f"{run.stage or 'run'} · {duration(run.seconds)}", x=x + 11,
                  y=f"{y + 34:.1f}"),
            )
        )  # fmt: skip
    return svg
