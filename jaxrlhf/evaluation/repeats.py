# SPDX-License-Identifier: Apache-2.0
"""Several runs of one experiment, told as one: the mean over seeds or folds, its interval."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation.intervals import mean_interval
from jaxrlhf.evaluation.results import Interval

# Runs that differ in these alone repeat one experiment; any other value makes another one.
REPEATED = ("seed", "data.seed", "data.fold")


@dataclasses.dataclass(frozen=True)
class Repeated:
    """One experiment run several times.

    values: what tells it from the others (a learning rate...). over: what it was repeated over.
    metrics: {name: (mean, 95 % interval of the mean)} of what every run has and is finite in all.
    """

    values: Mapping[str, Any]
    over: tuple[str, ...]
    count: int
    metrics: Mapping[str, tuple[float, Interval]]


def repeated(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]) -> list[Repeated]:
    """Experiments among runs (values, metrics), in order; those that were run once are left out.

    The interval is Student's t over the runs. Folds share most of their training rows, so theirs
    says how the folds differ, a little too narrowly for new data.
    """
    cells: dict[str, list[tuple[Mapping[str, Any], Mapping[str, float]]]] = {}
    for values, metrics in runs:
        own = {k: v for k, v in values.items() if k not in REPEATED}
        cells.setdefault(json.dumps(own, sort_keys=True, default=str), []).append((values, metrics))
    found = []
    for cell in cells.values():
        if len(cell) < 2:
            continue
        first = cell[0][0]
        columns = {
            name: [metrics.get(name, math.nan) for _, metrics in cell] for name in cell[0][1]
        }
        found.append(
            Repeated(
                values={k: v for k, v in first.items() if k not in REPEATED},
                over=tuple(k for k in first if k in REPEATED),
                count=len(cell),
                metrics={
                    name: (math.fsum(column) / len(column), mean_interval(column))
                    for name, column in columns.items()
                    if all(map(math.isfinite, column))
                },
            )
        )
    return found
