# SPDX-License-Identifier: Apache-2.0
"""MODEL in a configuration to parameters on the mesh: a run, a folder, a hub name, or fresh ones.

A finished run is read from its `export/` folder, an unfinished one from its newest good checkpoint.
Nothing touches the network unless a hub name is given.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config.model import Architecture, FreshModelSection, ModelSection
from jaxrlhf.data.tokenizer import check_vocabulary, is_path, load_tokenizer
from jaxrlhf.errors import ModelError
from jaxrlhf.models.config import ModelConfig, Runtime
from jaxrlhf.models.families import config_from_hf
from jaxrlhf.models.transformer import abstract_params, init_params, logical_axes
from jaxrlhf.models.weights import KIND_NAMES, load_hf, read_hf_config
from jaxrlhf.parallel.rules import shardings
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.types import Params

Kind = Literal["lm", "reward"]
UNROLLED_LAYERS = 8  # up to this depth unrolling is faster and compiles quickly enough


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to use: parameters on the mesh and all that is needed to run and save it.

    `stop_ids` are the tokens that end a text for this model; `source` is what the user wrote.
    """

    params: Params
    config: ModelConfig
    runtime: Runtime
    kind: Kind
    tokenizer: Any
    source: str
    hf_config: dict[str, Any]
    stop_ids: tuple[int, ...]

    def axes(self) -> Params:
        """The logical axis names of every parameter."""
        return axes_of(self.params, self.config)


def axes_of(params: Params, config: ModelConfig) -> Params:
    """Logical axis names of a model's parameters, whichever heads it has."""
    heads = ("lm", *(name for name in ("score", "value") if name in params))
    outputs = params["score"]["kernel"].shape[-1] if "score" in params else 1
    named = logical_axes(config, heads=heads, num_outputs=outputs)
    return {key: value for key, value in named.items() if key in params}


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
) -> Model:
    """The model of a configuration, on the mesh.

    Args:
        path: instead of `section.path` (a reference, a reward model): the rest of the section,
            how models are computed, holds for it too.
        kind: "lm" or "reward" where only that will do.
        key: for fresh weights (`section.init`).
        frozen: store it in the dtype it is computed in, since it will not train.

    Raises:
        ModelError: nothing there, of another kind, damaged, or of an unsupported family.
    """
    dtype = section.dtype if frozen else section.param_dtype
    source = path or section.path
    if source is None:
        return _fresh(section, mesh, key, dtype)
    folder, run = _resolve(source)
    if run is None or (run / "export" / "config.json").is_file():
        home = folder if run is None else run / "export"
        hf = read_hf_config(home)
        config = config_from_hf(hf, str(home / "config.json"))
        # How wide a score head is does not matter to where it lives.
        heads = ("lm", "score")
        where, _ = shardings(
            logical_axes(config, heads=heads), abstract_params(config, heads=heads), mesh
        )
        loaded = load_hf(home, kind=kind, dtype=dtype, shardings=where)
        params, found = loaded.params, loaded.kind
        ends = loaded.generation_config.get("eos_token_id", hf.get("eos_token_id"))
    else:
        home = run / "tokenizer"
        params, config, found, hf = _from_checkpoint(run, dtype)
        params = jax.device_put(params, param_shardings(params, config, mesh))
        ends = hf.get("eos_token_id")
    if kind is not None and found != kind:
        raise ModelError(f"{source} is {KIND_NAMES[found]}; {KIND_NAMES[kind]} is needed here")
    own = section.tokenizer if path is None else None
    tokenizer = load_tokenizer(own or home)
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
        stop_ids=_ids(ends, tokenizer),
    )


def _fresh(section: ModelSection, mesh: Mesh, key: jax.Array | None, dtype: str) -> Model:
    fresh = section.init if isinstance(section, FreshModelSection) else None
    if fresh is None or section.tokenizer is None or key is None:
        raise ModelError("model: give model.path, or model.init and model.tokenizer")
    tokenizer = load_tokenizer(section.tokenizer)
    config = new_config(fresh, len(tokenizer))
    check_vocabulary(tokenizer, config.vocab_size)
    where, _ = shardings(logical_axes(config), abstract_params(config), mesh)
    params = jax.jit(lambda key: init_params(key, config, param_dtype=dtype), out_shardings=where)(
        key
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    hf = {name: getattr(tokenizer, name) for name in names}
    runtime = make_runtime(section, config, mesh)
    ends = _ids(None, tokenizer)
    return Model(params, config, runtime, "lm", tokenizer, "fresh weights", hf, ends)


def _ids(ends: int | list[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text: the model's own, else the tokenizer's EOS."""
    ends = tokenizer.eos_token_id if ends is None else ends
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()


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


def _from_checkpoint(run: Path, dtype: str) -> tuple[Params, ModelConfig, str, dict[str, Any]]:
    """(parameters, architecture, kind, hf config) of a run that has not been exported yet."""
    checkpoints = Checkpoints(run)
    params, step = checkpoints.restore_params(step=checkpoints.best())
    meta = checkpoints.read_meta(step)
    for name in meta["exported"]:
        params = params[name]
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
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


def copy_params(params: Params) -> Params:
    """A copy in buffers of its own, so that a donated original takes nothing with it."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)
