# SPDX-License-Identifier: Apache-2.0
"""Small SVG charts. Colours are CSS classes (c0..c7, base, quiet), so one style sheet rules all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxrlhf.report.html import Element, h

COLOURS = 8
MAX_POINTS = 240  # a line on a few hundred pixels shows no more


@dataclass(frozen=True)
class Point:
    """x, y, and optionally the interval of y and what to say when pointed at."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A series. `colour` is a CSS class; `marker` a key of MARKERS or "" for none."""

    points: Sequence[Point]
    colour: str
    name: str = ""
    joined: bool = True
    marker: str = ""
    style: str = ""  # further classes: "thin", "dashed", "fine"
    band: bool = field(default=False)


def number(value: float | None, digits: int = 3) -> str:
    """`value` for people: three significant digits, a real minus, "not a number" for NaN."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits - 1 - math.floor(math.log10(size))}f}"
    return text.replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def root_ticks(high: float) -> list[float]:
    """Round numbers for a square-root axis from 0."""
    steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
    chosen = [0.0]
    for value in steps:
        if value <= high and math.sqrt(value) - math.sqrt(chosen[-1]) >= 0.13 * math.sqrt(high):
            chosen.append(value)
    return chosen


def tick_text(value: float) -> str:
    """A tick without trailing zeros."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: means over equal stretches; points that are not finite are kept."""
    points = list(points)
    if len(points) <= limit:
        return points
    thinned = []
    for i in range(limit):
        part = points[i * len(points) // limit : (i + 1) * len(points) // limit]
        good = [p for p in part if math.isfinite(p.y)]
        if good:
            mean = sum(p.y for p in good) / len(good)
            thinned.append(Point(good[-1].x, mean))
        thinned += [p for p in part if not math.isfinite(p.y)][:1]
    return thinned


def _circle(x: float, y: float, cls: str) -> Element:
    return h("circle", cx=_f(x), cy=_f(y), r=4.2, cls=cls)


def _path(x: float, y: float, cls: str, *corners: tuple[float, float]) -> Element:
    steps = " ".join(f"{_f(x + dx)},{_f(y + dy)}" for dx, dy in corners)
    return h("polygon", points=steps, cls=cls)


MARKERS: dict[str, Callable[[float, float, str], Element]] = {
    "circle": _circle,
    "square": lambda x, y, c: _path(x, y, c, (-3.8, -3.8), (3.8, -3.8), (3.8, 3.8), (-3.8, 3.8)),
    "triangle": lambda x, y, c: _path(x, y, c, (0, -4.8), (4.6, 3.6), (-4.6, 3.6)),
    "diamond": lambda x, y, c: _path(x, y, c, (0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0)),
    "dot": lambda x, y, c: h("circle", cx=_f(x), cy=_f(y), r=2.4, cls=c),
}


def chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = 340,
    height: int = 215,
    root_x: bool = False,
    zero_x: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
    bars: Sequence[tuple[float, float, float, str]] = (),
    percent_y: bool = False,
    percent_x: bool = False,
    description: str = "",
) -> Element:
    """A chart of lines and points with labelled axes.

    Args:
        root_x: square-root x axis from 0 (for KL: reward grows about linearly in its root).
        bars: (low, high, share of the tallest, title): a faint histogram along the bottom.
        diagonal: the line y = x.
    """
    left, right, top, bottom = 50, 12, 26, 42
    points = [p for line in lines for p in line.points if math.isfinite(p.x)]
    good = [p for p in points if math.isfinite(p.y)]
    xs = [p.x for p in points] or [0.0, 1.0]
    ys = [y for p in good for y in (p.y, p.low, p.high) if y is not None and math.isfinite(y)]
    x0, x1 = x_range or _padded(min(xs), max(xs), 0.0)
    if root_x or zero_x:
        x0, x1 = 0.0, max(max(xs) * 1.06, 1e-3)
    y0, y1 = y_range or _padded(min(ys, default=0.0), max(ys, default=1.0), 0.07)

    def scale(value: float) -> float:
        return math.sqrt(max(value, 0.0)) if root_x else value

    def px(x: float) -> float:
        return left + (scale(x) - scale(x0)) / (scale(x1) - scale(x0)) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (min(max(y, y0), y1) - y0) / (y1 - y0) * (height - top - bottom)

    label = description or f"{y_label} against {x_label}"
    svg = h("svg", viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
    svg.set("class", "chart big" if width > 400 else "chart")
    floor = height - bottom
    for y in ticks(y0, y1):
        text = f"{100 * y:.0f} %" if percent_y else tick_text(y)
        svg.append(h("line", x1=left, x2=width - right, y1=_f(py(y)), y2=_f(py(y)), cls="grid"))
        svg.append(h("text", text, x=left - 7, y=_f(py(y) + 3.6), cls="tick end"))
    for x in root_ticks(x1) if root_x else ticks(x0, x1, 5):
        text = f"{100 * x:.0f} %" if percent_x else tick_text(x)
        svg.append(h("line", x1=_f(px(x)), x2=_f(px(x)), y1=floor, y2=floor + 4, cls="axis"))
        svg.append(h("text", text, x=_f(px(x)), y=floor + 16, cls="tick mid"))
    svg.append(h("line", x1=left, x2=width - right, y1=floor, y2=floor, cls="axis"))
    svg.append(h("text", x_label, x=_f((left + width - right) / 2), y=height - 7, cls="label mid"))
    svg.append(h("text", y_label, x=6, y=14, cls="label strong"))
    for low, high, share, title in bars:
        tall = 0.3 * share * (floor - top)
        wide = max(px(high) - px(low) - 2, 0.5)
        rect = h(
            "rect", h("title", title), x=_f(px(low) + 1), width=_f(wide),
            y=_f(floor - tall), height=_f(tall), cls="bar",
        )  # fmt: skip
        svg.append(rect)
    if diagonal:
        low, high = max(x0, y0), min(x1, y1)
        svg.append(
            h("line", x1=_f(px(low)), y1=_f(py(low)), x2=_f(px(high)), y2=_f(py(high)), cls="guide")
        )
    for line in lines:
        if line.band:
            svg.append(_band(line, px, py))
        if line.joined:
            svg.append(
                h("path", d=_steps(line.points, px, py), cls=f"line {line.colour} {line.style}")
            )
    for line in lines:
        for p in line.points:
            if not math.isfinite(p.x):
                continue
            if not math.isfinite(p.y):
                cross = h("text", h("title", f"not finite at {tick_text(p.x)}"), "×")
                cross.set("x", _f(px(p.x)))
                cross.set("y", _f(floor - 4))
                cross.set("class", "nan mid")
                svg.append(cross)
                continue
            if not line.band and p.low is not None and p.high is not None:
                svg.append(
                    h("line", x1=_f(px(p.x)), x2=_f(px(p.x)), y1=_f(py(p.low)), y2=_f(py(p.high)),
                      cls=f"whisker {line.colour}")
                )  # fmt: skip
            if line.marker:
                mark = MARKERS[line.marker](px(p.x), py(p.y), f"mark {line.colour}")
                if p.title:
                    mark.append(h("title", p.title))
                svg.append(mark)
    return svg


def whisker(
    value: float,
    low: float | None,
    high: float | None,
    *,
    span: tuple[float, float],
    colour: str,
    marker: str = "circle",
    reference: float | None = None,
    title: str = "",
) -> Element:
    """One row of a forest plot: value with its interval on a scale shared by all rows."""

    # In per cent, without a viewBox: the row may be of any width and the marks keep their size.
    def px(x: float) -> str:
        inside = (min(max(x, span[0]), span[1]) - span[0]) / (span[1] - span[0])
        return f"{4 + 92 * inside:.2f}%"

    svg = h("svg", role="img", aria_label=title, cls="forest")
    svg.append(h("line", x1="0", x2="100%", y1=11, y2=11, cls="grid"))
    if reference is not None and math.isfinite(reference):
        svg.append(h("line", x1=px(reference), x2=px(reference), y1=0, y2=22, cls="guide"))
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        svg.append(h("line", x1=px(low), x2=px(high), y1=11, y2=11, cls=f"whisker {colour}"))
    if math.isfinite(value):
        mark = MARKERS[marker](0, 0, f"mark {colour}")
        svg.append(h("svg", mark, x=px(value), y=11, cls="at"))
    return svg


def swatch(colour: str, marker: str = "", style: str = "", *, joined: bool = True) -> Element:
    """The sample of a line or point in a legend."""
    kind = "swatch" if joined else "swatch point"
    svg = h("svg", viewBox="0 0 26 14" if joined else "6 0 14 14", cls=kind, aria_hidden="true")
    if joined:
        svg.append(h("path", d="M1 7H25", cls=f"line {colour} {style}"))
    if marker:
        svg.append(MARKERS[marker](13, 7, f"mark {colour}"))
    return svg


def _f(value: float) -> str:
    return f"{value:.1f}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high > low:
        return low - share * (high - low), high + share * (high - low)
    pad = abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def _steps(points: Sequence[Point], px, py) -> str:
    parts, pen = [], "M"
    for p in points:
        if math.isfinite(p.y) and math.isfinite(p.x):
            parts.append(f"{pen}{_f(px(p.x))} {_f(py(p.y))}")
            pen = "L"
        else:
            pen = "M"  # a gap where the number is none
    return "".join(parts)


def _band(line: Line, px, py) -> Element:
    good = [p for p in line.points if p.low is not None and p.high is not None]
    edge = [(p.x, p.high or 0.0) for p in good] + [(p.x, p.low or 0.0) for p in reversed(good)]
    corners = " ".join(f"{_f(px(x))},{_f(py(y))}" for x, y in edge)
    return h("polygon", points=corners, cls=f"band {line.colour}")
