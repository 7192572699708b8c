# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: `batch_at(step)` is a pure function, so a resumed run sees the same batches.

Batches are numpy and global: every process computes the same one and puts its own rows on its
devices. A batch runs on across the end of an epoch; only the last batch of a finite run (or of an
evaluation) is filled up, with rows that are all padding and weigh nothing.
"""

import bisect
import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from jaxrlhf.data.encode import PairSet, PromptSet, RowSet
from jaxrlhf.data.formats import Turn
from jaxrlhf.data.order import Order, permutation
from jaxrlhf.errors import DataError
from jaxrlhf.types import LMBatch, PairBatch


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts to sample from, on the host."""

    tokens: np.ndarray  # int32 [B, P], right-padded
    lengths: np.ndarray  # int32 [B]; a filler row is one token long, so that it can be sampled from
    real: np.ndarray  # bool [B], False = a filler row
    indices: np.ndarray  # int64 [B], of the prompts in their set; -1 = a filler row
    prompts: tuple[Turn, ...]  # as in the data; fillers have ""
    columns: Mapping[str, tuple[Any, ...]]  # the other columns, one value a row, None where absent


def bucket(length: int, *, smallest: int = 32, largest: int | None = None) -> int:
    """The padded length for rows of `length`: 32, 64, 96, 128, 192, 256, 384, 512, 768...

    Few different shapes (two per doubling), so that few programs compile, at most a third padding.
    `largest` caps it (and must hold `length`).
    """
    if largest is not None and length > largest:
        raise ValueError(f"length {length} is over the largest bucket {largest}")
    size = smallest
    while size < length:
        if size < 4 * smallest:
            size += smallest
        else:  # 2^k -> 1.5 * 2^k -> 2^(k + 1)
            size = (
                size * 3 // 2 if (size // smallest) & (size // smallest - 1) == 0 else size * 4 // 3
            )
    return size if largest is None else min(size, largest)


WINDOW = 32  # batches that are sorted by length together
BY_LENGTH = zlib.crc32(b"by_length")  # a stream of random numbers of its own

S = TypeVar("S", RowSet, PairSet, PromptSet)


@dataclasses.dataclass(frozen=True)
class Batches(Generic[S]):
    """Batches of a set.

    batch_size: global rows (pairs, prompts) a batch.
    epochs: passes over the set; None = without end (the run counts its own steps).
    length: pad every batch to this many tokens; None = the bucket of its longest row.
    largest: cap of the buckets, usually data.max_length.
    by_length: rows of a batch are of like length, so that less of it is padding: every WINDOW
        batches' worth of the shuffled rows is sorted by length before it is cut into batches,
        which then come in random order. Still every row once an epoch (up to the window that
        straddles its end), and still a function of the step.
    """

    rows: S
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    length: int | None = None
    smallest: int = 32
    largest: int | None = None
    by_length: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size} must be positive")
        if len(self.rows) == 0:
            raise DataError("the set is empty: there is nothing to make batches of")
        longest = int(self.rows.lengths.max())
        cap = self.length or self.largest
        if cap is not None and longest > cap:
            raise ValueError(f"the longest row has {longest} tokens, more than {cap}")

    @functools.cached_property
    def order(self) -> Order:
        """Which example stands where; weighted if any source of the set has a weight."""
        parts = self.rows.parts
        if not self.shuffle or all(p.weight is None for p in parts):
            return Order((len(self.rows),), None, self.seed, self.shuffle)
        weights = tuple(1.0 if p.weight is None else float(p.weight) for p in parts)
        return Order(tuple(p.stop - p.start for p in parts), weights, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one pass fills or begins: ceil(rows / batch_size)."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def steps(self) -> int | None:
        """Batches in all epochs (batches run across epoch ends); None = without end."""
        if self.epochs is None:
            return None
        return -(-self.epochs * len(self.rows) // self.batch_size)

    def indices_at(self, step: int) -> np.ndarray:
        """int64 [batch_size], the rows of a batch; -1 = filler."""
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise IndexError(f"step {step} is outside the {self.steps} batches")
        if not self.by_length:
            return self._stretch(step, 1)
        window, place = divmod(step, WINDOW)
        return self._sorted(window)[place]

    def _stretch(self, step: int, batches: int) -> np.ndarray:
        """int64 [batches * batch_size], the rows of several batches as the order has them."""
        start = step * self.batch_size
        end = None if self.epochs is None else self.epochs * len(self.rows)
        return np.asarray(
            [
                self.order.at(i) if end is None or i < end else -1
                for i in range(start, start + batches * self.batch_size)
            ],
            np.int64,
        )

    def _sorted(self, window: int) -> np.ndarray:
        """int64 [batches, batch_size], the rows of a window, batches of like length."""
        found = self._windows.get(window)
        if found is None:
            begin = window * WINDOW
            count = WINDOW if self.steps is None else min(WINDOW, self.steps - begin)
            rows = self._stretch(begin, count)
            real = rows[rows >= 0]
            ordered = real[np.argsort(self.rows.lengths[real], kind="stable")]
            whole = len(real) // self.batch_size
            # A batch with fillers is the run's last one, wherever its rows stand by length.
            found = np.full((count, self.batch_size), -1, np.int64)
            found.reshape(-1)[: len(real)] = ordered
            found[:whole] = found[permutation(whole, self.seed, window, BY_LENGTH)]
            self._windows.clear()
            self._windows[window] = found
        return found

    @functools.cached_property
    def _windows(self) -> dict[int, np.ndarray]:
        """The window last asked for."""
        return {}

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("these batches have no end; steps_per_epoch says how many are a pass")
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        step = 0
        while self.steps is None or step < self.steps:
            yield self.batch_at(step)
            step += 1

    def in_row_order(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """What was computed on every batch of one pass, [batch_size, ...] each, as [n, ...] of the
        set's rows; what fillers gave is gone."""
        indices = np.concatenate([self.indices_at(step) for step in range(len(parts))])
        values = np.concatenate(list(parts))
        real = indices >= 0
        if not np.array_equal(np.sort(indices[real]), np.arange(len(self.rows))):
            raise ValueError(f"{len(parts)} batches are not one pass over {len(self.rows)} rows")
        found = np.empty((len(self.rows), *values.shape[1:]), values.dtype)
        found[indices[real]] = values[real]
        return found

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The padded lengths that can occur: the shapes a run compiles, ascending."""
        found = {self._padded(int(n)) for n in np.unique(self.rows.lengths)}
        return sorted(found)

    def _padded(self, longest: int) -> int:
        return self.length or bucket(longest, smallest=self.smallest, largest=self.largest)

    def batch_at(self, step: int) -> Any:
        """The batch of a step: LMBatch of a RowSet, PairBatch of a PairSet, PromptBatch of a
        PromptSet; numpy arrays. LMBatch.weights is None: weights are made of the global batch on
        the device. PairBatch.weights is 1 / (real pairs of the batch), 0 on fillers."""
        return self.gather(self.indices_at(step))

    def gather(self, indices: np.ndarray) -> Any:
        """The batch of given rows; -1 = filler."""
        rows, lengths = self.rows, self.rows.lengths
        real = indices >= 0
        longest = int(lengths[indices[real]].max()) if real.any() else 1
        padded = self._padded(longest)
        if isinstance(rows, RowSet):
            return LMBatch(**_stack(rows, indices, padded))
        if isinstance(rows, PairSet):
            both = [_stack(side, indices, padded) for side in (rows.chosen, rows.rejected)]
            weights = real.astype(np.float32) / max(int(real.sum()), 1)
            ref = None
            if rows.ref_logprobs is not None:
                ref = np.where(real[:, None], rows.ref_logprobs[indices], 0).astype(np.float32)
            return PairBatch(
                **{name: np.stack([side[name] for side in both], axis=1) for name in both[0]},
                weights=weights.astype(np.float32),
                margin=np.where(real, rows.margin[indices], 0).astype(np.float32),
                ref_logprobs=ref,
            )
        return _prompt_batch(rows, indices, padded)


def _stack(rows: RowSet, indices: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Right-padded [B, length] arrays; padding is token 0, segment 0."""
    shape = (len(indices), length)
    tokens = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for b, i in enumerate(indices):
        if i >= 0:
            row = rows.row(int(i))
            n = len(row.tokens)
            tokens[b, :n], mask[b, :n] = row.tokens, row.completion_mask
            segments[b, :n], positions[b, :n] = 1, np.arange(n)
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "completion_mask": mask,
    }


def _prompt_batch(rows: PromptSet, indices: np.ndarray, length: int) -> PromptBatch:
    tokens = np.zeros((len(indices), length), np.int32)
    lengths = np.ones(len(indices), np.int32)
    real = indices >= 0
    for b, i in enumerate(indices):
        ids = rows.prompt_ids(int(i)) if i >= 0 else rows.tokens[:1]
        tokens[b, : len(ids)], lengths[b] = ids, len(ids)
    names = list(dict.fromkeys(name for i in indices[real] for name in rows.columns[i]))
    columns = {
        name: tuple(rows.columns[i].get(name) if i >= 0 else None for i in indices)
        for name in names
    }
    prompts = tuple(rows.prompts[i] if i >= 0 else "" for i in indices)
    return PromptBatch(tokens, lengths, real, indices, prompts, columns)


# --- train and eval --------------------------------------------------------------------------


def split_by_fraction(rows: S, fraction: float, *, seed: int = 0) -> tuple[S, S]:
    """(train, eval): about `fraction` of the rows are held out, whole groups at a time.

    Rows of one group (one prompt) are never on both sides. Both sides keep at least one group.

    Raises:
        DataError: fewer than two groups, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise DataError(f"eval fraction {fraction} must lie between 0 and 1")
    names, group_of = np.unique(rows.groups, return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"cannot hold out {fraction:.0%}: all {len(rows)} rows share one prompt; give data.eval"
        )
    sizes = np.bincount(group_of)
    order = permutation(len(names), seed, 0)
    filled = np.cumsum(sizes[order]).tolist()
    # as many whole groups as come nearest to the wanted number of rows
    wanted = fraction * len(rows)
    n = bisect.bisect_left(filled, wanted)
    if n < len(filled) and (n == 0 or filled[n] - wanted < wanted - filled[n - 1]):
        n += 1
    n = min(max(n, 1), len(names) - 1)
    held = np.isin(group_of, order[:n])
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def leaks(train: S, evaluation: S) -> int:
    """How many rows of `evaluation` have a prompt (group) that occurs in `train`."""
    return int(np.isin(evaluation.groups, train.groups).sum())


def folds(rows: S, number: int, *, seed: int = 0) -> Iterator[tuple[S, S]]:
    """(train, eval) of each of `number` folds; every row is held out once, groups stay whole."""
    names, group_of = np.unique(rows.groups, return_inverse=True)
    if not 2 <= number <= len(names):
        raise DataError(f"{number} folds need between 2 and {len(names)} (the number of prompts)")
    rank = np.empty(len(names), np.int64)
    rank[permutation(len(names), seed, 0)] = np.arange(len(names))
    fold = (rank % number)[group_of]
    for k in range(number):
        yield rows.take(np.flatnonzero(fold != k)), rows.take(np.flatnonzero(fold == k))
