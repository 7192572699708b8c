# SPDX-License-Identifier: Apache-2.0
"""Which example comes when: a pure function of (seed, position), with random access.

Nothing here has a state, so a run that resumes at step k asks for step k. Hosts and workers do not
enter: every process computes the same global order and takes its own rows of a batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


@functools.lru_cache(maxsize=16)
def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """int64 [n], a permutation of range(n) drawn from (seed, epoch, stream) alone.

    A stable argsort of raw Philox output, so that it does not change with numpy's releases (which
    may alter `Generator.permutation`).
    """
    mask = (1 << 64) - 1
    raw = np.random.Philox(
        key=np.array([seed & mask, stream & mask], np.uint64),
        counter=np.array([0, 0, epoch & mask, 0], np.uint64),
    ).random_raw(n)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


@dataclasses.dataclass(frozen=True)
class Order:
    """Positions 0, 1, 2... of a run over `parts` of a set, to indices of that set.

    Without weights the parts are one set of n examples; epoch e is positions [e*n, (e+1)*n) and
    visits each once. With weights, part k supplies exactly its share of every stretch of positions
    (within one example per part), and cycles through its own examples, reshuffled every time.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if not self.sizes or any(n < 1 for n in self.sizes):
            raise ValueError(f"sizes {self.sizes}: every part needs at least one example")
        if self.weights is not None and (
            len(self.weights) != len(self.sizes)
            or not all(0 < w < float("inf") for w in self.weights)
        ):
            raise ValueError(f"weights {self.weights} do not suit parts of sizes {self.sizes}")

    def __len__(self) -> int:
        """Examples in one epoch: all of them (with weights, as many as there are)."""
        return sum(self.sizes)

    def at(self, position: int) -> int:
        """The index of the example at a position."""
        if self.weights is None:
            epoch, i = divmod(position, len(self))
            return self._shuffled(len(self), epoch, i, stream=0)
        part, i = interleave(position, self.weights)
        epoch, i = divmod(i, self.sizes[part])
        return sum(self.sizes[:part]) + self._shuffled(self.sizes[part], epoch, i, stream=part + 1)

    def _shuffled(self, n: int, epoch: int, i: int, stream: int) -> int:
        return int(permutation(n, self.seed, epoch, stream)[i]) if self.shuffle else i


def interleave(position: int, weights: Sequence[float]) -> tuple[int, int]:
    """(part, index within that part) of a position when parts are mixed by weight.

    Part k takes the positions at which floor(position * share) steps up: exact in the long run and
    never more than one example off, for any weights. More than two parts are split one after the
    other, each from what the earlier ones left.
    """
    rest = sum(map(_exact, weights), Fraction(0))
    for part, weight in enumerate(map(_exact, weights)):
        if part == len(weights) - 1:
            break
        share = weight / rest
        rest -= weight
        # Half a step of phase: a rare part does not wait until the very end of its period.
        before = (position * share + Fraction(1, 2)).__floor__()
        if ((position + 1) * share + Fraction(1, 2)).__floor__() > before:
            return part, before
        position -= before
    return len(weights) - 1, position


@functools.lru_cache(maxsize=256)
def _exact(weight: float) -> Fraction:
    return Fraction(str(weight))
