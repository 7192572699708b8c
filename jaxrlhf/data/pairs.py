# SPDX-License-Identifier: Apache-2.0
"""Rankings or ratings of K completions to pairs of a better and a worse one."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.data import formats, sources
from jaxrlhf.data.formats import Example
from jaxrlhf.data.sources import OnBadRow, Source
from jaxrlhf.errors import DataError


def all_pairs(order: Sequence[int]) -> list[tuple[int, int]]:
    """Every (better, worse): K(K-1)/2 of them."""
    return list(itertools.combinations(order, 2))


def adjacent(order: Sequence[int]) -> list[tuple[int, int]]:
    """Each with the next worse: K-1, the hardest ones."""
    return list(itertools.pairwise(order))


def best_worst(order: Sequence[int]) -> list[tuple[int, int]]:
    """The best with the worst: one, the clearest."""
    return [(order[0], order[-1])]


def apart(order: Sequence[int]) -> list[tuple[int, int]]:
    """At least two places apart, (K-1)(K-2)/2 of them: neighbours are often in the wrong order."""
    return [(a, b) for i, a in enumerate(order) for b in order[i + 2 :]]


RANKINGS: dict[str, Callable[[Sequence[int]], list[tuple[int, int]]]] = {
    "all": all_pairs,
    "adjacent": adjacent,
    "best_worst": best_worst,
    "apart": apart,
}


def to_pairs(
    scores: Sequence[float], *, how: str = "all", ties: str = "skip"
) -> list[tuple[int, int, float]]:
    """(better, worse, margin) indices from scores where larger is better; margin = difference.

    ties: "skip" leaves out pairs of equal scores; "keep" keeps them with margin 0 (in the order
        given), for losses that model ties. Adjacency is between distinct scores: under "skip",
        each completion meets all those of the next lower score.

    Raises:
        DataError: an unknown `how` or `ties`.
    """
    if how not in RANKINGS:
        raise DataError(
            f"ranking={how!r} is not known{sources.nearest(how, RANKINGS)}; it is one of "
            f"{', '.join(RANKINGS)}"
        )
    if ties not in ("skip", "keep"):
        raise DataError(f"ties={ties!r} is not known; it is skip or keep")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if len(order) < 2:
        return []
    if how == "adjacent" and ties == "skip":
        levels = [list(g) for _, g in itertools.groupby(order, key=lambda i: scores[i])]
        chosen = [p for a, b in itertools.pairwise(levels) for p in itertools.product(a, b)]
    else:
        chosen = RANKINGS[how](order)
    found = [(i, j, float(scores[i] - scores[j])) for i, j in chosen]
    return [pair for pair in found if ties == "keep" or pair[2] > 0]


def of_example(
    example: Example, *, how: str = "all", ties: str = "skip", margins: bool = True
) -> Iterator[Example]:
    """Preference examples of one ranked example.

    Ratings give their difference as margin; ranks give none (they have no scale), nor does
    margins=False.
    """
    rated = bool(example.ratings)
    scores = example.ratings if rated else [-r for r in example.ranks]
    for better, worse, margin in to_pairs(scores, how=how, ties=ties):
        yield dataclasses.replace(
            example,
            kind="preference",
            chosen=example.completions[better],
            rejected=example.completions[worse],
            margin=margin if rated and margins else None,
            completions=(),
            ranks=(),
            ratings=(),
        )


def write_pairs(
    source: Source | Sequence[Source],
    output: str | os.PathLike[str],
    *,
    how: str = "all",
    ties: str = "skip",
    margins: bool = True,
    on_bad_row: OnBadRow = "error",
    seed: int = 0,
) -> dict[str, int]:
    """Writes `{prompt, chosen, rejected, margin?}` rows as JSONL; returns counts.

    Sources may hold rankings, ratings, or pairs already. The file appears only when complete.
    """
    counts = {"examples": 0, "pairs": 0, "ties": 0, "bad rows": 0, "spare rows": 0}
    path = Path(output)
    partial = path.with_name(path.name + ".partial")
    lines: list[str] = []
    for spec in sources.as_specs(source):
        rows = sources.load_rows(spec, on_bad_row=on_bad_row)
        examples = formats.read(rows, on_bad_row=on_bad_row, seed=seed)
        counts["bad rows"] += examples.bad
        counts["spare rows"] += examples.spare  # without a partner, where two rows make a pair
        for example in examples:
            counts["examples"] += 1
            if example.kind == "ranked":
                found = list(of_example(example, how=how, ties=ties, margins=margins))
            elif example.kind == "preference":
                found = [example]
            else:
                raise DataError(
                    f"{example.origin}: rows of kind {example.kind!r} are neither rankings nor "
                    "pairs: prompt + completions + ranks or ratings are needed"
                )
            counts["ties"] += not found
            counts["pairs"] += len(found)
            lines += [json.dumps(_row(pair), ensure_ascii=False) + "\n" for pair in found]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    return counts


def _row(pair: Example) -> dict[str, Any]:
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return row if pair.margin is None else {**row, "margin": pair.margin}
