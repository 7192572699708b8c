# SPDX-License-Identifier: Apache-2.0
"""Models that train through an adapter: opened, divided in two, and put together again.

A stage works with whole trees of parameters throughout. What the optimizer sees is the trained
half; the frozen half is an argument of the step that nothing changes, and the very arrays that a
reference policy, a critic or a reward model on the same base read too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config.model import AdapterSection, TrainedModelSection
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.data.tokenizer import encode_text
from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models.adapters.merging import merge
from jaxrlhf.models.adapters.modules import described
from jaxrlhf.models.adapters.only import parse_only
from jaxrlhf.models.adapters.peft import load_adapter, save_adapter
from jaxrlhf.models.adapters.spec import Adapter, AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join, places, split, with_dropout
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.quantization import cast, dequantize, is_quantized
from jaxrlhf.models.transformer import count_params
from jaxrlhf.stages.models import (
    Adapted,
    Kind,
    Model,
    base_of,
    open_model,
    param_shardings,
    refuse_whole,
    stand_on,
    trunk,
)
from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.step import LossFn
from jaxrlhf.types import Params


def spec_of(section: AdapterSection) -> AdapterSpec:
    """The settings as the model's own functions take them."""
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(AdapterSpec)}
    names = ("targets", "modules_to_save")
    return AdapterSpec(**{**given, **{name: tuple(given[name]) for name in names}})


def open_trained(
    section: TrainedModelSection,
    mesh: Mesh,
    *,
    kind: Kind | None = None,
    key: jax.Array,
    heads: tuple[str, ...] = (),
    only: Sequence[str] = (),
) -> Model:
    """The model that a stage trains: whole, some of it, or a frozen base with an adapter beside it.

    A model that is an adapter itself is trained on where `model.adapter` describes it, and merged
    into its base where everything is to train.

    Args:
        heads: of "score": new heads that the stage will add, which train whole.
        only: as `train.only`.

    Raises:
        ConfigError: the adapter's settings do not fit the model, or not the adapter there.
        ModelError: whole projections of a quantized model are to train.
    """
    if section.adapter is None:
        if section.quantize:
            raise ConfigError(
                f"model.quantize = {section.quantize}: quantized weights do not train; give "
                "model.adapter"
            )
        model = open_model(section, mesh, kind=kind, key=key)
        model = model if model.adapted is None else merged(model, section.param_dtype)
        if not only:
            return model
        return dataclasses.replace(model, only=parse_only(tuple(only), model.config))
    model = open_model(section, mesh, kind=kind, key=key, frozen=True)
    adapter = resolve(spec_of(section.adapter), model.config, heads=_heads(model, heads))
    if section.quantize:
        refuse_whole(adapter, f"model.quantize = {section.quantize}: model.adapter")
    if model.adapted is not None:
        return _continued(model, adapter, section)
    base = stand_on(model, adapter, fresh=True, quantized=section.quantize)
    key, text = jax.random.fold_in(key, 1), start_text(section.adapter, model)
    return with_adapter(model, base, section.param_dtype, key, mesh, text)


def open_policy(config: TrainingConfig, mesh: Mesh, key: jax.Array) -> Model:
    """The language model that a stage trains; key: of the stage."""
    first = jax.random.fold_in(key, 0)
    return open_trained(config.model, mesh, kind="lm", key=first, only=config.train.only)


def start_text(section: AdapterSection, model: Model) -> tuple[int, ...]:
    """The tokens that virtual tokens start as; () = drawn from the vocabulary.

    Raises:
        ConfigError: a text without tokens.
    """
    if section.init_text is None:
        return ()
    ids = encode_text(model.tokenizer, section.init_text)
    if not ids:
        raise ConfigError("model.adapter.init_text has no tokens: give a text, or leave it out")
    return tuple(ids)


def _heads(model: Model, heads: tuple[str, ...]) -> tuple[str, ...]:
    return (*heads, "score") if model.kind == "reward" and "score" not in heads else heads


def with_adapter(
    model: Model,
    adapted: Adapted,
    dtype: str,
    key: jax.Array,
    mesh: Mesh,
    text: tuple[int, ...] = (),
) -> Model:
    """A base with new leaves beside it; what trains whole is copied, since the step donates it."""
    adapter = adapted.adapter
    whole, frozen = split(adapted.params, adapter.trains)
    whole = jax.tree.map(lambda x: jnp.array(x, jnp.dtype(dtype), copy=True), whole)

    def make(key: jax.Array, base: Params) -> Params:
        return init_adapter(key, adapter, base, dtype, config=model.config, text=text)

    base = frozen if adapter.reads_base else {}
    shapes = jax.eval_shape(make, key, base)
    abstract = abstract_adapted(adapter, adapted.params, dtype, model.config)
    where = param_shardings(abstract, model.config, mesh)
    leaves = jax.jit(make, out_shardings=_like(where, shapes))(key, base)
    params = join(join(whole, frozen), leaves)
    return dataclasses.replace(model, params=params, adapted=adapted)


def abstract_adapted(adapter: Adapter, base: Params, dtype: str, config: ModelConfig) -> Params:
    """The shapes of a whole tree, of its base's: what trains in `dtype`."""
    whole, frozen = split(base, adapter.trains)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), whole)

    def make(key: jax.Array, base: Params) -> Params:
        return init_adapter(key, adapter, base, dtype, config=config)

    leaves = jax.eval_shape(make, jax.random.key(0), frozen)
    return join(join(whole, frozen), leaves)


def _like(tree: Any, part: Any) -> Any:
    """The part of a tree that has the paths of another."""
    if not isinstance(part, dict):
        return tree
    return {key: _like(tree[key], value) for key, value in part.items()}


def _continued(model: Model, adapter: Adapter, section: TrainedModelSection) -> Model:
    """The adapter that is there, trained on."""
    assert model.adapted is not None
    there = model.adapted.adapter

    def without_score(one: Adapter) -> Adapter:
        saved = tuple(m for m in one.saved if m.parts != ("score",))
        return dataclasses.replace(one, saved=saved)

    if not without_score(there).same_shape(without_score(adapter)):
        raise ConfigError(
            f"model.adapter describes another adapter than {model.source}, which is {_said(there)};"
            f" the settings are {_said(adapter)}: repeat its settings to train it on, leave "
            "model.adapter out to train everything, or merge it first (jaxrlhf export --format "
            "merged)"
        )
    dtype = jnp.dtype(section.param_dtype)
    trained, frozen = split(model.params, there.trains)
    trained = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trained)
    adapted = dataclasses.replace(
        model.adapted, adapter=adapter, fresh=False, quantized=section.quantize
    )
    return dataclasses.replace(model, params=join(trained, frozen), adapted=adapted)


def _said(adapter: Adapter) -> str:
    if adapter.beside:
        return f"{adapter.kind} of " + ", ".join(f"{p} {list(s)}" for p, s in adapter.beside)
    targets = described(placed.module for placed in adapter.placed)
    ranks = sorted({rank for placed in adapter.placed for rank in placed.ranks})
    alphas = sorted({alpha for placed in adapter.placed for alpha in placed.alphas})
    numbers = f" of rank {ranks}, alpha {alphas}" if adapter.kind != "ia3" else ""
    saved = ", ".join(m.short for m in adapter.saved)
    return f"{adapter.kind}{numbers} on {targets}" + (f", with {saved} whole" if saved else "")


def merged(model: Model, dtype: str) -> Model:
    """The same model of plain kernels: adapters are added into them, quantized ones multiplied
    out.

    Raises:
        ConfigError: the adapter is of a kind that no kernel can hold.
    """
    if model.adapted is not None and not model.adapted.adapter.merges:
        raise ConfigError(
            f"{model.source} is a {model.adapted.adapter.kind} adapter, which adds to what the "
            "model reads or computes and is no change of its matrices: it cannot be merged. Keep "
            "it as an adapter (jaxrlhf export --format peft), or repeat its settings under "
            "model.adapter to train it on"
        )

    def make(params: Params) -> Params:
        if not is_quantized(params):
            return merge(cast(params, dtype))
        return cast(dequantize(merge(params)), dtype)

    return dataclasses.replace(model, params=jax.jit(make)(model.params), adapted=None)


def halves(model: Model, params: Params) -> tuple[Params, Params]:
    """(what trains, what is frozen) of a model's parameters, with whatever heads it has by now."""
    if model.only is not None:
        return model.only.split(params)
    return (params, {}) if model.adapted is None else model.adapted.adapter.split(params)


def reference_params(model: Model) -> Params:
    """The parameters of a policy as it starts; the state that trains has buffers of its own.

    With a new adapter they are its base, which is the same function for less.
    """
    if model.adapted is not None and model.adapted.fresh:
        return model.adapted.params
    return model.params


def before_training(model: Model) -> Params:
    """The parameters that a model is compared with before it trains: its own, but for new virtual
    tokens, which the base does not start as, the base's."""
    adapted = model.adapted
    if adapted is not None and adapted.fresh and adapted.adapter.virtual_tokens:
        return adapted.params
    return model.params


def critic_of(
    model: Model, section: TrainedModelSection, key: jax.Array, mesh: Mesh
) -> tuple[Model, Params]:
    """(model, its trunk's parameters) of a critic on a frozen base: an adapter of its own.

    One that the model has already is where it begins.
    """
    assert section.adapter is not None
    if model.adapted is not None and not model.adapted.fresh:
        adapter = dataclasses.replace(model.adapted.adapter, saved=())
        adapted = dataclasses.replace(model.adapted, adapter=adapter)
        return dataclasses.replace(model, adapted=adapted), trunk(model.params)
    spec = dataclasses.replace(spec_of(section.adapter), modules_to_save=())
    adapter = resolve(spec, model.config)
    adapted = stand_on(base_of(model), adapter, fresh=True)
    text = start_text(section.adapter, model)
    model = with_adapter(model, adapted, section.param_dtype, key, mesh, text)
    return model, trunk(model.params)


def on_halves(loss_fn: LossFn, dropout: float) -> LossFn:
    """A stage's loss of the whole tree as a function of its two halves; with dropout on the
    adapter's inputs, whose key is folded from the step's."""

    def of_halves(params: Params, frozen: Params, batch: Any, key: jax.Array) -> Any:
        whole = join(params, frozen)
        if dropout:
            whole = with_dropout(whole, jax.random.fold_in(key, 1), dropout)
        return loss_fn(whole, {}, batch, key)

    return of_halves


def write_adapter(
    folder: Path,
    params: Params,
    adapted: Adapted,
    config: ModelConfig,
    kind: str,
    hf_config: dict[str, Any],
    card: str | None = None,
) -> None:
    """Writes the PEFT folder of a whole tree and reads it back: the same bits, or ModelError."""
    save_adapter(
        folder,
        params,
        adapted.adapter,
        config,
        kind=kind,
        base=adapted.named(),
        base_content=adapted.content(),
        base_quantized=adapted.quantized,
        hf_config=hf_config,
        model_card=card,
    )
    if jax.process_count() == 1:
        back = load_adapter(folder, config, adapted.params, kind=kind)
        kept, _ = split(params, adapted.adapter.trains)
        found, _ = split(back.leaves, adapted.adapter.trains)
        if content_digest(found) != content_digest(kept):
            raise ModelError(f"{folder}: the exported adapter differs when read back")


def count_trained(params: Params, adapted: Adapted | None) -> int:
    """Numbers that train, without those that only fill up smaller ranks."""
    total = count_params(params)
    if adapted is None or not adapted.adapter.filled():
        return total
    first = tuple(adapted.adapter.placed[0].module.parts[0].split("/"))
    copies = sum(path[-len(first) :] == first for path in places(params, "lora_a"))
    return total - copies * adapted.adapter.filled()
