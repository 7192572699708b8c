# SPDX-License-Identifier: Apache-2.0
"""The report's page: what got better first, then why to believe it, then everything else."""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.report import curves, lineage, preference, samples, tables, verdict
from jaxrlhf.report.html import Element, h, render
from jaxrlhf.report.models import Model, find_models
from jaxrlhf.report.read import Run, read_runs

Section = Callable[[list[Run], list[Model]], Sequence[Element]]

# Anchor, heading, and what makes its elements; one that makes none is left out.
SECTIONS: tuple[tuple[str, str, Section], ...] = (
    ("reward-kl", "What the reward bought, and at what distance", curves.reward_against_kl),
    ("models", "Models side by side", tables.metrics_table),
    ("samples", "Samples", samples.side_by_side),
    ("reward-model", "The reward model", preference.reward_models),
    ("curves", "Learning curves", curves.learning_curves),
    ("lineage", "Where it comes from", lineage.lineage),
    ("settings", "Settings and environment", tables.settings),
    ("missing", "What is missing", tables.missing),
)


def write(folders: list[Path], output: Path) -> Path:
    """Reads `folders` and writes the page; see `report.write_report`."""
    title, runs = read_runs(folders)
    page = render(document(title, runs))
    if output.is_dir():
        output = output / "report.html"
    part = output.with_name(output.name + ".part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(page)
        os.replace(part, output)
    except OSError as error:
        raise JaxrlhfError(
            f"the report {output} cannot be written: {error.strerror}; name another place (-o)"
        ) from error
    return output


def document(title: str, runs: list[Run]) -> Element:
    """The whole page as a tree."""
    models = find_models(runs)
    body, links = [], []
    for anchor, heading, make in SECTIONS:
        if elements := make(runs, models):
            links.append(h("a", heading, href=f"#{anchor}"))
            body.append(h("section", h("h2", heading), list(elements), id=anchor))
    head = verdict.headline(title, runs, models)
    main = h("main", h("header", list(head), h("nav", links, aria_label="Sections")), body)

    style = resources.files("jaxrlhf.report").joinpath("style.css").read_text(encoding="utf-8")
    style = style.replace("\r\n", "\n")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # No script, no request, no form, and no style but ours: whatever a model wrote stays text.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return h(
        "html",
        h(
            "head",
            h("meta", charset="utf-8"),
            h("meta", http_equiv="Content-Security-Policy", content=policy),
            h("meta", name="viewport", content="width=device-width, initial-scale=1"),
            h("meta", name="referrer", content="no-referrer"),
            h("title", f"{title} · report"),
            h("style", style),
        ),
        h("body", main),
        lang="en",
    )
