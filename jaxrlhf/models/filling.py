# SPDX-License-Identifier: Apache-2.0
"""Arrays in their sharding, filled from files tensor by tensor.

A leaf of ours is often many tensors of a file, one a layer (and expert). Its buffers are made
first, empty; then each tensor goes to where it belongs, so that the host holds no stacked leaf.
On a CPU, where a device's memory is the host's, tensors are written straight into the buffers, by
several threads. Elsewhere the views of the file are sent to the devices, at most two tensors at a
time, and a program puts them into the buffers in place, turned and converted there.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Bounds = tuple[tuple[int, int], ...]  # (start, stop) per dimension
_ROWS = 64  # rows turned at a time: fastest, of those tried, for matrices of 896 to 8192 columns
_THREADS = 8


@dataclass(frozen=True)
class Source:
    """Where the numbers of one leaf come from.

    Attributes:
        shape, dtype: of the leaf.
        lead: how many of its first dimensions count tensors: layers, experts.
        read: (numbers of the tensor, bounds in the other dimensions) to a view of those values, in
            whichever dtype is stored.
        done: (numbers): that tensor is not needed again.
        turned: stored with its dimensions in the opposite order (`read` gives a transposed view).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    lead: int
    read: Callable[[tuple[int, ...], Bounds], np.ndarray]
    done: Callable[[tuple[int, ...]], None]
    turned: bool

    def numbers(self) -> Iterator[tuple[int, ...]]:
        """Numbers of all its tensors."""
        return itertools.product(*map(range, self.shape[: self.lead]))


def make_arrays(
    sources: Mapping[str, Source],
    shardings: Mapping[str, Sharding | None],
    *,
    in_place: bool | None = None,
) -> dict[str, jax.Array]:
    """The leaves of `sources`, each in its sharding (None: jax's default device).

    Each process reads only what its own devices hold, once, however many of them hold it.

    Args:
        in_place: whether devices' memory is the host's; by default as the devices are.

    Raises:
        whatever `Source.read` raises; TypeError for a sharding over several devices that are not
        the host's and no mesh.
    """
    if in_place is None:
        in_place = all(_on_cpu(shardings[path]) for path in sources)
    if not in_place:
        return {path: _streamed(source, shardings[path]) for path, source in sources.items()}
    buffers = _run([functools.partial(_empty, s, shardings[path]) for path, s in sources.items()])
    arrays = jax.block_until_ready(dict(zip(sources, buffers, strict=True)))
    jobs = [
        functools.partial(_write, source, numbers, shards)
        for path, source in sources.items()
        for shards in [_writable(arrays[path])]
        for numbers in source.numbers()
    ]
    _run(jobs)
    return arrays


def _on_cpu(sharding: Sharding | None) -> bool:
    if sharding is None:
        return jax.local_devices()[0].platform == "cpu"
    return all(device.platform == "cpu" for device in sharding.addressable_devices)


def _run(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, by as many threads as there are cores; the first error ends it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(min(_THREADS, cores or 1))
    futures = [pool.submit(job) for job in jobs]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # an interrupt ends it too
        pool.shutdown(cancel_futures=True)
    # Those that were never begun come after the error.
    return [future.result() for future in futures]


# ------------------------------------------------------------------- where memory is the host's own


def _empty(source: Source, sharding: Sharding | None) -> jax.Array:
    """An array of zeros in buffers of the runtime's own, which can be donated later (those of a
    NumPy array that it only looks at cannot), without a program to compile."""

    def zeros(shape: tuple[int, ...]) -> np.ndarray:
        # Not one block of memory, so that the runtime must copy; and it copies rows quickly.
        return np.broadcast_to(np.zeros(shape[-1:], source.dtype), shape)

    if sharding is None:
        return jax.device_put(zeros(source.shape))
    return jax.make_array_from_callback(
        source.shape, sharding, lambda index: zeros(_sizes(_bounds(index, source.shape)))
    )


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    """Of one slice a dimension, as jax names a shard."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _sizes(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _writable(array: jax.Array) -> list[tuple[Bounds, np.ndarray]]:
    """The buffers of an array on this host's CPU devices, as NumPy arrays to write into.

    Arrays of jax never change; this one nobody has seen yet, and all that wrote into it is done.
    """
    found = []
    for shard in array.addressable_shards:
        memory = np.asarray(_Memory(shard.data)).view(array.dtype).reshape(shard.data.shape)
        found.append((_bounds(shard.index, array.shape), memory))
    return found


class _Memory:
    """The bytes of an array on a CPU device, told to NumPy as writable; keeps the array.

    (`np.asarray(array)` would leave a reference behind with which the array cannot be donated.)
    """

    def __init__(self, array: jax.Array):
        self.array = array
        self.__array_interface__ = {
            "data": (array.unsafe_buffer_pointer(), False),
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _write(source: Source, numbers: tuple[int, ...], shards: list) -> None:
    """One tensor of the file to all buffers that hold a part of it."""
    wanted: dict[Bounds, list[np.ndarray]] = {}
    for bounds, memory in shards:
        lead, inner = bounds[: source.lead], bounds[source.lead :]
        if all(start <= n < stop for n, (start, stop) in zip(numbers, lead, strict=True)):
            at = tuple(n - start for n, (start, _) in zip(numbers, lead, strict=True))
            wanted.setdefault(inner, []).append(memory[at])
    for inner, places in wanted.items():
        values = source.read(numbers, inner)
        for place in places:
            copy_into(place, values)
    if wanted:
        source.done(numbers)


def copy_into(place: np.ndarray, values: np.ndarray) -> None:
    """`place[...] = values`, converted and transposed as needed; a block of rows at a time."""
    if values.ndim < 2:
        _convert(place, values)
        return
    turned = values.ndim == 2 and values.strides[0] < values.strides[1]
    if not turned:
        rows = max(1, (1 << 16) // max(1, math.prod(values.shape[1:])))
        for start in range(0, len(values), rows):
            _convert(place[start : start + rows], values[start : start + rows])
        return
    # Through a small matrix whose rows do not begin a power of two apart: where they do, a column
    # of them falls on few lines of the cache, and a transposition is ten times slower.
    there = values.T
    block = np.empty((_ROWS, there.shape[1] + 32), place.dtype)[:, : there.shape[1]]
    for start in range(0, len(there), _ROWS):
        rows = there[start : start + _ROWS]
        _convert(block[: len(rows)], rows)
        _same(place[:, start : start + _ROWS], block[: len(rows)].T)


def _same(place: np.ndarray, values: np.ndarray) -> None:
    """Of one dtype: as integers, which NumPy copies without asking Python."""
    unsigned = np.dtype(f"u{place.dtype.itemsize}")
    np.copyto(place.view(unsigned), values.view(unsigned))


def _convert(place: np.ndarray, values: np.ndarray) -> None:
    if place.dtype == values.dtype:
        _same(place, values)
    elif (place.dtype, values.dtype) == (np.float32, ml_dtypes.bfloat16):
        # The upper half of a float32; as integers too.
        bits = place.view(np.uint32)
        np.copyto(bits, values.view(np.uint16))
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        np.copyto(place, values, casting="unsafe")


# ------------------------------------------------------------------------------ where it is another


def _streamed(source: Source, sharding: Sharding | None) -> jax.Array:
    """The array, each tensor sent and put in its place; the layers (experts) of different shards
    side by side."""
    lead, inner = source.shape[: source.lead], source.shape[source.lead :]
    inner_there = inner[::-1] if source.turned else inner
    spec: tuple[Any, ...] = ()
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (len(source.shape) - len(sharding.spec)))
        local = sharding.shard_shape(source.shape)[: source.lead]
        spec_there = spec[source.lead :][:: -1 if source.turned else 1]
        piece_sharding = NamedSharding(
            sharding.mesh, PartitionSpec(*spec[: source.lead], *spec_there)
        )
    elif sharding is None or len(sharding.device_set) == 1:
        local, piece_sharding = lead, sharding
    else:
        raise TypeError(f"{sharding}: parameters need a NamedSharding")
    shards = tuple(size // each for size, each in zip(lead, local, strict=True))
    empty = jax.jit(lambda: jnp.zeros(source.shape, source.dtype), out_shardings=sharding)

    def put(array: jax.Array, piece: jax.Array, at: tuple[Any, ...]) -> jax.Array:
        axes = tuple(range(source.lead)), tuple(range(source.lead, len(source.shape)))
        ours = piece.transpose(*axes[0], *axes[1][::-1]) if source.turned else piece
        start = (*at, *(0 for _ in inner))
        return jax.lax.dynamic_update_slice(array, ours.astype(source.dtype), start)

    if isinstance(piece_sharding, NamedSharding):
        put = jax.shard_map(
            put,
            mesh=piece_sharding.mesh,
            in_specs=(PartitionSpec(*spec), piece_sharding.spec, PartitionSpec()),
            out_specs=PartitionSpec(*spec),
        )
    update = jax.jit(put, donate_argnums=0, out_shardings=sharding)

    def piece_at(at: tuple[int, ...]) -> jax.Array:
        seen: dict[tuple, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            bounds = _bounds(index, (*shards, *inner_there))
            if bounds not in seen:
                each = zip(bounds[: source.lead], local, at, strict=True)
                numbers = tuple(start * size + n for (start, _), size, n in each)
                there = bounds[source.lead :]
                values = source.read(numbers, there[::-1] if source.turned else there)
                values = values.T if source.turned else values
                seen[bounds] = values.reshape((1,) * source.lead + values.shape)
            return seen[bounds]

        if piece_sharding is None:
            return jax.device_put(part((slice(None),) * len(source.shape)))
        return jax.make_array_from_callback((*shards, *inner_there), piece_sharding, part)

    array = empty()
    before: jax.Array | None = None
    for at in itertools.product(*map(range, local)):
        piece = piece_at(at)
        array = update(array, piece, tuple(jnp.int32(n) for n in at))
        if before is not None:
            before.block_until_ready()
        before = piece
    for numbers in source.numbers():
        source.done(numbers)
    return array
