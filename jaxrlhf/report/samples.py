# SPDX-License-Identifier: Apache-2.0
"""Completions of the same prompts, side by side. The first in file order, not the prettiest."""

from typing import Any

from jaxrlhf.report.chart import number
from jaxrlhf.report.html import Element, h
from jaxrlhf.report.models import Model, comparison, headline_metric, name_tag
from jaxrlhf.report.read import Run

SHOWN, FOLDED, COLUMNS = 5, 15, 4
LONGEST = 1200  # characters of one completion


def side_by_side(runs: list[Run], models: list[Model]) -> list[Element]:
    """Before and after for each prompt, from the evaluations, else from training's own samples."""
    cards, more = _from_results(models)
    note = "The first prompts of the evaluation, in its order; nothing was picked."
    if not cards:
        cards, more = _from_training(runs)
        note = "Samples taken while training, first and last for the same prompt."
    if not cards:
        return []
    elements = [h("p", note, cls="note"), h("div", cards, cls="stack")]
    if more:
        elements.append(
            h("details", h("summary", f"{len(more)} more prompts"), h("div", more, cls="stack"))
        )
    return elements


def _from_results(models: list[Model]) -> tuple[list[Element], list[Element]]:
    chosen = _columns([m for m in models if m.result.samples])
    if not chosen:
        return [], []
    base = next((m for m in models if m.result.is_baseline), None)
    prompts = list(dict.fromkeys(s.prompt for m in chosen for s in m.result.samples))
    # What every shown model answered comes first, so that the columns are full.
    answered = {m.label: {s.prompt for s in m.result.samples} for m in chosen}
    prompts.sort(key=lambda p: -sum(p in answered[m.label] for m in chosen))
    cards = []
    for prompt in prompts[: SHOWN + FOLDED]:
        columns = []
        for model in chosen:
            sample = next((s for s in model.result.samples if s.prompt == prompt), None)
            if sample is None:
                continue
            told = base is not None and base in chosen
            if not columns and sample.baseline_completion is not None and not told:
                who = h("span", model.result.baseline or "before", cls="name base")
                columns.append(_column(who, sample.baseline_completion, sample.baseline_scores))
            columns.append(_column(name_tag(model), sample.completion, sample.scores))
        cards.append(_card(prompt, columns))
    return cards[:SHOWN], cards[SHOWN:]


def _columns(models: list[Model]) -> list[Model]:
    """Baseline, the best, then the others, up to COLUMNS."""
    metric = headline_metric(models)
    base = [m for m in models if m.result.is_baseline][:1]
    rest = [m for m in models if not m.result.is_baseline]

    def gain(model: Model) -> float:
        change = comparison(model, metric) if metric else None
        return -(change.delta if change else float("-inf"))

    rest.sort(key=gain)
    if len(rest) > COLUMNS - 1:  # the best ones, and the worst as a warning
        rest = [*rest[: COLUMNS - 2], rest[-1]]
    return (base + rest)[:COLUMNS]


def _from_training(runs: list[Run]) -> tuple[list[Element], list[Element]]:
    cards = []
    for run in runs:
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in run.samples:
            if isinstance(row.get("completion"), str):
                rows.setdefault(str(row.get("prompt", "")), []).append(row)
        for prompt, found in list(rows.items())[:4]:
            ends = found[:1] if len(found) == 1 else [found[0], found[-1]]
            columns = []
            for row in ends:
                scores = row.get("scores")
                who = h("span", f"{run.name}, step {_plain(row.get('step'))}", cls="name")
                columns.append(
                    _column(who, row["completion"], scores if isinstance(scores, dict) else {})
                )
            cards.append(_card(prompt, columns))
    return cards[:SHOWN], cards[SHOWN : SHOWN + FOLDED]


def _plain(step: Any) -> str:
    return str(step) if isinstance(step, int | float) else "?"


def _card(prompt: str, columns: list[Element]) -> Element:
    shown = h("p", prompt, cls="prompt") if prompt.strip() else _empty("(empty prompt)", "prompt")
    return h("div", shown, h("div", columns, cls="columns"), cls="card")


def _column(who: Element, completion: str, scores: dict[str, Any]) -> Element:
    text = completion.strip("\n")
    if len(text) > LONGEST:
        text = text[:LONGEST] + " …"
    good = {k: v for k, v in scores.items() if isinstance(v, int | float)}
    said = " · ".join(f"{name} {number(float(value))}" for name, value in good.items())
    return h(
        "div",
        h("div", who, cls="who"),
        h("p", text, cls="text") if text.strip() else _empty("(says nothing)", "text"),
        h("p", said, cls="scores") if said else None,
    )


def _empty(text: str, cls: str) -> Element:
    return h("p", text, cls=f"{cls} empty")
