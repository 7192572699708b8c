# SPDX-License-Identifier: Apache-2.0
"""PEFT's folders: adapter_config.json + adapter_model.safetensors, out and in.

Names and shapes of tensors are PEFT's for transformers' modules, which follow from the family's
map of tensors (modules.py). A field of adapter_config.json that changes the maths and that nothing
reads is refused, and so is any tensor too many or too few. Pickles are never opened.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters import peft_beside, stacked
from jaxrlhf.models.adapters.modules import Module, expert_modules, modules, projections
from jaxrlhf.models.adapters.spec import Adapter, Placed
from jaxrlhf.models.adapters.trees import at, join, put
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.weights import (
    GENERATION,
    OutgoingTensor,
    TensorFiles,
    fetch,
    generation_config,
    listed,
    read_json,
    write_json,
    write_safetensors,
    write_text,
)

Params = dict[str, Any]
CONFIG, SINGLE = "adapter_config.json", "adapter_model.safetensors"
INDEX = SINGLE + ".index.json"
PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."  # of modules beside virtual tokens: PEFT wraps nothing there
TASKS = {"CAUSAL_LM": "lm", "SEQ_CLS": "reward"}
# In the header of our files: which weights the adapter was trained on (TensorFiles.digest).
BASE_CONTENT = "base_content"
# There too: how that base was quantized while it trained, if it was.
BASE_QUANTIZED = "base_quantized"

READ = {
    "LORA": frozenset(
        """
        peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules
        exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern use_rslora
        use_dora fan_in_fan_out bias modules_to_save init_lora_weights target_parameters
        """.split()  # noqa: SIM905
    ),
    "IA3": frozenset(
        """
        peft_type task_type base_model_name_or_path target_modules exclude_modules
        feedforward_modules fan_in_fan_out modules_to_save
        """.split()  # noqa: SIM905
    ),
} | {
    method: fields | {"peft_type", "task_type", "base_model_name_or_path", "modules_to_save"}
    for method, fields in peft_beside.FIELDS.items()
}
# Fields that say how it was made or is handled, not what it computes.
HARMLESS = frozenset(
    """
    auto_mapping peft_version inference_mode runtime_config megatron_core init_ia3_weights
    qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905
)
# Ways of starting that take something out of the base, so that the base alone is another model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder.

    Attributes:
        adapter: which modules it is of.
        leaves: its tree, with the modules that were trained whole.
        kind: of the model it makes of its base: "lm" or "reward".
        base_content: digest of the weights it was trained on, if the file says.
        base_quantized: how they were quantized while it trained, if they were.
    """

    adapter: Adapter
    leaves: Params
    kind: str
    base_content: str | None
    base_quantized: str | None = None


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's rather than a model's."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked for what we cannot compute.

    Raises:
        ModelError: missing, damaged, of an unsupported method, or with a field that is not read.
    """
    where = folder / CONFIG
    peft = read_json(where)
    method = peft.get("peft_type")
    if method not in READ:
        raise ModelError(f"{where}: peft_type = {method!r}; readable are {', '.join(READ)}")
    problems = []
    if peft.get("task_type") not in (*TASKS, None):
        problems.append(f"task_type = {peft['task_type']!r}: one of {', '.join(TASKS)}")
    if peft.get("bias", "none") != "none":
        problems.append(f"bias = {peft['bias']!r}: trained biases are not supported")
    start = peft.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights = {start!r} changed the base: convert it with PEFT "
            "(path_initial_model_for_weight_conversion) first"
        )
    if method in peft_beside.KINDS:
        problems += peft_beside.config_problems(peft)
    targets = peft.get("target_modules") or peft.get("target_parameters")
    if not targets and method in ("LORA", "IA3", "BOTTLENECK"):
        problems.append("target_modules is missing or empty")
    if method == "LORA":
        for name, kind in (("r", int), ("lora_alpha", int | float)):
            value = peft.get(name, 8)
            if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
                problems.append(f"{name} = {value!r}: a positive number")
    problems += [
        f"{name} = {value!r} is not read: remove it if it does not change the maths"
        for name, value in peft.items()
        if name not in READ[method] | HARMLESS and value not in (None, False, "", [], {})
    ]
    if problems:
        raise ModelError(f"{where} cannot be used:{listed(problems)}")
    return peft


def _targeted(peft: Mapping[str, Any], name: str, named: Any) -> bool:
    """PEFT's rule: a text is a regular expression, a list holds names or their ends."""
    if isinstance(named, str):
        return re.fullmatch(named, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in named)


def _is_target(peft: Mapping[str, Any], name: str, layer: int) -> bool:
    if peft.get("exclude_modules") and _targeted(peft, name, peft["exclude_modules"]):
        return False
    targets = peft.get("target_modules") or []
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or _targeted(peft, name, targets)
    if not _targeted(peft, name, targets):
        return False
    only = peft.get("layers_to_transform")
    return only is None or layer in ([only] if isinstance(only, int) else only)


def _rank_and_alpha(peft: Mapping[str, Any], name: str) -> tuple[int, float]:
    ranks, alphas = peft.get("rank_pattern") or {}, peft.get("alpha_pattern") or {}
    for key in (*ranks, *alphas):
        if re.match(rf"(.*\.)?({key})$", name):
            break
    else:
        key = None
    return ranks.get(key, peft.get("r", 8)), float(alphas.get(key, peft.get("lora_alpha", 8)))


def adapter_of(peft: Mapping[str, Any], config: ModelConfig, kind: str, where: str) -> Adapter:
    """The adapter that an adapter_config.json describes, on an architecture.

    Raises:
        ModelError: it is of modules that the model does not have.
    """
    layers = range(config.num_layers)
    heads = ("score",) if kind == "reward" else ()
    names = (*(peft.get("modules_to_save") or ()), *heads)
    other = ("lm_head",) if heads else ("score",)
    known = [m for m in modules(config) if m.parts != other]
    saved = tuple(m for m in known if any(m.name(0).endswith(name) for name in names))
    if own := peft_beside.KINDS.get(peft["peft_type"]):
        shapes = peft_beside.shapes_of(peft, config, where)
        return Adapter(cast(Any, own), (), saved, beside=shapes)
    placed = []
    for module in (*projections(config), *expert_modules(config)):
        if module.experts:
            named = peft.get("target_parameters") or []
            there = [_targeted(peft, module.name(i), named) for i in layers]
        else:
            there = [_is_target(peft, module.name(i), i) and module not in saved for i in layers]
        if not any(there):
            continue
        if peft["peft_type"] == "IA3":
            if not all(there):
                raise ModelError(f"{where}: (IA)3 on some layers of {module.short} only")
            forward = peft.get("feedforward_modules") or ()
            reads = _targeted(peft, module.name(0), forward)
            placed.append(Placed(module, (0,) * len(layers), (), reads))
            continue
        found = [_rank_and_alpha(peft, module.name(i)) for i in layers]
        ranks = tuple(rank if on else 0 for (rank, _), on in zip(found, there, strict=True))
        alphas = tuple(alpha if on else 0.0 for (_, alpha), on in zip(found, there, strict=True))
        placed.append(Placed(module, ranks, alphas))
    if not placed:
        choices = ", ".join(sorted({m.short for m in projections(config)}))
        raise ModelError(
            f"{where}: target_modules = {peft.get('target_modules')} names nothing in a "
            f"{config.family} model, which has {choices}: is this another model's adapter?"
        )
    if peft["peft_type"] == "IA3":
        return Adapter("ia3", tuple(placed), saved)
    return Adapter(
        "dora" if peft.get("use_dora") else "lora",
        tuple(placed),
        saved,
        float(peft.get("lora_dropout") or 0.0),
        bool(peft.get("use_rslora")),
    )


# ------------------------------------------------------------------------------ names and shapes


def _own(adapter: Adapter, placed: Placed, layer: int) -> Iterator[tuple[str, str, tuple]]:
    """(name there, our leaf, shape) of a module's own tensors in one layer."""
    module = placed.module
    if module.experts:
        yield from _own_of_experts(adapter, placed, layer)
        return
    name = PREFIX + module.name(layer)
    inputs, out = module.inputs, sum(module.outputs)
    if adapter.kind == "ia3":
        if placed.scales_input:
            yield f"{name}.ia3_l", "ia3_in", (1, inputs)
        else:
            yield f"{name}.ia3_l", "ia3_out", (out, 1)
    elif rank := placed.ranks[layer]:
        yield f"{name}.lora_A.weight", "lora_a", (rank, inputs)
        yield f"{name}.lora_B.weight", "lora_b", (out, rank)
        if adapter.kind == "dora":
            yield f"{name}.lora_magnitude_vector", "dora_m", (out,)


def _own_of_experts(
    adapter: Adapter, placed: Placed, layer: int
) -> Iterator[tuple[str, str, tuple]]:
    module, rank = placed.module, placed.ranks[layer]
    others = [one.module for one in adapter.placed if one.ranks and one.ranks[layer]]
    name = PREFIX + stacked.wrapper(module, others, layer)
    if rank:
        yield f"{name}.lora_A.weight", "lora_a", (module.experts * rank, module.inputs)
        yield f"{name}.lora_B.weight", "lora_b", (sum(module.outputs), rank * module.experts)


def _prefix(kind: str) -> str:
    return PROMPT_PREFIX if kind in ("soft_prompt", "prefix") else PREFIX


def _saved_tensors(adapter: Adapter, layers: int) -> Iterator[tuple[str, Any, Any, bool, Module]]:
    """(name there, layer or None, paths of our leaves, transposed, its module) of modules trained
    whole."""
    prefix = _prefix(adapter.kind)
    for module in adapter.saved:
        for suffix, leaves, transpose in module.leaves:
            for layer in range(layers) if module.layered else (None,):
                name = f"{prefix}{module.hf.format(layer=layer)}.{suffix}"
                yield name, layer, leaves, transpose, module


# ----------------------------------------------------------------------------------------- reading


def load_adapter(
    folder: str | os.PathLike,
    config: ModelConfig,
    base: Params,
    *,
    kind: str | None = None,
    dtype: str | None = None,
) -> LoadedAdapter:
    """Reads a PEFT folder for a base of this architecture.

    Args:
        base: the base's tree (shapes are enough): what trained whole has its shapes.
        kind: "lm" or "reward" if only that will do.
        dtype: of the leaves; None keeps what is stored.

    Raises:
        ModelError: the folder is damaged, or of another model, method or kind; by name.
    """
    folder = Path(folder)
    peft = read_adapter_config(folder)
    files = TensorFiles(folder, SINGLE, INDEX)
    try:
        score = f"{_prefix(peft_beside.KINDS.get(peft['peft_type'], ''))}score.weight"
        found = TASKS.get(peft.get("task_type") or "", "reward" if score in files.paths else "lm")
        if kind is not None and kind != found:
            names = {"lm": "a language model", "reward": "a reward model"}
            raise ModelError(
                f"{folder} makes {names[found]} of its base; {names[kind]} is needed here"
            )
        adapter = adapter_of(peft, config, found, str(folder / CONFIG))
        conv = any(placed.module.conv1d for placed in adapter.placed)
        if bool(peft.get("fan_in_fan_out")) and not conv:
            raise ModelError(
                f"{folder / CONFIG}: fan_in_fan_out is true, but a {config.family} model stores "
                "its matrices [out, in]: is this another model's adapter?"
            )
        outputs = files.shapes.get(score, (1,))[0]
        _check(files, adapter, config, base, outputs, folder)
        leaves = _read(files, adapter, config, dtype)
        metadata = files.metadata()
    finally:
        files.close()
    content, quantized = metadata.get(BASE_CONTENT), metadata.get(BASE_QUANTIZED)
    return LoadedAdapter(adapter, leaves, found, content, quantized)


def recorded(folder: Path) -> str | None:
    """How the base of an adapter's folder was quantized in training, as its file's header says."""
    files = TensorFiles(folder, SINGLE, INDEX)
    try:
        return files.metadata().get(BASE_QUANTIZED)
    finally:
        files.close()


def _check(
    files: TensorFiles,
    adapter: Adapter,
    config: ModelConfig,
    base: Params,
    outputs: int,
    folder: Path,
) -> None:
    """Exactly the tensors that the config implies, in the shapes that the base implies."""
    expected: dict[str, tuple] = {
        tensor.name: tensor.shape for tensor in peft_beside.stored_tensors(adapter.beside)
    }
    for placed in adapter.placed:
        for layer in range(config.num_layers):
            expected |= {name: shape for name, _, shape in _own(adapter, placed, layer)}
    for name, layer, paths, transpose, _ in _saved_tensors(adapter, config.num_layers):
        shapes = [
            (config.hidden_size, outputs) if path == "score/kernel" else at(base, path).shape
            for path in paths
        ]
        shapes = [shape if layer is None else shape[1:] for shape in shapes]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        expected[name] = shape[::-1] if transpose else shape
    have = files.shapes
    problems = [f"missing: {n} {list(s)}" for n, s in expected.items() if n not in have]
    problems += [
        f"wrong shape: {n} is {list(have[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in have and have[n] != s
    ]
    problems += [
        f"not part of this adapter: {n} {list(s)}" for n, s in have.items() if n not in expected
    ]
    if problems:
        raise ModelError(
            f"the weights of {folder} do not fit its {CONFIG} on this base "
            f"({config.family}, width {config.hidden_size}, {config.num_layers} layers):"
            f"{listed(problems)}"
        )


def _read(files: TensorFiles, adapter: Adapter, config: ModelConfig, dtype: str | None) -> Params:
    tree: Params = {}
    layers = config.num_layers

    def whole(name: str) -> np.ndarray:
        return np.array(files.read(name))

    def keep(path: str, value: np.ndarray) -> None:
        put(tree, path, jnp.asarray(value if dtype is None else value.astype(dtype)))

    for tensor in peft_beside.stored_tensors(adapter.beside):
        for path, leaf in zip(tensor.paths, tensor.leaves(whole(tensor.name)), strict=True):
            keep(path, leaf)
    for placed in adapter.placed:
        module, rank = placed.module, max(placed.ranks)
        assert module.inputs is not None
        shapes = {
            "lora_a": (module.inputs, rank),
            "lora_b": (rank, sum(module.outputs)),
            "dora_m": (sum(module.outputs),),
            "ia3_in": (module.inputs,),
            "ia3_out": (sum(module.outputs),),
        }
        lead = (layers, module.experts) if module.experts else (layers,)
        found_layers: dict[str, np.ndarray] = {}
        for layer in range(layers):
            for name, leaf, _ in _own(adapter, placed, layer):
                value = whole(name)
                # [r, in] and [out, r] to ours; vectors lose the axis of length 1.
                if module.experts:
                    value = stacked.loaded(value, leaf, module.experts)
                else:
                    value = value.T if leaf.startswith("lora") else value.reshape(-1)
                if leaf not in found_layers:
                    found_layers[leaf] = np.zeros((*lead, *shapes[leaf]), value.dtype)
                found_layers[leaf][(layer, *map(slice, value.shape))] = value
        for leaf, value in found_layers.items():
            if leaf in ("lora_a", "ia3_in"):
                keep(f"{module.parts[0]}/{leaf}", value)
            else:
                pieces = module.divide(value, config.head_size)
                for part, piece in zip(module.parts, pieces, strict=True):
                    keep(f"{part}/{leaf}", piece)
    gathered: dict[str, list[np.ndarray]] = {}
    for name, layer, paths, transpose, module in _saved_tensors(adapter, layers):
        value = whole(name)
        pieces = module.divide(value.T if transpose else value, config.head_size)
        for path, piece in zip(paths, pieces, strict=True):
            gathered.setdefault(path, []).append(piece)
            if layer is None or layer == layers - 1:
                each = gathered[path]
                keep(path, each[0] if layer is None else np.stack(each))
    return join(tree, adapter.constants())


# ----------------------------------------------------------------------------------------- writing


def save_adapter(
    folder: str | os.PathLike,
    params: Params,
    adapter: Adapter,
    config: ModelConfig,
    *,
    kind: str,
    base: str,
    base_content: str | None = None,
    base_quantized: str | None = None,
    hf_config: Mapping[str, Any] | None = None,
    model_card: str | None = None,
) -> None:
    """Writes a PEFT folder: the adapter of a tree, and the modules trained whole with it.

    The config is written last. Over several processes, all call this and the first writes.

    Args:
        params: the whole tree, or its trained half.
        kind: "lm" or "reward".
        base: folder or hub name of the base, for adapter_config.json.
        base_content: digest of the base's weights, kept in the header of the tensors' file.
        base_quantized: how the base was quantized in training, kept there too.
        hf_config: config.json of the language model that results. Its token ids are written beside
            the adapter, where PEFT leaves them alone: its texts may end where its base's do not.

    Raises:
        ModelError: a value is not finite, or the disk refuses.
    """
    folder = Path(folder)
    writer = jax.process_index() == 0
    said = {BASE_CONTENT: base_content, BASE_QUANTIZED: base_quantized}
    metadata = {name: text for name, text in said.items() if text}
    try:
        if writer:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).unlink(missing_ok=True)
        write_safetensors(
            folder / SINGLE, list(_outgoing(params, adapter, config)), writer, metadata
        )
        if writer:
            if model_card is not None:
                write_text(folder / "README.md", model_card)
            if kind == "lm" and hf_config is not None:
                write_json(folder / GENERATION, generation_config(hf_config))
            write_json(folder / CONFIG, adapter_config(adapter, config, kind=kind, base=base))
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}") from error


def _outgoing(params: Params, adapter: Adapter, config: ModelConfig) -> Iterator[OutgoingTensor]:
    def tensor(name, shape, leaves, layer, arrange, module: Module) -> OutgoingTensor:
        def values() -> np.ndarray:
            parts = [fetch(leaf) if layer is None else fetch(leaf[layer]) for leaf in leaves]
            return np.ascontiguousarray(arrange(module.gather(parts, config.head_size)))

        return OutgoingTensor(name, tuple(shape), np.dtype(leaves[0].dtype), values)

    def own(value: np.ndarray, *, shape: tuple, leaf: str, experts: int) -> np.ndarray:
        if experts:
            return stacked.stored(value, leaf, shape[0 if leaf == "lora_a" else 1] // experts)
        if not leaf.startswith("lora"):
            return value.reshape(shape)
        return value.T[tuple(map(slice, shape))]  # without what fills up smaller ranks

    for one in peft_beside.stored_tensors(adapter.beside):
        leaves = [at(params, path) for path in one.paths]
        values = partial(lambda one, leaves: one.stored([fetch(x) for x in leaves]), one, leaves)
        yield OutgoingTensor(one.name, one.shape, np.dtype(leaves[0].dtype), values)
    for placed in adapter.placed:
        parts = placed.module.parts
        for layer in range(config.num_layers):
            for name, leaf, shape in _own(adapter, placed, layer):
                holders = parts[:1] if leaf in ("lora_a", "ia3_in") else parts
                leaves = [at(params, part)[leaf] for part in holders]
                arrange = partial(own, shape=shape, leaf=leaf, experts=placed.module.experts)
                yield tensor(name, shape, leaves, layer, arrange, placed.module)
    for name, layer, paths, transpose, module in _saved_tensors(adapter, config.num_layers):
        leaves = [at(params, path) for path in paths]
        shapes = [leaf.shape if layer is None else leaf.shape[1:] for leaf in leaves]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        arrange = np.transpose if transpose else np.asarray
        yield tensor(name, shape[::-1] if transpose else shape, leaves, layer, arrange, module)


def _ending(module: Module, others: list[str], *, loose: bool) -> str:
    """The shortest end of a module's name that means no other; `loose` as PEFT reads
    modules_to_save, where the end of a word will do."""
    parts = module.hf.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if "{" not in end and not any(
            name.endswith(end if loose else f".{end}") or name == end for name in others
        ):
            return end
    return module.hf


def adapter_config(
    adapter: Adapter, config: ModelConfig, *, kind: str, base: str
) -> dict[str, Any]:
    """What adapter_config.json says of an adapter; the inverse of `adapter_of`."""
    everything = modules(config)

    def end(module: Module, *, loose: bool = False) -> str:
        if module.experts:
            return f"experts.{module.short}"
        return _ending(module, [m.name(0) for m in everything if m != module], loose=loose)

    written: dict[str, Any] = {
        "task_type": next(task for task, name in TASKS.items() if name == kind),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": [end(module, loose=True) for module in adapter.saved] or None,
    }
    if adapter.beside:
        return written | peft_beside.config_of(adapter.kind, adapter.beside, config)
    written["fan_in_fan_out"] = any(placed.module.conv1d for placed in adapter.placed)
    if adapter.kind == "ia3":
        return written | {
            "peft_type": "IA3",
            "target_modules": [end(placed.module) for placed in adapter.placed],
            "feedforward_modules": [end(p.module) for p in adapter.placed if p.scales_input],
        }
    counts: Counter[tuple[int, float]] = Counter()
    for placed in adapter.placed:
        counts.update((r, a) for r, a in zip(placed.ranks, placed.alphas, strict=True) if r)
    usual = counts.most_common(1)[0][0]
    targets: list[str] = []
    parameters: list[str] = []
    patterns: dict[str, tuple[int, float]] = {}
    for placed in adapter.placed:
        each = list(zip(placed.ranks, placed.alphas, strict=True))
        module = placed.module
        there = [layer for layer, (rank, _) in enumerate(each) if rank]
        (parameters if module.experts else targets).extend(
            [end(module)] if len(there) == len(each) else [module.name(layer) for layer in there]
        )
        if len(set(each)) == 1:
            patterns[end(module)] = each[0]
        else:
            patterns |= {module.name(layer): each[layer] for layer in there}
    patterns = {name: pair for name, pair in patterns.items() if pair != usual}
    return written | {
        "peft_type": "LORA",
        "r": usual[0],
        "lora_alpha": _whole(usual[1]),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": targets,
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {name: rank for name, (rank, _) in patterns.items()},
        "alpha_pattern": {name: _whole(alpha) for name, (_, alpha) in patterns.items()},
    }


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
