# SPDX-License-Identifier: Apache-2.0
"""Model families as data: which config.json field and which tensor is which of ours.

A family is one entry of FAMILIES. Its `fields` say how config.json and ModelConfig translate both
ways, its `tensors` where each weight lies. A field of config.json that no entry reads, and that is
not listed as harmless, is refused: what changes the maths must not be ignored. No jax here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.errors import ModelError
from jaxrlhf.models.config import ModelConfig


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Field:
    """One field of config.json.

    Attributes:
        hf: its name there; `also` are older names for the same.
        ours: the ModelConfig fields it sets (several: all equal).
        default: what transformers takes if it is absent or null; a string "=NAME" means the value
            of that ModelConfig field's own default rule (None).
        names: the values, theirs to ours; None = as they are.
    """

    hf: str
    ours: tuple[str, ...]
    default: Any = REQUIRED
    also: tuple[str, ...] = ()
    names: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file ("{layer}" stands for the layer's number).

    Attributes:
        leaves: paths in our tree; several = they stand side by side in it, along our last axis.
        transpose: stored [out, in] (torch's Linear) where ours is [in, out].
    """

    hf: str
    leaves: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers is read and written.

    Attributes:
        architectures: class name in transformers per kind of model ("lm", "reward").
        constants: ModelConfig fields that all its members share.
        fields, tensors: the translation.
        must_be: config.json fields that switch maths we do not have: accepted values.
        harmless: further fields of config.json without influence on the forward pass.
        prefix: what names of tensors begin with; files of the bare model lack it.
        buffers: endings of tensor names that are constants, not weights: skipped when read.
    """

    architectures: Mapping[str, str]
    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]
    must_be: Mapping[str, tuple] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    prefix: str = ""
    buffers: tuple[str, ...] = ()


# Fields of transformers' PretrainedConfig that do not touch the forward pass of a decoder.
HARMLESS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id id2label label2id
    num_labels problem_type initializer_range attention_dropout name_or_path tokenizer_class
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    finetuning_task prefix task_specific_params is_decoder chunk_size_feed_forward max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens auto_map
    attn_implementation unsloth_version unsloth_fixed max_window_layers
    """.split()  # noqa: SIM905
)
# Switches of PretrainedConfig whose other value is another model.
MUST_BE: dict[str, tuple] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "logits_soft_cap": (None,),
    "partial_rotary_factor": (1, None),
}

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# rope_type -> the numbers it needs
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _bias_and(hf: str, ours: str, transpose: bool, weight: str = "kernel") -> tuple[Tensor, ...]:
    leaf = f"layers/{ours}"
    return (
        Tensor(f"{hf}.weight", (f"{leaf}/{weight}",), transpose),
        Tensor(f"{hf}.bias", (f"{leaf}/bias",)),
    )


def _pre_norm_layers(prefix: str) -> tuple[Tensor, ...]:
    """Layers as llama names them; entries whose leaf a config does not have are unused."""
    names = {
        "self_attn.q_proj": "attention/q",
        "self_attn.k_proj": "attention/k",
        "self_attn.v_proj": "attention/v",
        "self_attn.o_proj": "attention/o",
        "mlp.gate_proj": "mlp/gate",
        "mlp.up_proj": "mlp/up",
        "mlp.down_proj": "mlp/down",
    }
    tensors: tuple[Tensor, ...] = ()
    for hf, ours in names.items():
        tensors += _bias_and(f"{prefix}layers.{{layer}}.{hf}", ours, True)
    for hf, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        tensors += _bias_and(f"{prefix}layers.{{layer}}.{hf}", ours, False, "scale")
    return tensors


HEAD_TENSORS = (
    Tensor("lm_head.weight", ("lm_head/kernel",), True),
    Tensor("score.weight", ("score/kernel",), True),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architectures={"lm": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"},
        constants={"norm": "rms", "gated_mlp": True, "position": "rope"},
        fields=(
            Field("vocab_size", ("vocab_size",)),
            Field("hidden_size", ("hidden_size",)),
            Field("num_hidden_layers", ("num_layers",)),
            Field("num_attention_heads", ("num_heads",)),
            Field("num_key_value_heads", ("num_kv_heads",), None),
            Field("head_dim", ("head_dim",), None),
            Field("intermediate_size", ("mlp_dim",)),
            Field("rms_norm_eps", ("norm_eps",), 1e-6),
            Field("hidden_act", ("activation",), "silu", names=ACTIVATION_NAMES),
            Field("max_position_embeddings", ("max_positions",), 2048),
            Field("tie_word_embeddings", ("tie_embeddings",), False),
            Field("attention_bias", ("qkv_bias", "output_bias"), False),
            Field("mlp_bias", ("mlp_bias",), False),
        ),
        tensors=(
            Tensor("model.embed_tokens.weight", ("embed/embedding",)),
            *_pre_norm_layers("model."),
            Tensor("model.norm.weight", ("final_norm/scale",)),
            *HEAD_TENSORS,
        ),
        harmless=frozenset({"pretraining_tp"}),  # equal maths, computed in slices
        prefix="model.",
        buffers=("rotary_emb.inv_freq",),
    ),
    "gpt2": Family(
        architectures={"lm": "GPT2LMHeadModel", "reward": "GPT2ForSequenceClassification"},
        constants={
            "norm": "layer",
            "gated_mlp": False,
            "position": "learned",
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        fields=(
            Field("vocab_size", ("vocab_size",)),
            Field("n_embd", ("hidden_size",), also=("hidden_size",)),
            Field("n_layer", ("num_layers",), also=("num_hidden_layers",)),
            Field("n_head", ("num_heads",), also=("num_attention_heads",)),
            Field("n_inner", ("mlp_dim",), None),
            Field("n_positions", ("max_positions",), 1024, ("n_ctx", "max_position_embeddings")),
            Field("layer_norm_epsilon", ("norm_eps",), 1e-5),
            Field(
                "activation_function",
                ("activation",),
                "gelu_new",
                # gelu_new first: the name a value is written under is the first that fits.
                names={"gelu_new": "gelu_tanh", **ACTIVATION_NAMES},
            ),
            Field("tie_word_embeddings", ("tie_embeddings",), True),
        ),
        tensors=(
            Tensor("transformer.wte.weight", ("embed/embedding",)),
            Tensor("transformer.wpe.weight", ("position_embed/embedding",)),
            Tensor(
                "transformer.h.{layer}.attn.c_attn.weight",
                tuple(f"layers/attention/{name}/kernel" for name in "qkv"),
            ),
            Tensor(
                "transformer.h.{layer}.attn.c_attn.bias",
                tuple(f"layers/attention/{name}/bias" for name in "qkv"),
            ),
            *_bias_and("transformer.h.{layer}.attn.c_proj", "attention/o", False),
            *_bias_and("transformer.h.{layer}.mlp.c_fc", "mlp/up", False),
            *_bias_and("transformer.h.{layer}.mlp.c_proj", "mlp/down", False),
            *_bias_and("transformer.h.{layer}.ln_1", "attention_norm", False, "scale"),
            *_bias_and("transformer.h.{layer}.ln_2", "mlp_norm", False, "scale"),
            Tensor("transformer.ln_f.weight", ("final_norm/scale",)),
            Tensor("transformer.ln_f.bias", ("final_norm/bias",)),
            *HEAD_TENSORS,
        ),
        must_be={
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
        },
        harmless=frozenset(
            """
            attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn summary_activation
            summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
            gradient_checkpointing
            """.split()  # noqa: SIM905
        ),
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}


def supported() -> str:
    """The model types that can be read, for messages."""
    return ", ".join(sorted(FAMILIES))


def _rope_from_hf(hf: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """rope_theta and rope_scaling from both spellings: `rope_parameters` (transformers 5) and
    `rope_theta` + `rope_scaling` (4). Returns ModelConfig fields and what is wrong."""
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = hf.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            problems.append(f"{name} = {value!r}: an object or null")
            continue
        value = dict(value)
        if "type" in value:
            value.setdefault("rope_type", value["type"])
            del value["type"]
        value.setdefault("rope_type", "default")
        if hf.get("rope_theta") is not None:
            value.setdefault("rope_theta", hf["rope_theta"])
        value.setdefault("rope_theta", 10000.0)
        if value.get("partial_rotary_factor") in (1, None):
            value.pop("partial_rotary_factor", None)
        found[name] = value
    if problems:
        return {}, problems
    rope = {"rope_type": "default", "rope_theta": hf.get("rope_theta") or 10000.0}
    if found:
        rope = next(iter(found.values()))
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        problems.append(
            f"rope_parameters = {hf['rope_parameters']} and rope_scaling = {hf['rope_scaling']} "
            "disagree: keep the one that is true"
        )
    theta = hf.get("rope_theta")
    if theta is not None and theta != rope["rope_theta"]:
        problems.append(
            f"rope_theta = {theta} and rope_parameters.rope_theta = {rope['rope_theta']} disagree"
        )
    kind = rope["rope_type"]
    if kind not in ROPE_KINDS:
        problems.append(f"rope_type = {kind!r}: supported are {', '.join(sorted(ROPE_KINDS))}")
        return {}, problems
    needs = ROPE_KINDS[kind]
    rest = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    if missing := [key for key in needs if key not in rest]:
        problems.append(f"rope_type {kind!r} lacks {', '.join(missing)}")
    if kind == "default":
        rest = {key: value for key, value in rest.items() if value not in (None, 1, 1.0)}
    if unread := [key for key in rest if key not in needs]:
        problems.append(f"rope field {', '.join(unread)} is not read with rope_type {kind!r}")
    numbers = {"rope_theta": rope["rope_theta"], **{k: rest[k] for k in needs if k in rest}}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            problems.append(f"{key} = {value!r}: a positive number")
    if problems:
        return {}, problems
    scaling = () if kind == "default" else (("rope_type", kind), *((k, rest[k]) for k in needs))
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": tuple(sorted(scaling))}, []


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling = dict(config.rope_scaling) or {"rope_type": "default"}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }


def _read_field(entry: Field, hf: Mapping[str, Any], problems: list[str]) -> Any:
    given = {name: hf[name] for name in (entry.hf, *entry.also) if hf.get(name) is not None}
    if not given:
        if entry.default is REQUIRED:
            problems.append(f"{entry.hf} is missing")
            return None
        value = entry.default
    else:
        value = next(iter(given.values()))
        if any(other != value for other in given.values()):
            problems.append(f"{given} disagree: they name the same thing")
    if entry.names is None or value is None:
        return value
    if value not in entry.names:
        choices = ", ".join(sorted(entry.names))
        problems.append(f"{entry.hf} = {value!r}: supported are {choices}")
        return None
    return entry.names[value]


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture that a config.json describes, in the spelling of transformers 4 or 5.

    Raises:
        ModelError: model_type is not supported, a field is missing or has a value we do not
            compute, or a field is there that nothing reads; all of them in one message.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{where}: model_type = {kind!r} is not supported; supported: {supported()}"
        )
    family = FAMILIES[kind]
    problems: list[str] = []
    values: dict[str, Any] = {"family": kind, **family.constants}
    known = set(HARMLESS) | family.harmless
    for entry in family.fields:
        known |= {entry.hf, *entry.also}
        value = _read_field(entry, hf, problems)
        values |= dict.fromkeys(entry.ours, value)
    if values.get("mlp_dim") is None and isinstance(values.get("hidden_size"), int):
        values["mlp_dim"] = 4 * values["hidden_size"]
    if family.constants["position"] == "rope":
        known |= {"rope_theta", "rope_scaling", "rope_parameters"}
        rope, wrong = _rope_from_hf(hf, where)
        values |= rope
        problems += wrong
    for name, accepted in {**MUST_BE, **family.must_be}.items():
        known.add(name)
        if name in hf and hf[name] not in accepted:
            problems.append(f"{name} = {hf[name]!r} is not supported (only {accepted[0]!r})")
    for name, value in hf.items():
        if name not in known and not name.startswith("_") and value is not None:
            problems.append(
                f"{name} = {value!r} is not read: remove it if it does not change the maths"
            )
    if not problems:
        try:
            return ModelConfig(**values)
        except (ModelError, TypeError) as error:
            problems.append(str(error))
    raise ModelError(
        f"{where} ({kind}) cannot be used: "
        + "; ".join(problems)
        + f". Supported model types: {supported()}"
    )


def config_to_hf(config: ModelConfig, kind: str = "lm") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read; the inverse of `config_from_hf`.

    Raises ModelError if the family cannot express the config (llama with biases on q, k, v only).
    """
    if config.family not in FAMILIES:
        raise ModelError(f"family = {config.family!r} is not supported; supported: {supported()}")
    family = FAMILIES[config.family]
    if kind not in family.architectures:
        raise ModelError(f"kind = {kind!r}: one of {', '.join(family.architectures)}")
    hf: dict[str, Any] = {
        "architectures": [family.architectures[kind]],
        "model_type": config.family,
    }
    for entry in family.fields:
        value = getattr(config, entry.ours[0])
        if entry.names is not None:
            value = next((name for name, ours in entry.names.items() if ours == value), value)
        hf[entry.hf] = value
    if config.position == "rope":
        hf |= _rope_to_hf(config)
    back = config_from_hf(hf, "the exported config")
    if back != config:
        differs = [
            f"{f.name} = {getattr(config, f.name)!r}"
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != getattr(back, f.name)
        ]
        raise ModelError(f"a {config.family} folder cannot express {', '.join(differs)}")
    return hf
