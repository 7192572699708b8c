# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders to parameters and back, one tensor at a time.

Reading: config.json and the headers of the safetensors files are compared with what the family
declares before any weight is read; then each leaf is filled tensor by tensor, straight into its
sharding (filling.py). Pickles are never opened. Writing gives a folder that transformers loads;
reading it again gives the same bits.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters.trees import put
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import (
    FAMILIES,
    HARMLESS,
    Tensor,
    config_from_hf,
    config_to_hf,
    supported,
)
from jaxrlhf.models.filling import Bounds, Source, copy_into, make_arrays
from jaxrlhf.models.quantization import can_quantize, encode_stacked, stored
from jaxrlhf.models.tensor_files import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorFiles,
    listed,
    not_finite,
    read_json,
)
from jaxrlhf.models.transformer import abstract_params

Params = dict[str, Any]
GENERATION = "generation_config.json"
KINDS = ("lm", "reward")
KIND_NAMES = {"lm": "a language model", "reward": "a reward model (sequence classification)"}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a folder.

    Attributes:
        params: nested dict of arrays (models/transformer.py says how).
        config: its architecture.
        kind: "lm" or "reward"; a reward model has `score` and no `lm_head`.
        hf_config: config.json as it was, for token ids and for writing it again.
        generation_config: generation_config.json, {} if there is none.
    """

    params: Params
    config: ModelConfig
    kind: str
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]


def read_hf_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a model folder; ModelError says what the folder is instead."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is a PEFT adapter, not a model: name its base model")
    names = sorted(path.name for path in folder.iterdir())
    inside = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise ModelError(
        f"{folder} is no model folder: no config.json (it holds: {inside or 'nothing'})"
    )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model's or an adapter's folder, {} if there is none."""
    path = folder / GENERATION
    return read_json(path) if path.is_file() else {}


def generation_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of a config.json's token ids."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: hf[name] for name in names if hf.get(name) is not None}
    return {"_from_model_config": True, **ids}


def _get(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _wanted(config: ModelConfig, kind: str, num_outputs: int):
    heads = ("lm",) if kind == "lm" else ("score",)
    return abstract_params(config, heads=heads, num_outputs=num_outputs)


def _layout(config: ModelConfig, tree: Params) -> Iterator[tuple[Tensor, list[tuple]]]:
    """The family's tensors that `tree` has leaves for: (tensor, [(path, leaf), ...])."""
    for tensor in FAMILIES[config.family].tensors:
        found = [(path, _get(tree, path)) for path in tensor.leaves]
        found = [(path, leaf) for path, leaf in found if leaf is not None]
        if found:
            yield tensor, found


def _numbers(tensor: Tensor, leaf: Any) -> list[tuple[int, ...]]:
    """(layer,) or (layer, expert) of every tensor of the file that a leaf is made of; [()] if it
    is one."""
    lead = ("{layer}" in tensor.hf) + ("{expert}" in tensor.hf)
    return list(itertools.product(*map(range, leaf.shape[:lead])))


def _name(tensor: Tensor, numbers: tuple[int, ...]) -> str:
    return tensor.hf.format(**dict(zip(("layer", "expert"), numbers, strict=False)))


def _stored(tensor: Tensor, leaves: list[tuple]) -> dict[str, tuple]:
    """Names and shapes in the file: {name: shape}."""
    numbers = _numbers(tensor, leaves[0][1])
    shapes = [leaf.shape[len(numbers[0]) :] for _, leaf in leaves]
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    shape = shape[::-1] if tensor.transpose else shape
    return {_name(tensor, each): shape for each in numbers}


def _names_in_file(files: TensorFiles, config: ModelConfig) -> dict[str, str]:
    """Our names of the file's tensors to the names there, which may lack the family's prefix."""
    family = FAMILIES[config.family]
    known = {tensor.hf.split("{layer}")[0] for tensor in family.tensors}
    other = {name: tensor.hf for tensor in family.tensors for name in tensor.also}
    names: dict[str, str] = {}
    for name in files.paths:
        if name.endswith(family.buffers):
            continue
        if name in other and other[name] not in files.paths:
            names[other[name]] = name
            continue
        full = family.prefix + name
        bare = not any(name.startswith(start) for start in known) and any(
            full.startswith(start) for start in known
        )
        names[full if bare else name] = name
    return names


def _kind_of(hf: Mapping[str, Any], files: TensorFiles, where: Path) -> str:
    given = hf.get("architectures") or []
    family = FAMILIES[hf["model_type"]]
    for kind, name in family.architectures.items():
        if name in given:
            return kind
    if given and not any(name.endswith(("Model", "ForCausalLM")) for name in given):
        choices = ", ".join(name for f in FAMILIES.values() for name in f.architectures.values())
        raise ModelError(f"{where}: architectures = {given} is not supported; supported: {choices}")
    return "reward" if "score.weight" in files.paths else "lm"


def _check(files: TensorFiles, names: dict[str, str], expected: dict[str, tuple], where: Path):
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in names
    ]
    problems += [
        f"wrong shape: {names[name]} is {list(files.shapes[names[name]])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in names and files.shapes[names[name]] != tuple(shape)
    ]
    problems += [
        f"not part of this model: {there} {list(files.shapes[there])}"
        for name, there in names.items()
        if name not in expected
    ]
    if problems:
        raise ModelError(f"the weights of {where} do not fit its config.json:{listed(problems)}")


def _source(
    files: TensorFiles,
    names: Mapping[str, str],
    tensor: Tensor,
    part: int,
    leaves: list[tuple],
    head: int,
    dtype: np.dtype,
) -> Source:
    """Where a leaf comes from. Of a tensor that several leaves share only this leaf's part is read
    (one interleaved by heads of size `head`: all parts of the heads concerned)."""
    leaf = leaves[part][1]
    parts = len(leaves)
    offset = sum(leaf.shape[-1] for _, leaf in leaves[:part])

    def read(numbers: tuple[int, ...], bounds: Bounds) -> np.ndarray:
        start, stop = bounds[-1]
        first = start // head
        if tensor.by_head:
            there = slice(first * parts * head, -(-stop // head) * parts * head)
        else:
            there = slice(start + offset, stop + offset)
        index = (*(slice(*bound) for bound in bounds[:-1]), there)
        found = files.read(names[_name(tensor, numbers)], index[:: -1 if tensor.transpose else 1])
        found = found.T if tensor.transpose else found
        if not tensor.by_head:
            return found
        each = found.reshape(*found.shape[:-1], -1, parts, head)[..., part, :]
        each = each.reshape(*found.shape[:-1], -1)
        return each[..., start - first * head : stop - first * head]

    return Source(
        shape=tuple(leaf.shape),
        dtype=dtype,
        lead=len(_numbers(tensor, leaf)[0]),
        read=read,
        done=lambda numbers: files.release(names[_name(tensor, numbers)]),
        turned=tensor.transpose,
    )


def _place_quantized(source: Source, name: str, shardings: Any) -> Params:
    """The leaves that a kernel is stored in, encoded tensor by tensor: beside the few bits of its
    shards the host holds one layer's kernel at a time.

    All of a column is read even where a device keeps some of its rows: blocks are not cut.
    """
    shape = source.shape
    parts: dict[tuple, dict[str, np.ndarray]] = {}

    def columns(index) -> dict[str, np.ndarray]:
        bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        bounds[-2] = (0, shape[-2])
        if (key := tuple(bounds)) not in parts:
            lead, inner = bounds[:-2], key[-2:]

            def one(at: tuple[int, ...]) -> np.ndarray:
                numbers = tuple(n + start for n, (start, _) in zip(at, lead, strict=True))
                return source.read(numbers, inner)

            parts[key] = encode_stacked(one, tuple(b - a for a, b in lead), name)
        return parts[key]

    whole = tuple(slice(0, size) for size in shape)
    found: Params = {}
    for leaf, struct in stored(shape, name).items():
        where = shardings.get(leaf) if isinstance(shardings, dict) else shardings
        if where is None:
            found[leaf] = jnp.asarray(columns(whole)[leaf])
            continue

        def part(index, leaf=leaf):
            rows = (*[slice(None)] * (len(shape) - 2), index[-2], slice(None))
            return columns((*index[:-2], slice(None), index[-1]))[leaf][rows]

        found[leaf] = jax.make_array_from_callback(struct.shape, where, part)
    for numbers in source.numbers():
        source.done(numbers)
    return found


def load_hf(
    folder: str | os.PathLike,
    *,
    kind: str | None = None,
    dtype: str | None = None,
    shardings: Params | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """Reads a Hugging Face model folder (config.json + safetensors, one file or indexed shards).

    Args:
        kind: "lm" or "reward" if only that will do; None takes what the folder is.
        dtype: of the parameters; None keeps what is stored.
        shardings: tree of the parameters' shardings (parallel.rules), or one sharding for all;
            each process then reads only the byte ranges of its own shards.
        quantize: one of quantization.FORMATS for the kernels of layers, from the stored values
            whatever `dtype`; `shardings` then has the leaves that those are stored in.

    Raises:
        ModelError: the folder is missing, damaged, of another kind, of an unsupported family, or
            its tensors are not exactly those its config.json implies, by name.
    """
    folder = Path(folder)
    hf = read_hf_config(folder)
    where = folder / "config.json"
    config = config_from_hf(hf, str(where))
    files = TensorFiles(folder)
    try:
        found = _kind_of(hf, files, where)
        if kind not in (None, *KINDS):
            raise ModelError(f"kind = {kind!r}: one of {', '.join(KINDS)}")
        if kind is not None and kind != found:
            raise ModelError(f"{folder} is {KIND_NAMES[found]}; {KIND_NAMES[kind]} is needed here")
        names = _names_in_file(files, config)
        outputs = 1
        if found == "reward" and "score.weight" in names:
            outputs = files.shapes["score.weight"][0] if files.shapes["score.weight"] else 1
            labels = hf.get("num_labels") or len(hf.get("id2label") or {}) or outputs
            if labels != outputs:
                raise ModelError(f"{where} names {labels} labels, score.weight has {outputs} rows")
        wanted = _wanted(config, found, max(outputs, 1))
        _drop_tied_copy(files, names, config, found, folder)
        layout = list(_layout(config, wanted))
        _check(files, names, tensors_of(config, found, max(outputs, 1)), folder)

        sources: dict[str, Source] = {}
        quantized: dict[str, Source] = {}
        where_to: dict[str, Any] = {}
        for tensor, leaves in layout:
            for part, (path, leaf) in enumerate(leaves):
                first = names[_name(tensor, _numbers(tensor, leaf)[0])]
                as_dtype = np.dtype(jnp.dtype(dtype)) if dtype else files.dtypes[first]
                source = _source(files, names, tensor, part, leaves, config.head_size, as_dtype)
                if quantize and can_quantize(tuple(path.split("/")), leaf.shape):
                    quantized[path] = source
                    continue
                sources[path] = source
                split = isinstance(shardings, dict)
                where_to[path] = _get(shardings, path) if split else shardings
        params: Params = {}
        for path, array in make_arrays(sources, where_to).items():
            put(params, path, array)
        for path, source in quantized.items():
            assert quantize is not None
            home = path.rsplit("/", 1)[0]
            where_home = _get(shardings, home) if isinstance(shardings, dict) else shardings
            for own, value in _place_quantized(source, quantize, where_home).items():
                put(params, f"{home}/{own}", value)
    finally:
        files.close()
    return LoadedModel(params, config, found, hf, read_generation_config(folder))


def _drop_tied_copy(
    files: TensorFiles, names: dict[str, str], config: ModelConfig, kind: str, folder
):
    """A tied model may carry its head twice; the copy must be one."""
    tensors = FAMILIES[config.family].tensors
    head = next(t.hf for t in tensors if t.leaves == ("lm_head/kernel",))
    if kind != "lm" or not config.tie_embeddings or head not in names:
        return
    embedding = next(
        names[t.hf] for t in tensors if t.leaves == ("embed/embedding",) and t.hf in names
    )
    copy = names[head]
    shape = files.shapes[embedding]
    parts = [(slice(row, min(row + 4096, shape[0])),) for row in range(0, shape[0], 4096)]
    same = shape == files.shapes[copy] and all(
        np.array_equal(files.read(embedding, part), files.read(copy, part)) for part in parts
    )
    if not same:
        raise ModelError(
            f"{folder}: config.json ties the head to the embedding, but {copy} differs "
            f"from {embedding}: set tie_word_embeddings to false, or remove {copy}"
        )
    del names[head]


def fetch(leaf) -> np.ndarray:
    """An array on the host; every process must call this for arrays spread over processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written; its values are asked for when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _outgoing(params: Params, config: ModelConfig, dtype: str | None) -> Iterator[OutgoingTensor]:
    """The tensors of the file in the family's order; a leaf is fetched once for all its layers."""
    for tensor, leaves in _layout(config, params):
        as_dtype = np.dtype(jnp.dtype(dtype)) if dtype else np.dtype(leaves[0][1].dtype)
        stored = list(_stored(tensor, leaves).items())
        numbers = _numbers(tensor, leaves[0][1])
        held: list[np.ndarray] = []
        last = numbers[-1]

        def values(at, *, tensor=tensor, leaves=leaves, dt=as_dtype, held=held, last=last):
            if not held:
                held.extend(fetch(leaf) for _, leaf in leaves)
            parts = [leaf[at] for leaf in held]
            if at == last:
                held.clear()
            whole = _joined(parts, config.head_size if tensor.by_head else None)
            whole = whole.T if tensor.transpose else whole
            if whole.dtype == dt and whole.flags.c_contiguous:
                return whole
            out = np.empty(whole.shape, dt)
            copy_into(out, whole)
            return out

        for at, (name, shape) in zip(numbers, stored, strict=True):
            yield OutgoingTensor(name, shape, as_dtype, partial(values, at))


def _joined(parts: list[np.ndarray], head: int | None) -> np.ndarray:
    """Side by side along the last axis: one after the other, or all parts of each head in turn."""
    if len(parts) == 1:
        return parts[0]
    if head is None:
        return np.concatenate(parts, axis=-1)
    by_head = [part.reshape(*part.shape[:-1], -1, 1, head) for part in parts]
    whole = np.concatenate(by_head, axis=-2)
    return whole.reshape(*whole.shape[:-3], -1)


def write_safetensors(
    path: Path,
    tensors: list[OutgoingTensor],
    writer: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One file, tensor after tensor: the host holds one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for out in tensors:
        header[out.name] = {
            "dtype": _DTYPE_NAMES[out.dtype],
            "shape": list(out.shape),
            "data_offsets": [start, start + out.size],
        }
        start += out.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if not writer:  # takes part in gathering what is spread over processes
        for out in tensors:
            out.values()
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for out in tensors:
                values = out.values()
                if not_finite(values):
                    raise ModelError(f"{out.name} holds values that are NaN or infinite: not saved")
                file.write(values.view(np.uint8).reshape(-1).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _pad_of_reward(pad: int | None, config: ModelConfig, hf: Mapping[str, Any]) -> int:
    pad = hf.get("pad_token_id") if pad is None else pad
    eos = hf.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    why = (
        "transformers reads the score at the last token that is not pad_token_id, so it must be an "
        "id that never occurs as a real token"
    )
    if pad is None:
        raise ModelError(f"a reward model needs a pad_token_id: {why}")
    if pad in ends:
        raise ModelError(f"pad_token_id = {pad} is the end-of-text token: {why}")
    if not 0 <= pad < config.vocab_size:
        raise ModelError(
            f"pad_token_id = {pad} is outside the vocabulary of {config.vocab_size}: {why}"
        )
    return pad


def save_hf(
    folder: str | os.PathLike,
    params: Params,
    config: ModelConfig,
    *,
    kind: str = "lm",
    pad_token_id: int | None = None,
    hf_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    model_card: str | None = None,
) -> None:
    """Writes config.json, safetensors (with an index beyond one shard), generation_config.json.

    Leaves of other heads (`value`, or `score` of a language model) are not written. The config is
    written last: a folder without it is an unfinished export. Over several processes, all call
    this and the first writes.

    Args:
        kind: "lm", or "reward" for a sequence-classification folder.
        pad_token_id: for reward models an id that never occurs as a real token; transformers takes
            the score at the last other one. Default: that of `hf_config`.
        hf_config: the config.json the model came with; its token ids and names are carried over.
        dtype: what to store; None keeps each parameter's own, which makes reading it lossless.
        model_card: text of README.md, if given.

    Raises:
        ModelError: the tree lacks or has leaves that the config does not, a value is not finite,
            no usable pad_token_id, or the disk refuses.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise ModelError(f"kind = {kind!r}: one of {', '.join(KINDS)}")
    if config.family not in FAMILIES:
        raise ModelError(f"family = {config.family!r} is not supported; supported: {supported()}")
    carried = {
        key: value
        for key, value in (hf_config or {}).items()
        if key in HARMLESS | FAMILIES[config.family].harmless
        and key not in ("architectures", "id2label", "label2id", "num_labels", "torch_dtype")
    }
    written = carried | config_to_hf(config, kind)
    pad = written.get("pad_token_id") if pad_token_id is None else pad_token_id
    outputs = 1
    if kind == "reward":
        pad = _pad_of_reward(pad_token_id, config, written)
        if _get(params, "score/kernel") is None:
            raise ModelError("these parameters have no score head: not a reward model")
        outputs = params["score"]["kernel"].shape[-1]
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(outputs)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(outputs)}
    written["pad_token_id"] = pad

    wanted = _wanted(config, kind, outputs)
    kept = {key: value for key, value in params.items() if key in wanted}
    _same_tree(kept, params, wanted)
    tensors = list(_outgoing(kept, config, dtype))
    stored = next(name for name, dt in _NAMES.items() if dt == tensors[0].dtype)
    written |= {"dtype": stored, "torch_dtype": stored}
    writer = jax.process_index() == 0
    try:
        write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes, writer=writer)
        if writer:
            if kind == "lm":
                write_json(folder / GENERATION, generation_config(written))
            if model_card is not None:
                write_text(folder / "README.md", model_card)
            write_json(folder / "config.json", written)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}") from error


_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}


def _same_tree(kept: Params, params: Params, wanted: Params) -> None:
    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    have, want = shapes(kept), shapes(wanted)
    others = set(params) - set(wanted) - {"lm_head", "score", "value"}
    problems = [
        f"missing: {path} {list(shape)}" for path, shape in want.items() if path not in have
    ]
    problems += [f"not part of this model: {path}" for path in (*(set(have) - set(want)), *others)]
    problems += [
        f"wrong shape: {path} is {list(have[path])}, expected {list(want[path])}"
        for path in want
        if path in have and have[path] != want[path]
    ]
    if problems:
        raise ModelError(f"the parameters do not fit the config:{listed(problems)}")


def tensors_of(config: ModelConfig, kind: str, num_outputs: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model's folder has."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor, leaves in _layout(config, _wanted(config, kind, num_outputs)):
        found |= _stored(tensor, leaves)
    return found


def write_tensors(
    folder: Path,
    tensors: list[OutgoingTensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
    writer: bool = True,
) -> None:
    """Safetensors into a folder, in place of those there: one file, or shards and their index.

    Over several processes all call this, and the one with `writer` writes.
    """
    limit = max_shard_bytes
    groups: list[list[OutgoingTensor]] = [[]]
    for out in tensors:
        if groups[-1] and sum(o.size for o in groups[-1]) + out.size > limit:
            groups.append([])
        groups[-1].append(out)
    count = len(groups)
    names = [SINGLE] if count == 1 else []
    names += [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count) if count > 1]
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("model*.safetensors"), folder / INDEX, folder / "config.json"):
            stale.unlink(missing_ok=True)
    for name, group in zip(names, groups, strict=True):
        write_safetensors(folder / name, group, writer)
    if writer and count > 1:
        weight_map = {
            out.name: name for name, group in zip(names, groups, strict=True) for out in group
        }
        total = {"total_size": sum(out.size for out in tensors)}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
