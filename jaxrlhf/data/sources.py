# SPDX-License-Identifier: Apache-2.0
"""Sources of rows: files, folders, saved datasets, hub names and tfds, all as plain dicts.

Every row keeps its place (file and line), because an error about data is useful only if it says
where. Reading is strict where leniency would change what is trained: invalid UTF-8, NaN, duplicate
keys, lone surrogates and cut lines are bad rows, never guesses.
"""

import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrlhf.data.tokenizer import is_path
from jaxrlhf.errors import DataError

OnBadRow = Literal["error", "skip"]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_LINE = 64 * 1024 * 1024  # bytes; a longer line is an error, so that memory stays bounded
SHOWN = 5  # how many skipped rows are remembered word for word
SKIPPING = " (data.on_bad_row=skip leaves such rows out and counts them)"


class Origin(NamedTuple):
    """Where a row came from; prints as `file:line` or `file, row 3`."""

    file: str
    line: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}"
        return self.file if self.row is None else f"{self.file}, row {self.row}"


class RowError(DataError):
    """One row cannot be used; under `on_bad_row: skip` it is counted and left out."""


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One entry of `data.train` or `data.eval`.

    source: a path, folder, glob pattern, hub name, or `tfds:NAME`.
    split: which split of a folder, dataset or hub name (default: train, or all there is).
    weight: share among several sources; None everywhere = all rows of all sources, once an epoch.
    format: a key of formats.FORMATS; None = found out from the columns.
    column_map: {name we expect: name in the file}.
    limit: at most so many rows, the first ones.
    subset: configuration name of a hub dataset.
    """

    source: str
    split: str | None = None
    weight: float | None = None
    format: str | None = None
    column_map: Mapping[str, str] | None = None
    limit: int | None = None
    subset: str | None = None


Source = str | Mapping[str, Any] | SourceSpec | Path


@dataclasses.dataclass(frozen=True)
class Rows(Sequence):
    """Rows of one source, in file order."""

    spec: SourceSpec
    rows: list[dict[str, Any]]
    origins: list[Origin]
    digest: str  # SHA-256 of the files' bytes (of the rows, where there are no files)
    bad: int = 0  # rows left out under on_bad_row = skip
    bad_examples: tuple[str, ...] = ()  # the first few, with place and reason

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def as_specs(sources: Source | Sequence[Source]) -> list[SourceSpec]:
    """What `data.train` may hold (a name, a mapping, or a list of them) as specs."""
    if isinstance(sources, (str, Path, Mapping, SourceSpec)):
        sources = [sources]
    specs = []
    fields = [f.name for f in dataclasses.fields(SourceSpec)]
    for source in sources:
        if isinstance(source, (str, Path)):
            source = SourceSpec(str(source))
        elif isinstance(source, Mapping):
            for key in source:
                if key not in fields:
                    raise DataError(
                        f"data source {dict(source)}: unknown key {key!r}{nearest(key, fields)}; "
                        f"keys are {', '.join(fields)}"
                    )
            if not isinstance(source.get("source"), (str, Path)):
                raise DataError(f"data source {dict(source)}: `source` must name a path or dataset")
            source = SourceSpec(**{**source, "source": str(source["source"])})
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise DataError(f"data source {source.source}: weight {source.weight} must be positive")
        if source.limit is not None and source.limit < 1:
            raise DataError(f"data source {source.source}: limit {source.limit} must be positive")
        specs.append(source)
    if not specs:
        raise DataError("no data source is given: set data.train to a path, folder or dataset name")
    return specs


def load_rows(source: Source, *, on_bad_row: OnBadRow = "error") -> Rows:
    """All rows of one source, checked to be dicts of clean text, columns renamed by its map.

    Files: jsonl, json (a list of objects, an object holding one, or objects one after the other),
    csv, tsv, parquet and txt (documents separated by blank lines), each also .gz. A folder: its
    data files; names that begin with a split (`train-00000.parquet`) belong to that split. Also a
    dataset saved by `datasets`, a hub name, and `tfds:NAME[/CONFIG]`.

    Raises:
        DataError: missing, empty or unreadable source; with on_bad_row="error" also a bad row.
    """
    [spec] = as_specs(source)
    keep = _Keeper(on_bad_row, spec.limit)
    if spec.source.startswith("tfds:"):
        digest = _keep_dataset(keep, _read_tfds(spec), spec.source)
    elif is_path(spec.source) or glob.has_magic(spec.source) or _looks_like_file(spec.source):
        digest = _read_path(keep, spec)
    else:
        digest = _keep_dataset(keep, _read_hub(spec), spec.source)
    rows = keep.rows
    if not rows:
        why = f"; {keep.bad} bad row(s), first: {keep.examples[0]}" if keep.bad else ""
        raise DataError(f"data source {spec.source}: it holds no rows{why}")
    if spec.column_map:
        rows = _rename(rows, keep.origins, spec.column_map)
    return Rows(spec, rows, keep.origins, digest, keep.bad, tuple(keep.examples))


def nearest(name: str, among: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing."""
    match = difflib.get_close_matches(name.lower(), [str(a) for a in among], n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


# --- keeping rows ----------------------------------------------------------------------------


class _Full(Exception):
    """Enough rows were read."""


class _Keeper:
    """Collects rows up to the limit; a bad one is raised or counted."""

    def __init__(self, on_bad_row: OnBadRow, limit: int | None):
        self.on_bad_row, self.limit = on_bad_row, limit
        self.rows: list[dict[str, Any]] = []
        self.origins: list[Origin] = []
        self.bad = 0
        self.examples: list[str] = []

    def add(self, row: Any, origin: Origin) -> None:
        if not isinstance(row, dict):
            return self.reject(origin, f"expected an object of columns, found {_short(row)}")
        if bad := _lone_surrogate(row):
            return self.reject(origin, f"column {bad!r} holds half a surrogate pair, no character")
        self.rows.append(row)
        self.origins.append(origin)
        if self.limit is not None and len(self.rows) >= self.limit:
            raise _Full

    def reject(self, origin: Origin, reason: str) -> None:
        message = f"{origin}: {reason}"
        if self.on_bad_row == "error":
            raise RowError(f"{message}{SKIPPING}")
        self.bad += 1
        if len(self.examples) < SHOWN:
            self.examples.append(message)


def _short(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _lone_surrogate(value: Any, name: str = "") -> str | None:
    """The first column whose text cannot be written as UTF-8."""
    if isinstance(value, str):
        # isascii is one flag look-up; only other text is worth encoding
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return name or "text"
        return None
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = ((name, v) for v in value)
    else:
        return None
    for key, child in items:
        if isinstance(key, str) and not key.isascii() and _lone_surrogate(key):
            return ascii(key)
        if bad := _lone_surrogate(child, name or ascii(key).strip("'")):
            return bad
    return None


def _rename(
    rows: list[dict[str, Any]], origins: list[Origin], column_map: Mapping[str, str]
) -> list[dict[str, Any]]:
    found = set().union(*(row.keys() for row in rows))
    for expected, theirs in column_map.items():
        if theirs not in found:
            swapped = (
                f"; it reads {{ours: theirs}}: column_map: {{{theirs}: {expected}}}"
                if expected in found
                else nearest(theirs, found)
            )
            raise DataError(
                f"{origins[0].file}: column_map {expected}: {theirs}: there is no column "
                f"{theirs!r}{swapped}; columns are {', '.join(sorted(map(str, found)))}"
            )
    renamed = []
    for row in rows:
        new = {k: v for k, v in row.items() if k not in column_map}
        for theirs in column_map.values():
            if theirs not in column_map:
                new.pop(theirs, None)
        new |= {ours: row[theirs] for ours, theirs in column_map.items() if theirs in row}
        renamed.append(new)
    return renamed


# --- paths -----------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def _looks_like_file(name: str) -> bool:
    return bool(_suffix(Path(name)))


def _read_path(keep: _Keeper, spec: SourceSpec) -> str:
    name = str(Path(spec.source).expanduser())
    path = Path(name)
    if path.is_dir() and any(
        (path / f).exists() for f in ("dataset_info.json", "state.json", "dataset_dict.json")
    ):
        return _keep_dataset(keep, _read_saved(path, spec), name)
    if path.is_dir():
        files = _files_of_folder(path, spec.split)
    elif path.exists():
        _no_split(spec, "a file")
        files = [path]
    elif glob.has_magic(name):
        files = matching(name)
        _no_split(spec, "a pattern of files")
        if not files:
            raise DataError(f"data source {spec.source}: no file matches this pattern")
    else:
        folder = path.parent
        if not folder.is_dir():
            raise DataError(f"data source {spec.source}: the folder {folder} does not exist")
        others = sorted(p.name for p in folder.iterdir())
        hint = (
            nearest(path.name, others) or f"; {folder} holds {', '.join(others[:8]) or 'nothing'}"
        )
        raise DataError(f"data source {spec.source}: no such file{hint}")
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.name.encode() + b"\0" + _file_digest(file))
    try:
        for file in files:
            read_file(file, keep)
    except _Full:
        pass
    return sha.hexdigest()


def matching(pattern: str) -> list[Path]:
    """The files that a glob pattern stands for, in order."""
    return sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())


def _no_split(spec: SourceSpec, what: str) -> None:
    if spec.split is not None:
        raise DataError(
            f"data source {spec.source}: split = {spec.split!r}, but {what} has no splits; leave "
            "`split` out, or give a folder with files named by their split"
        )


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    def data_files(where: Path) -> list[Path]:
        return sorted(p for p in where.iterdir() if p.is_file() and _suffix(p) in SUFFIXES[:-1])

    if split and (folder / split).is_dir() and data_files(folder / split):
        return data_files(folder / split)
    files = data_files(folder)
    if not files and (folder / "data").is_dir():
        files = data_files(folder / "data")
    files = files or sorted(p for p in folder.iterdir() if p.is_file() and _suffix(p) == ".txt")
    if not files:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"data source {folder}: no data files ({', '.join(SUFFIXES)}) in this folder; "
            f"it holds {held}"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.match(
            r"(train|test|validation|valid|val|dev|eval)(?:[-_.]|$)", file.name.lower()
        )
        splits.setdefault(match.group(1) if match else "", []).append(file)
    if split is not None:
        names = {"validation": ("validation", "valid", "val", "dev")}.get(split, (split,))
        chosen = [f for name in names for f in splits.get(name, [])]
        chosen = chosen or [f for f in files if re.match(re.escape(split) + r"[-_.]", f.name)]
        if not chosen:
            known = ", ".join(s for s in splits if s) or "none (no file begins with a split name)"
            raise DataError(f"data source {folder}: no split {split!r}; splits found: {known}")
        return chosen
    return splits.get("train", files)


def _file_digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_file(path: Path, keep: "_Keeper") -> None:
    """Reads one file into `keep`; the way is chosen by its suffix (.gz is looked through)."""
    readers: dict[str, Callable[[Path, _Keeper], None]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }
    reader = readers.get(_suffix(path))
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)} and .gz")
    try:
        reader(path, keep)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _decode(raw: bytes, origin: Callable[[int], Origin], offset: int = 0) -> str:
    """Strict UTF-8; the error names the byte, counted from the start of the (unzipped) file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = origin(raw.count(b"\n", 0, error.start))
        raise RowError(
            f"{line}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not valid UTF-8: "
            f"{error.reason}; save the file as UTF-8"
        ) from error


# --- JSON ------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} occurs twice")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; use null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse(parse: Callable[[], Any]) -> Any:
    """Runs a JSON parse; every way it can fail becomes a ValueError with one line."""
    try:
        return parse()
    except json.JSONDecodeError as error:
        raise ValueError(f"column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_jsonl(path: Path, keep: _Keeper) -> None:
    with _open(path) as file:
        offset = 0
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            origin = Origin(str(path), line=number)
            if len(raw) > MAX_LINE:
                raise DataError(f"{origin}: the line is longer than {MAX_LINE >> 20} MiB")
            start, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw, start = raw[3:], start + 3
            if not raw.strip():
                continue
            try:
                line = _decode(raw, lambda _, origin=origin: origin, start).strip()
            except RowError as error:
                keep.reject(origin, str(error).split(": ", 1)[1])
                continue
            try:
                row = _parse(lambda line=line: _DECODER.decode(line))
            except ValueError as error:
                cut = "" if raw.endswith(b"\n") else " (the last line: was the file cut short?)"
                keep.reject(origin, f"not JSON: {error}{cut}")
                continue
            keep.add(row, origin)


def _read_json(path: Path, keep: _Keeper) -> None:
    with _open(path) as file:
        raw = file.read()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, lambda line: Origin(str(path), line=line + 1))
    if not text.strip():
        return
    try:
        if text.lstrip().startswith("["):
            values = list(_json_values(text, text.index("[") + 1, closing="]"))
        else:
            values = list(_json_values(text, 0, closing=""))
    except _JsonError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise DataError(f"{path}:{line}: column {column}: not JSON: {error.reason}") from None
    if len(values) == 1 and not text.lstrip().startswith("[") and isinstance(values[0][0], dict):
        # one object: a container of rows under some key, or a single row (perhaps of messages)
        lists = {
            k: v
            for k, v in values[0][0].items()
            if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)
        }
        if (
            len(lists) == 1
            and len(values[0][0]) <= 3
            and not {"role", "from"} & next(iter(lists.values()))[0].keys()
        ):
            for index, row in enumerate(next(iter(lists.values()))):
                keep.add(row, Origin(str(path), row=index))
            return
    line, seen = 1, 0
    for value, position in values:
        line += text.count("\n", seen, position)
        seen = position
        keep.add(value, Origin(str(path), line=line))


class _JsonError(ValueError):
    def __init__(self, position: int, reason: str):
        super().__init__(reason)
        self.position, self.reason = position, reason


def _json_values(text: str, at: int, closing: str) -> Iterator[tuple[Any, int]]:
    """(value, position) of the values of a JSON array, or of values laid one after the other."""
    space = re.compile(r"[ \t\n\r]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        assert match is not None
        return match.end()

    at, first = skip(at), True
    while True:
        if closing and at < len(text) and text[at] == closing and first:
            at = skip(at + 1)
            break
        if not closing and at >= len(text):
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _JsonError(error.pos, error.msg) from None
        except RecursionError:
            raise _JsonError(at, "nested too deeply") from None
        except ValueError as error:
            raise _JsonError(at, str(error)) from None
        yield value, at
        at, first = skip(end), False
        if not closing:
            continue
        if at >= len(text):
            raise _JsonError(len(text), "the list is not closed: was the file cut short?")
        if text[at] == closing:
            at = skip(at + 1)
            break
        if text[at] != ",":
            raise _JsonError(at, "expected ',' or ']'")
        at = skip(at + 1)
    if at < len(text):
        raise _JsonError(at, "unexpected text after the list")


# --- other files -----------------------------------------------------------------------------


def _read_csv(path: Path, keep: _Keeper) -> None:
    with _open(path) as file:
        raw = file.read()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, lambda line: Origin(str(path), line=line + 1))
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV: {error}") from error
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) != len(header):
                raise DataError(f"{path}:{line}: a column name occurs twice in {', '.join(header)}")
            continue
        if len(fields) != len(header):
            keep.reject(
                Origin(str(path), line=line),
                f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})",
            )
            continue
        keep.add(dict(zip(header, fields, strict=True)), Origin(str(path), line=line))


def _read_text(path: Path, keep: _Keeper) -> None:
    with _open(path) as file:
        raw = file.read()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, lambda line: Origin(str(path), line=line + 1))
    text = text.replace("\r\n", "\n")
    line = 1
    for document in re.split(r"(\n[ \t]*\n\s*)", text):
        if document.strip():
            keep.add({"text": document.strip("\n")}, Origin(str(path), line=line))
        line += document.count("\n")


def _read_parquet(path: Path, keep: _Keeper) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.lower().endswith(".gz"):
            with _open(path) as file:
                table = pq.ParquetFile(pa.BufferReader(file.read()))
        else:
            table = pq.ParquetFile(path)
        index = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                keep.add(row, Origin(str(path), row=index))
                index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable parquet file: {reason}") from error


# --- datasets and tfds -----------------------------------------------------------------------


def _keep_dataset(keep: _Keeper, rows: Iterable[Mapping[str, Any]], name: str) -> str:
    sha = hashlib.sha256()
    try:
        for index, row in enumerate(rows):
            sha.update(json.dumps(row, sort_keys=True, default=str).encode())
            keep.add(dict(row), Origin(name, row=index))
    except _Full:
        pass
    return sha.hexdigest()


def _read_saved(path: Path, spec: SourceSpec) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data source {path}: damaged saved dataset: {reason}") from error
    if not hasattr(found, "keys"):
        _no_split(spec, "a single saved dataset")
    return _choose_split(found, spec)


def _choose_split(found: Any, spec: SourceSpec) -> Iterable[Mapping[str, Any]]:
    """One split of a DatasetDict (train unless said), or the dataset itself."""
    if not hasattr(found, "keys"):
        return found
    splits = list(found.keys())
    split = spec.split or ("train" if "train" in splits else splits[0])
    if split not in splits:
        raise DataError(
            f"data source {spec.source}: no split {split!r}{nearest(split, splits)}; "
            f"splits are {', '.join(splits)}"
        )
    return found[split]


def _read_hub(spec: SourceSpec) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(spec.source, name=spec.subset, split=spec.split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data source {spec.source}: neither a path here ({Path(spec.source).absolute()} does "
            f"not exist) nor a dataset that could be fetched from the hub: {reason}"
        ) from error
    return _choose_split(found, spec)


def _read_tfds(spec: SourceSpec) -> Iterator[Mapping[str, Any]]:
    """Rows of a prepared tfds set, without TensorFlow."""
    name = spec.source.removeprefix("tfds:")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"data source {spec.source}: needs tensorflow-datasets: pip install 'jaxrlhf[tfds]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        if is_path(name) and folder.is_dir():
            builder = tfds.builder_from_directory(str(folder))
        else:
            builder = tfds.builder(name)
        splits = list(builder.info.splits or ())
        split = spec.split or ("train" if "train" in splits or not splits else splits[0])
        if splits and split.split("[")[0] not in splits:
            raise DataError(
                f"data source {spec.source}: no split {split!r}; splits are {', '.join(splits)}"
            )
        as_data_source: Any = builder.as_data_source  # it is typed as taking nothing
        found = as_data_source(split=split)
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data source {spec.source}: cannot be read without TensorFlow: {reason}; prepare it "
            "with file_format='array_record' (tfds.builder(name, file_format='array_record')"
            ".download_and_prepare()), or give the folder: tfds:/path/to/name/1.0.0"
        ) from error
    for index in range(len(found)):
        yield _plain(found[index], Origin(spec.source, row=index))


def _plain(value: Any, origin: Origin) -> Any:
    """tfds values (bytes, numpy scalars and arrays) as Python ones; text is bytes there."""
    if isinstance(value, Mapping):
        return {key: _plain(child, origin) for key, child in value.items()}
    if isinstance(value, bytes):
        return _decode(value, lambda _: origin)
    if isinstance(value, (list, tuple)):
        return [_plain(child, origin) for child in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), origin)
    return value
