# SPDX-License-Identifier: Apache-2.0
"""What was measured of each family against transformers and PEFT: `jaxrlhf env --models`.

The figures lie beside this file, written by `scripts/family_table.py`.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("verified.json")
# Each the largest difference of a logit, float32 unless said.
COLUMNS = {
    "import": "its model, read by us",
    "export": "ours, read by transformers",
    "left-pad": "its left-padded batch",
    "cache": "cached steps against whole rows",
    "PEFT": "our LoRA of every projection, read by PEFT",
    "sharded": "8 devices against one",
    "bf16": "activations in bfloat16",
}


def figures() -> dict[str, Any]:
    """{"versions": {package: version}, "families": {model_type: {"variants": n, column: error}}}"""
    return json.loads(FILE.read_text(encoding="utf-8"))


def rows() -> list[list[str]]:
    """The table as texts, its head first; "-" where a column means nothing to a family."""
    found = [["model_type", "variants", *COLUMNS]]
    for family, values in sorted(figures()["families"].items()):
        errors = [f"{values[c]:.0e}" if c in values else "-" for c in COLUMNS]
        found.append([family, str(values["variants"]), *errors])
    return found


def explained() -> str:
    """What the columns are, and of which versions."""
    versions = ", ".join(f"{name} {v}" for name, v in figures()["versions"].items())
    means = "; ".join(f"{name}: {text}" for name, text in COLUMNS.items())
    return f"Largest difference of a logit, over random small models ({versions}). {means}."


def text() -> str:
    """The table for a terminal."""
    table = rows()
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in table]
    return "\n".join(lines)


def markdown() -> str:
    """The table for the README."""
    head, *body = rows()
    head = [f"`{head[0]}`", *head[1:]]
    lines = [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *body)]
    return "\n".join(lines) + f"\n\n{explained()}\n"
