# SPDX-License-Identifier: Apache-2.0
"""MODEL in a configuration to parameters on the mesh: a run, a folder, a hub name, or fresh ones.

A finished run is read from its `export/` folder, an unfinished one from its newest good checkpoint.
Nothing touches the network unless a hub name is given.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxrlhf.config.model import Architecture, FreshModelSection, ModelSection
from jaxrlhf.data.tokenizer import (
    add_control_tokens,
    check_vocabulary,
    is_path,
    load_tokenizer,
)
from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters.only import Only
from jaxrlhf.models.adapters.peft import (
    adapter_of,
    is_adapter,
    load_adapter,
    read_adapter_config,
    recorded,
)
from jaxrlhf.models.adapters.spec import Adapter, with_adapter_axes
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.quantization import cast, is_projection, is_quantized, quantize
from jaxrlhf.models.resize import enlarge_vocabulary
from jaxrlhf.models.tensor_files import weights_digest
from jaxrlhf.models.transformer import abstract_params, init_params, logical_axes
from jaxrlhf.models.weights import (
    KIND_NAMES,
    load_hf,
    read_generation_config,
    read_hf_config,
)
from jaxrlhf.parallel.rules import shardings
from jaxrlhf.stages.lineage import check_weights
from jaxrlhf.stages.rundir import is_finished
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.types import Params

Kind = Literal["lm", "reward"]
UNROLLED_LAYERS = 8  # up to this depth unrolling is faster and compiles quickly enough


@dataclasses.dataclass(frozen=True)
class Adapted:
    """How a model stands on a base: which adapter, and the base's own tree (the same arrays).

    `base` is what the user wrote, `home` the HF folder of its weights, if they are from one;
    `tokenizer` and `hf_config` are the base's own; `fresh` where the adapter is new and changes
    nothing yet; `quantized` how the base is, or was, stored where the adapter trains
    (model.quantize).
    """

    adapter: Adapter
    base: str
    home: Path | None
    params: Params
    tokenizer: Any
    hf_config: dict[str, Any]
    fresh: bool = False
    quantized: str | None = None

    def named(self) -> str:
        """How adapter_config.json names the base: a folder here, or a hub name."""
        if not is_path(self.base):
            return self.base
        return str((self.home or Path(self.base).expanduser()).absolute())

    def content(self) -> str | None:
        """The digest of the base's weights, where they lie in a folder."""
        return None if self.home is None else weights_digest(self.home)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to use: parameters on the mesh and all that is needed to run and save it.

    `source` is what the user wrote. `hf_config` is config.json as it was, but for `eos_token_id`:
    that has every token that ends a text for this model, those too that only
    generation_config.json knows.
    """

    params: Params
    config: ModelConfig
    runtime: Runtime
    kind: Kind
    tokenizer: Any
    source: str
    hf_config: dict[str, Any]
    home: Path | None = None  # the HF folder the weights are from, if they are from one
    adapted: Adapted | None = None
    only: Only | None = None  # which of its own parameters train; None = all

    def axes(self) -> Params:
        """The logical axis names of every parameter."""
        return axes_of(self.params, self.config)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text for this model: its own, else the tokenizer's EOS."""
        ends = self.hf_config.get("eos_token_id")
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)

    def without_params(self) -> "Model":
        """All but the arrays: for what outlives them and reads no more than the settings."""
        return dataclasses.replace(self, params={})


def stand_on(
    base: Model, adapter: Adapter, *, fresh: bool = False, quantized: str | None = None
) -> Adapted:
    """How an adapter stands on an open base."""
    return Adapted(
        adapter,
        base.source,
        base.home,
        base.params,
        base.tokenizer,
        base.hf_config,
        fresh=fresh,
        quantized=quantized,
    )


def base_of(model: Model) -> Model:
    """The base that a model with an adapter stands on (the same arrays), else the model itself."""
    under = model.adapted
    if under is None:
        return model
    return dataclasses.replace(
        model,
        params=under.params,
        tokenizer=under.tokenizer,
        source=under.base,
        hf_config=under.hf_config,
        home=under.home,
        adapted=None,
    )


def axes_of(params: Params, config: ModelConfig) -> Params:
    """Logical axis names of a model's parameters, whichever heads it has."""
    heads = ("lm", *(name for name in ("score", "value") if name in params))
    outputs = params["score"]["kernel"].shape[-1] if "score" in params else 1
    named = logical_axes(config, heads=heads, num_outputs=outputs)
    return with_adapter_axes({key: v for key, v in named.items() if key in params}, params)


def make_runtime(section: ModelSection, config: ModelConfig, mesh: Mesh) -> Runtime:
    """How a model is computed on this mesh, as the configuration has it."""
    unroll: int | bool
    if section.unroll == "auto":
        unroll = True if config.num_layers <= UNROLLED_LAYERS else 1
    else:
        unroll = True if section.unroll == "all" else section.unroll
    # About a million logits a row at a time: small vocabularies go in one chunk.
    chunk = section.logprob_chunk or max(16, min(512, 2**20 // config.vocab_size))
    return Runtime(
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        unroll=unroll,
        fuse=mesh.shape["tensor"] == 1,
        attention_block=section.attention_block,
        logprob_chunk=chunk,
    )


def new_config(shape: Architecture, vocab_size: int) -> ModelConfig:
    """The architecture of a fresh model; sizes left out follow from the others."""
    gpt2 = shape.family == "gpt2"
    # 8/3 of the width keeps a gated MLP as large as a plain one of 4 times the width.
    wide = 4 * shape.hidden_size if gpt2 else -(-8 * shape.hidden_size // 24) * 8
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), gpt2)
    return ModelConfig(
        family=shape.family,
        vocab_size=shape.vocab_size or vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        mlp_dim=shape.mlp_dim or wide,
        norm="layer" if gpt2 else "rms",
        activation="gelu_tanh" if gpt2 else "silu",
        gated_mlp=not gpt2,
        position="learned" if gpt2 else "rope",
        rope_theta=shape.rope_theta,
        max_positions=shape.max_positions,
        tie_embeddings=shape.tie_embeddings,
        **biases,
    )


def param_shardings(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Where each parameter of a model lives."""
    return shardings(axes_of(params, config), params, mesh)[0]


def open_model(
    section: ModelSection,
    mesh: Mesh,
    *,
    path: str | None = None,
    kind: Kind | None = None,
    key: jax.Array | None = None,
    frozen: bool = False,
    share: Model | None = None,
) -> Model:
    """The model of a configuration, on the mesh.

    Args:
        path: instead of `section.path` (a reference, a reward model): the rest of the section,
            how models are computed, holds for it too.
        kind: "lm" or "reward" where only that will do.
        key: for fresh weights (`section.init`).
        frozen: store it in the dtype it is computed in, since it will not train.
        share: a model whose base's arrays are used again where this is an adapter of the same.

    Raises:
        ModelError: nothing there, of another kind, damaged (a run's own result: if any bit of it
            changed), or of an unsupported family.
    """
    dtype = section.dtype if frozen else section.param_dtype
    source = path or section.path
    if source is None:
        return _fresh(section, mesh, key, dtype)
    folder, run = _resolve(source)
    exported = run is not None and is_exported(run)
    if run is not None and exported:
        check_weights(run)
    found_home = run / "export" if run is not None and exported else folder
    weights_home: Path | None = None
    if is_adapter(found_home):
        return _open_adapter(section, mesh, source, found_home, kind, path is None, share)
    if run is not None and not exported and (adapter := _adapter_of_checkpoint(run)):
        return _resumable_adapter(section, mesh, source, run, adapter, kind, path is None, share)
    if run is None or exported:
        home = weights_home = found_home
        hf = read_hf_config(home)
        config = config_from_hf(hf, str(home / "config.json"))
        # How wide a score head is does not matter to where it lives.
        heads = ("lm", "score")
        shapes, axes = abstract_params(config, heads=heads), logical_axes(config, heads=heads)
        if section.quantize:
            shapes = quantize(shapes, section.quantize)
            axes = with_adapter_axes(axes, shapes)
        where, _ = shardings(axes, shapes, mesh)
        loaded = load_hf(home, kind=kind, dtype=dtype, shardings=where, quantize=section.quantize)
        params, found = loaded.params, loaded.kind
        hf = _with_ends(hf, loaded.generation_config)
    else:
        home = run / "tokenizer"
        params, config, found, hf = _from_checkpoint(run, dtype, section.quantize)
        params = jax.device_put(params, param_shardings(params, config, mesh))
    if kind is not None and found != kind:
        raise ModelError(f"{source} is {KIND_NAMES[found]}; {KIND_NAMES[kind]} is needed here")
    own = section.tokenizer if path is None else None
    tokenizer = load_tokenizer(own or home)
    if path is None:
        params, config = _with_tokens(section, mesh, tokenizer, params, config)
    check_vocabulary(tokenizer, config.vocab_size)
    assert found in ("lm", "reward")
    return Model(
        params=params,
        config=config,
        runtime=make_runtime(section, config, mesh),
        kind=found,
        tokenizer=tokenizer,
        source=source,
        hf_config=hf,
        home=weights_home,
    )


def _with_tokens(
    section: ModelSection, mesh: Mesh, tokenizer: Any, params: Params, config: ModelConfig
) -> tuple[Params, ModelConfig]:
    """The model with the tokens that `add_tokens` gives its tokenizer, and with rows for them."""
    added = add_control_tokens(tokenizer, section.add_tokens)
    before = config.vocab_size
    needed = max(tokenizer.get_vocab().values()) + 1
    if section.resize_embeddings and needed > before:
        multiple = int(section.resize_embeddings)  # true is 1
        size = -(-needed // multiple) * multiple
        params, config = enlarge_vocabulary(params, config, size)
        params = jax.device_put(params, param_shardings(params, config, mesh))
    if added or config.vocab_size > before:
        print(
            f"model: {len(added)} tokens added, the embedding has {config.vocab_size} rows "
            f"({config.vocab_size - before} new)",
            flush=True,
        )
    return params, config


def _with_ends(hf: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """config.json with the tokens that end a text as another file has them, if it has any."""
    ends = said.get("eos_token_id")
    return hf if ends is None else {**hf, "eos_token_id": ends}


def _open_base(
    section: ModelSection,
    mesh: Mesh,
    source: str,
    named: str | None,
    own: bool,
    share: Model | None,
) -> Model:
    """The base that an adapter stands on, opened or shared."""
    base = section.base if own and section.base is not None else named
    if not base:
        raise ModelError(
            f"{source} is an adapter and names no base (base_model_name_or_path): give model.base"
        )
    if share is not None and share.adapted is not None and _same_place(base, share.adapted):
        return base_of(share)
    try:
        model = open_model(section, mesh, path=base, frozen=True)
    except ModelError as error:
        raise ModelError(
            f"{source} is an adapter of {base}, which cannot be opened: {error}. If it lies "
            "elsewhere, give model.base"
        ) from error
    if model.adapted is not None:
        raise ModelError(f"{source} is an adapter of {base}, which is an adapter too: merge it")
    return model


def _same_place(place: str, adapted: Adapted) -> bool:
    if not is_path(place):
        return place == adapted.base
    folder = Path(place).expanduser().resolve()
    mine = (adapted.home, Path(adapted.base).expanduser() if is_path(adapted.base) else None)
    return any(path is not None and path.resolve() == folder for path in mine)


def _open_adapter(
    section: ModelSection,
    mesh: Mesh,
    source: str,
    home: Path,
    kind: Kind | None,
    own: bool,
    share: Model | None,
) -> Model:
    """A PEFT folder: its base, with the adapter's leaves beside it."""
    named = read_adapter_config(home).get("base_model_name_or_path")
    base = _open_base(section, mesh, source, named, own, share)
    return _adapter_on(section, mesh, source, base, home, kind, own)


def another_adapter(section: ModelSection, mesh: Mesh, source: str, model: Model) -> Model:
    """A model's base with the adapter of a finished run or a PEFT folder on it: the base's arrays
    are the same ones, and so is the shape of everything, where the adapters are alike.

    Raises:
        ModelError: it is no adapter, or one of another base.
    """
    folder, run = _resolve(source)
    home = folder if run is None else run / "export"
    if run is not None and is_model(home) and not is_exported(run):
        raise ModelError(f"{source} is not finished: only a finished run's adapter is exchanged")
    if not is_adapter(home):
        raise ModelError(
            f"{source} is no adapter: {home} holds no adapter_config.json; a model of its own is "
            "opened on its own"
        )
    return _adapter_on(section, mesh, source, base_of(model), home, None, False)


def _adapter_on(
    section: ModelSection,
    mesh: Mesh,
    source: str,
    base: Model,
    home: Path,
    kind: Kind | None,
    own: bool,
) -> Model:
    loaded = load_adapter(home, base.config, base.params, kind=kind, dtype=section.dtype)
    adapted = stand_on(base, loaded.adapter, quantized=loaded.base_quantized)
    content = adapted.content() if loaded.base_content else None
    if content is not None and content != loaded.base_content:
        raise ModelError(
            f"{source} was trained on other weights than those in {base.home}: their digest is "
            f"{content[:12]}, that of its base {str(loaded.base_content)[:12]}; give its own base "
            "as model.base"
        )
    base = dataclasses.replace(
        base, kind=loaded.kind, hf_config=_with_ends(base.hf_config, read_generation_config(home))
    )
    return _on_base(section, mesh, source, base, adapted, loaded.leaves, home, own)


def _resumable_adapter(
    section: ModelSection,
    mesh: Mesh,
    source: str,
    run: Path,
    said: dict[str, Any],
    kind: Kind | None,
    own: bool,
    share: Model | None,
) -> Model:
    """The adapter of a run that has not been exported yet, from its newest checkpoint."""
    named = said["base_model_name_or_path"]
    base = _open_base(section, mesh, source, named, own, share)
    trained, config, found, hf = _from_checkpoint(run, section.dtype)
    if kind is not None and found != kind:
        raise ModelError(f"{source} is {KIND_NAMES[found]}; {KIND_NAMES[kind]} is needed here")
    adapter = adapter_of(said, config, found, str(run))
    trained = {key: value for key, value in trained.items() if key != "value"}
    quantized = _meta_of_checkpoint(run).get("quantized")
    adapted = stand_on(base, adapter, quantized=quantized)
    leaves = join(trained, adapter.constants())
    base = dataclasses.replace(base, kind=found, hf_config=_with_ends(base.hf_config, hf))
    return _on_base(section, mesh, source, base, adapted, leaves, run / "tokenizer", own)


def _on_base(
    section: ModelSection,
    mesh: Mesh,
    source: str,
    base: Model,
    adapted: Adapted,
    leaves: Params,
    home: Path,
    own: bool,
) -> Model:
    """An adapter's leaves beside its base's; `base` is of the kind and has the ends of the model
    that results."""
    _check_quantized(section, source, adapted)
    under = base.params if base.kind == "lm" else trunk(base.params)
    params = adapted.adapter.on(under, leaves)
    where = param_shardings(params, base.config, mesh)
    given = section.tokenizer if own else None
    beside = any((home / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(given or home) if given or beside else base.tokenizer
    if own and section.resize_embeddings:
        raise ModelError(
            f"model.resize_embeddings: {source} is an adapter, which leaves its base's embedding "
            "as it is; merge it first (jaxrlhf export --format merged)"
        )
    if own:
        add_control_tokens(tokenizer, section.add_tokens)
    check_vocabulary(tokenizer, base.config.vocab_size)
    assert base.kind in ("lm", "reward")
    return dataclasses.replace(
        base,
        params=jax.device_put(params, where),
        tokenizer=tokenizer,
        source=source,
        adapted=adapted,
    )


def _check_quantized(section: ModelSection, source: str, adapted: Adapted) -> None:
    """Says where an adapter is used on other bits than it was trained on.

    Raises:
        ModelError: it replaces whole projections, which a quantized base has no place for.
    """
    if is_quantized(adapted.params):
        refuse_whole(adapted.adapter, f"model.quantize = {section.quantize}: {source}")
    if adapted.quantized not in (None, section.quantize):
        now = f"quantized to {section.quantize}" if section.quantize else "as it is"
        print(
            f"note: {source} was trained on its base quantized to {adapted.quantized}, and is used "
            f"on it {now}; model.quantize={adapted.quantized} gives exactly what was trained",
            flush=True,
        )


def quantized_base(source: str) -> str | None:
    """How the base of an adapter was quantized while that trained, by what the adapter says."""
    folder, run = _resolve(source)
    exported = run is not None and is_exported(run)
    home = run / "export" if run is not None and exported else folder
    if is_adapter(home):
        return recorded(home)
    return None if run is None or exported else _meta_of_checkpoint(run).get("quantized")


def refuse_whole(adapter: Adapter, where: str) -> None:
    """Raises ModelError if an adapter trains whole projections, which quantized ones cannot."""
    whole = [
        module.short
        for module in adapter.saved
        if any(is_projection(tuple(path.split("/"))) for _, own, _ in module.leaves for path in own)
    ]
    if whole:
        raise ModelError(
            f"{where} trains {', '.join(whole)} whole (modules_to_save), which in a quantized base "
            "are rounded to a few values: adapt them instead (targets), or leave quantize out"
        )


def _meta_of_checkpoint(run: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(run)
    step = checkpoints.best()
    step = checkpoints.latest() if step is None else step
    return {} if step is None else checkpoints.read_meta(step)


def _adapter_of_checkpoint(run: Path) -> dict[str, Any] | None:
    """What an unfinished run says of its adapter; None where all its parameters train."""
    return _meta_of_checkpoint(run).get("adapter")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def is_exported(run: Path) -> bool:
    """Whether a run's export/ is what it came to: not where it has trained on since, as one does
    that was given more steps."""
    # Without checkpoints there is nothing else to read.
    return is_model(run / "export") and (is_finished(run) or not Checkpoints(run).steps())


def _fresh(section: ModelSection, mesh: Mesh, key: jax.Array | None, dtype: str) -> Model:
    fresh = section.init if isinstance(section, FreshModelSection) else None
    if fresh is None or section.tokenizer is None or key is None:
        raise ModelError("model: give model.path, or model.init and model.tokenizer")
    tokenizer = load_tokenizer(section.tokenizer)
    add_control_tokens(tokenizer, section.add_tokens)
    config = new_config(fresh, max(tokenizer.get_vocab().values()) + 1)
    check_vocabulary(tokenizer, config.vocab_size)
    where, _ = shardings(logical_axes(config), abstract_params(config), mesh)
    params = jax.jit(lambda key: init_params(key, config, param_dtype=dtype), out_shardings=where)(
        key
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    hf = {name: getattr(tokenizer, name) for name in names}
    runtime = make_runtime(section, config, mesh)
    return Model(params, config, runtime, "lm", tokenizer, "fresh weights", hf)


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (folder / "config.yaml").is_file() and not is_model(folder)


def _resolve(source: str) -> tuple[Path, Path | None]:
    """(folder, the same if it is a run's): of a path, or of a hub name after fetching it."""
    if is_path(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ModelError(f"model {source}: {folder.absolute()} {what}; a folder is needed")
        return folder, folder if is_run(folder) else None
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted)), None
    except Exception as error:  # whatever the network or the hub raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {source}: neither a path here ({Path(source).absolute()} does not exist) nor "
            f"reachable as a hub name: {reason}"
        ) from error


def _from_checkpoint(
    run: Path, dtype: str, quantized: str | None = None
) -> tuple[Params, ModelConfig, str, dict[str, Any]]:
    """(parameters, architecture, kind, hf config) of a run that has not been exported yet."""
    checkpoints = Checkpoints(run)
    params, step = checkpoints.restore_params(step=checkpoints.best())
    meta = checkpoints.read_meta(step)
    if "frozen" in meta and "adapter" not in meta:
        raise ModelError(
            f"{run} trains some of its model's parameters (train.only) and is not finished: its "
            "checkpoints hold only those. Call its command again to finish it"
        )
    for name in meta["exported"]:
        params = params[name]
    params = cast(quantize(params, quantized) if quantized else params, dtype)
    return params, ModelConfig.from_dict(meta["model"]), meta["kind"], meta["hf_config"]


def new_head(model: Model, name: str, key: jax.Array, *, outputs: int = 1) -> Params:
    """The parameters of a fresh "score" or "value" head for a model's trunk."""

    def make(key: jax.Array) -> Params:
        # Only the head is kept, so the compiler never makes the rest.
        dtype = model.runtime.param_dtype
        return init_params(
            key, model.config, heads=(name,), num_outputs=outputs, param_dtype=dtype
        )[name]

    return jax.jit(make)(key)


def trunk(params: Params) -> Params:
    """A model's parameters without its heads (a tied embedding stays)."""
    return {key: value for key, value in params.items() if key not in ("lm_head", "score", "value")}
