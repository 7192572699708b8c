# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one or several: checked headers, then parts of tensors on demand.

Files are memory-mapped and parts are views of the mapping: reading copies nothing, and what was
read is the page cache's, never this process's own memory. Pickles are never opened.
"""

import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrlhf.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
# A float that is NaN or infinite has an exponent of ones: without its sign it is at least this.
_ENDLESS = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F80 << 16),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_BLOCK = 1 << 16  # numbers looked at at a time: they stay in the cache


def listed(problems: list[str], limit: int = 8) -> str:
    """Lines of an error message, the first few of them."""
    more = f"\n  ... and {len(problems) - limit} more" if len(problems) > limit else ""
    return "".join(f"\n  {problem}" for problem in problems[:limit]) + more


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def not_finite(values: np.ndarray) -> int:
    """How many of the numbers of a float array are NaN or infinite.

    Looks at bits, a block at a time: as fast as memory is, whatever the dtype, with nothing
    allocated to speak of.
    """
    if values.size == 0:
        return 0
    unsigned, endless = _ENDLESS[values.dtype]
    bits = values.view(unsigned)
    if bits.ndim == 0 or bits.flags.c_contiguous:
        bits, rows = bits.reshape(-1), _BLOCK
    else:
        rows = max(1, _BLOCK * len(bits) // bits.size)
    limit = unsigned(2 * endless)  # shifted left, the sign is gone
    found = 0
    for start in range(0, len(bits), rows):
        block = bits[start : start + rows] << unsigned(1)
        if block.max() >= limit:
            found += int(np.count_nonzero(block >= limit))
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return values


class TensorFiles:
    """The tensors of a folder.

    Attributes:
        paths, shapes, dtypes: of every tensor, by name.
    """

    def __init__(self, folder: Path, single: str = SINGLE, index: str = INDEX):
        self.folder = folder
        self.single, self.index = single, index
        self.paths: dict[str, Path] = {}  # tensor -> file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._starts: dict[str, int] = {}  # of a tensor's bytes in its file
        self._maps: dict[Path, mmap.mmap] = {}
        self._metadata: dict[str, str] = {}
        if (folder / single).is_file():
            self._add(folder / single)
        elif (folder / index).is_file():
            self._add_indexed(read_json(folder / index))
        else:
            self._refuse()

    def _refuse(self):
        pickles = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        if pickles:
            raise ModelError(
                f"{self.folder} has its weights in {pickles[0]}, a pickle, which can run code "
                "and is never opened: load it with transformers where you trust it, and save it "
                "again with save_pretrained(folder, safe_serialization=True)"
            )
        raise ModelError(f"{self.folder} holds neither {self.single} nor {self.index}")

    def _add_indexed(self, index: dict[str, Any]):
        where = self.folder / self.index
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise ModelError(f"{where}: weight_map is missing or not an object of file names")
        for file in sorted(set(names.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{where}: {file!r} is not the name of a safetensors file there")
            if not (self.folder / file).is_file():
                raise ModelError(f"{where} names {file}, which is missing")
            self._add(self.folder / file)
        wrong = [
            f"{name}: the index says {file}, it is in "
            f"{self.paths[name].name if name in self.paths else 'none of the files'}"
            for name, file in names.items()
            if self.paths.get(name) != self.folder / file
        ]
        wrong += [
            f"{name}: in {p.name}, not in the index"
            for name, p in self.paths.items()
            if name not in names
        ]
        if wrong:
            raise ModelError(f"{where} does not fit its files:{listed(wrong)}")

    def _add(self, path: Path):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > _HEADER_LIMIT:
                    raise ValueError(f"its header claims {size} bytes")
                header = json.loads(file.read(size), object_pairs_hook=_no_duplicates)
                # The library checks offsets, overlaps, sizes and the end of the file.
                with safe_open(str(path), framework="numpy") as opened:
                    names = list(opened.keys())
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            length = path.stat().st_size if path.exists() else 0
            raise ModelError(
                f"{path} ({length} bytes) is damaged or cut short: {error}. Fetch it again"
            ) from error
        self._metadata |= header.get("__metadata__") or {}
        for name in names:
            if name in self.paths:
                raise ModelError(f"{name} is both in {self.paths[name].name} and {path.name}")
            stored = header[name]["dtype"]
            if stored not in DTYPES:
                raise ModelError(
                    f"{path}: {name} is stored as {stored}; readable are {', '.join(DTYPES)} "
                    "(quantized weights are not supported)"
                )
            self.paths[name] = path
            self.shapes[name] = tuple(header[name]["shape"])
            self.dtypes[name] = DTYPES[stored]
            self._starts[name] = 8 + size + header[name]["data_offsets"][0]

    def view(self, name: str) -> np.ndarray:
        """A whole tensor where it lies in the file: read-only, and nothing is read yet."""
        shape = self.shapes[name]
        found = np.frombuffer(
            self._maps[self.paths[name]],
            np.uint8,
            math.prod(shape) * self.dtypes[name].itemsize,
            self._starts[name],
        )
        return found.view(self.dtypes[name]).reshape(shape)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of one tensor (all of it), a read-only view; ModelError if a number in it is not
        finite."""
        part = self.view(name)[index]
        if bad := not_finite(part):
            raise ModelError(
                f"{self.paths[name]}: {name} holds {bad} values that are NaN or infinite"
            )
        return part

    def release(self, name: str) -> None:
        """Lets go of the pages of a tensor that has been used; reading it again still works."""
        start = self._starts[name] // mmap.PAGESIZE * mmap.PAGESIZE
        size = math.prod(self.shapes[name]) * self.dtypes[name].itemsize
        if size and hasattr(mmap, "MADV_DONTNEED"):
            end = self._starts[name] + size
            self._maps[self.paths[name]].madvise(mmap.MADV_DONTNEED, start, end - start)

    def metadata(self) -> dict[str, str]:
        """What the files' headers say beside tensors."""
        return dict(self._metadata)

    def digest(self) -> str:
        """SHA-256 over the sorted (name, dtype, shape, bytes) of all tensors, however they are
        spread over files; nothing is held."""
        total = hashlib.sha256()
        for name in sorted(self.paths):
            shape, dtype = self.shapes[name], self.dtypes[name]
            total.update(f"{name}\0{dtype.name}\0{','.join(map(str, shape))}\0".encode())
            total.update(self.view(name).reshape(-1).view(np.uint8).data)
            self.release(name)
        return total.hexdigest()

    def close(self):
        """Lets go of the files; mappings that arrays still look at end with those."""
        self._maps.clear()


def weights_digest(folder: str | os.PathLike) -> str:
    """The digest of the weights of a model folder (see TensorFiles.digest)."""
    files = TensorFiles(Path(folder))
    try:
        return files.digest()
    finally:
        files.close()
