# SPDX-License-Identifier: Apache-2.0
"""The families: one entry of FAMILIES each, named by transformers' `model_type`."""

from jaxrlhf.models.families.describe import REQUIRED, Family, Field, Tensor
from jaxrlhf.models.families.parts import RopeLayers, Windows
from jaxrlhf.models.families.rope import Rope

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


def _bias_and(hf: str, ours: str, transpose: bool, weight: str = "kernel") -> tuple[Tensor, ...]:
    leaf = f"layers/{ours}"
    return (
        Tensor(f"{hf}.weight", (f"{leaf}/{weight}",), transpose),
        Tensor(f"{hf}.bias", (f"{leaf}/bias",)),
    )


LAYER = "model.layers.{layer}."
ATTENTION = {f"self_attn.{name}_proj": f"attention/{name}" for name in "qkvo"}
QK_NORMS = {f"self_attn.{name}_norm": f"attention/{name}_norm" for name in "qk"}
GATED_MLP = {f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
POST_NORMS = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
BOTH_NORMS = {
    "input_layernorm": "attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    **POST_NORMS,
}
HEAD_TENSORS = (
    Tensor("lm_head.weight", ("lm_head/kernel",), True),
    Tensor("score.weight", ("score/kernel",), True),
)


def _tensors(*extra: Tensor, projections=ATTENTION | GATED_MLP, norms=NORMS) -> tuple[Tensor, ...]:
    """A model as llama names it; entries whose leaf a config does not have are unused."""
    layers: tuple[Tensor, ...] = ()
    for hf, ours in projections.items():
        layers += _bias_and(f"{LAYER}{hf}", ours, True)
    for hf, ours in norms.items():
        layers += _bias_and(f"{LAYER}{hf}", ours, False, "scale")
    return (
        Tensor("model.embed_tokens.weight", ("embed/embedding",)),
        *layers,
        *extra,
        Tensor("model.norm.weight", ("final_norm/scale",)),
        *HEAD_TENSORS,
    )


def _experts(prefix: str, router: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    kernels = {"gate": gate, "up": up, "down": down}
    return (
        Tensor(f"{LAYER}{prefix}.{router}.weight", ("layers/experts/router/kernel",), True),
        *(
            Tensor(
                f"{LAYER}{prefix}.experts.{{expert}}.{hf}.weight",
                (f"layers/experts/{ours}/kernel",),
                True,
            )
            for ours, hf in kernels.items()
        ),
    )


def _fields(
    *more: Field,
    kv_heads: object = REQUIRED,
    head_dim: int | None = None,
    eps: float = 1e-6,
    activation: Field | None = None,
    mlp_dim: str = "intermediate_size",
    tied: bool = False,
) -> tuple[Field, ...]:
    """What most families name alike, with the defaults that transformers has for one of them."""
    return (
        Field("vocab_size", ("vocab_size",)),
        Field("hidden_size", ("hidden_size",)),
        Field("num_hidden_layers", ("num_layers",)),
        Field("num_attention_heads", ("num_heads",)),
        Field("num_key_value_heads", ("num_kv_heads",), kv_heads),
        Field("head_dim", ("head_dim",), head_dim),
        Field(mlp_dim, ("mlp_dim",)),
        Field("rms_norm_eps", ("norm_eps",), eps),
        activation or Field("hidden_act", ("activation",), "silu", names=ACTIVATION_NAMES),
        Field("max_position_embeddings", ("max_positions",), 2048),
        Field("tie_word_embeddings", ("tie_embeddings",), tied),
        *more,
    )


def _classes(name: str, lm: str | None = None) -> dict[str, str]:
    return {"lm": f"{lm or name}ForCausalLM", "reward": f"{name}ForSequenceClassification"}


LLAMA_LIKE = {"norm": "rms", "gated_mlp": True, "position": "rope"}
GEMMA_LIKE = LLAMA_LIKE | {"norm_offset": True, "embedding_scale": True}
BIASES = Field("attention_bias", ("qkv_bias", "output_bias"), False)
BUFFERS = ("rotary_emb.inv_freq",)
GEMMA_ACT = Field(
    "hidden_activation",
    ("activation",),
    "gelu_pytorch_tanh",
    also=("hidden_act",),
    names=ACTIVATION_NAMES,
)
CAUSAL = {"use_bidirectional_attention": (False, None)}
ROUTER = (
    Field("num_experts_per_tok", ("experts_per_token",)),
    Field("router_aux_loss_coef", ("router_aux_coef",), 0.001),
)


def _gemma_fields(*more: Field) -> tuple[Field, ...]:
    return _fields(BIASES, *more, head_dim=256, activation=GEMMA_ACT, tied=True)


QUERY_SCALE = Field("query_pre_attn_scalar", ("query_scale",), 256)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architectures=_classes("Llama"),
        constants=LLAMA_LIKE,
        fields=_fields(BIASES, Field("mlp_bias", ("mlp_bias",), False), kv_heads=None),
        parts=(Rope(),),
        tensors=_tensors(),
        harmless=frozenset({"pretraining_tp"}),  # equal maths, computed in slices
        prefix="model.",
        buffers=BUFFERS,
    ),
    "mistral": Family(
        architectures=_classes("Mistral"),
        constants=LLAMA_LIKE,
        fields=_fields(),
        parts=(Rope(), Windows(default=4096)),
        tensors=_tensors(),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "qwen2": Family(
        architectures=_classes("Qwen2"),
        constants=LLAMA_LIKE | {"qkv_bias": True},
        fields=_fields(),
        parts=(Rope(), Windows(default=4096, switch=True, layers="late")),
        tensors=_tensors(),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "qwen3": Family(
        architectures=_classes("Qwen3"),
        constants=LLAMA_LIKE | {"qk_norm": "head"},
        fields=_fields(BIASES, head_dim=128),
        parts=(Rope(), Windows(default=4096, switch=True, layers="late")),
        tensors=_tensors(norms=NORMS | QK_NORMS),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "gemma": Family(
        architectures=_classes("Gemma"),
        constants=GEMMA_LIKE,
        fields=_gemma_fields(),
        parts=(Rope(),),
        tensors=_tensors(),
        must_be=CAUSAL,
        prefix="model.",
        buffers=BUFFERS,
    ),
    "gemma2": Family(
        architectures=_classes("Gemma2"),
        constants=GEMMA_LIKE | {"block": "both"},
        fields=_gemma_fields(
            QUERY_SCALE,
            Field("attn_logit_softcapping", ("attention_softcap",), 50.0, nullable=True),
            Field("final_logit_softcapping", ("logit_softcap",), 30.0, nullable=True),
        ),
        parts=(Rope(), Windows(default=4096, layers="pattern", every=2)),
        tensors=_tensors(norms=BOTH_NORMS),
        must_be=CAUSAL,
        harmless=frozenset({"cache_implementation"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "gemma3_text": Family(
        architectures=_classes("Gemma3Text", lm="Gemma3"),
        constants=GEMMA_LIKE | {"block": "both", "qk_norm": "head"},
        fields=_gemma_fields(
            QUERY_SCALE, Field("final_logit_softcapping", ("logit_softcap",), None)
        ),
        parts=(
            Rope(theta=1_000_000.0, window_theta=10000.0),
            Windows(default=4096, layers="pattern", every=6),
        ),
        tensors=_tensors(norms=BOTH_NORMS | QK_NORMS),
        # transformers has the field, and does not use it.
        must_be=CAUSAL | {"attn_logit_softcapping": (None,)},
        harmless=frozenset({"cache_implementation"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "phi3": Family(
        architectures=_classes("Phi3"),
        constants=LLAMA_LIKE,
        fields=_fields(kv_heads=None, eps=1e-5),
        parts=(Rope(fraction_name="partial_rotary_factor", bare_longrope=True), Windows()),
        tensors=_tensors(
            Tensor(
                f"{LAYER}self_attn.qkv_proj.weight",
                tuple(f"layers/attention/{name}/kernel" for name in "qkv"),
                True,
            ),
            Tensor(
                f"{LAYER}mlp.gate_up_proj.weight",
                ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"),
                True,
            ),
            projections={"self_attn.o_proj": "attention/o", "mlp.down_proj": "mlp/down"},
        ),
        harmless=frozenset({"resid_pdrop", "embd_pdrop"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "olmo2": Family(
        architectures=_classes("Olmo2"),
        constants=LLAMA_LIKE | {"block": "post", "qk_norm": "all"},
        fields=_fields(BIASES, kv_heads=None, eps=1e-5),
        parts=(Rope(),),
        tensors=_tensors(norms=POST_NORMS | QK_NORMS),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "smollm3": Family(
        architectures=_classes("SmolLM3"),
        constants=LLAMA_LIKE,
        fields=_fields(BIASES, Field("mlp_bias", ("mlp_bias",), False), tied=True),
        parts=(Rope(theta=2_000_000.0), RopeLayers(), Windows(switch=True, layers="unrotated")),
        tensors=_tensors(),
        harmless=frozenset({"pretraining_tp"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "mixtral": Family(
        architectures=_classes("Mixtral"),
        constants=LLAMA_LIKE | {"renormalize_experts": True},
        fields=_fields(
            Field("num_local_experts", ("num_experts",), also=("num_experts",)),
            *ROUTER,
            eps=1e-5,
        ),
        parts=(Rope(theta=1_000_000.0), Windows()),
        tensors=_tensors(
            *_experts("block_sparse_moe", "gate", "w1", "w3", "w2"), projections=ATTENTION
        ),
        must_be={"router_jitter_noise": (0, None)},
        harmless=frozenset({"output_router_logits"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "qwen3_moe": Family(
        architectures=_classes("Qwen3Moe"),
        constants=LLAMA_LIKE | {"qk_norm": "head"},
        fields=_fields(
            BIASES,
            Field("num_experts", ("num_experts",), also=("num_local_experts",)),
            Field("norm_topk_prob", ("renormalize_experts",), False),
            *ROUTER,
            mlp_dim="moe_intermediate_size",
        ),
        parts=(Rope(), Windows(default=4096, switch=True)),
        tensors=_tensors(
            *_experts("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
            projections=ATTENTION,
            norms=NORMS | QK_NORMS,
        ),
        must_be={"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)},
        # The width of layers without experts, of which there are none.
        harmless=frozenset({"output_router_logits", "intermediate_size"}),
        prefix="model.",
        buffers=BUFFERS,
    ),
    "gpt_neox": Family(
        architectures=_classes("GPTNeoX"),
        constants={"norm": "layer", "gated_mlp": False, "position": "rope", "mlp_bias": True},
        fields=(
            Field("vocab_size", ("vocab_size",)),
            Field("hidden_size", ("hidden_size",)),
            Field("num_hidden_layers", ("num_layers",)),
            Field("num_attention_heads", ("num_heads",)),
            Field("intermediate_size", ("mlp_dim",)),
            Field("layer_norm_eps", ("norm_eps",), 1e-5),
            Field("hidden_act", ("activation",), "gelu", names=ACTIVATION_NAMES),
            Field("max_position_embeddings", ("max_positions",), 2048),
            Field("tie_word_embeddings", ("tie_embeddings",), False),
            Field("attention_bias", ("qkv_bias", "output_bias"), True),
            Field(
                "use_parallel_residual", ("block",), True, names={True: "parallel", False: "pre"}
            ),
        ),
        parts=(Rope(theta_name="rotary_emb_base", fraction=0.25, fraction_name="rotary_pct"),),
        tensors=(
            Tensor("gpt_neox.embed_in.weight", ("embed/embedding",)),
            Tensor(
                "gpt_neox.layers.{layer}.attention.query_key_value.weight",
                tuple(f"layers/attention/{name}/kernel" for name in "qkv"),
                transpose=True,
                by_head=True,
            ),
            Tensor(
                "gpt_neox.layers.{layer}.attention.query_key_value.bias",
                tuple(f"layers/attention/{name}/bias" for name in "qkv"),
                by_head=True,
            ),
            *_bias_and("gpt_neox.layers.{layer}.attention.dense", "attention/o", True),
            *_bias_and("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "mlp/up", True),
            *_bias_and("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "mlp/down", True),
            *_bias_and("gpt_neox.layers.{layer}.input_layernorm", "attention_norm", False, "scale"),
            *_bias_and(
                "gpt_neox.layers.{layer}.post_attention_layernorm", "mlp_norm", False, "scale"
            ),
            Tensor("gpt_neox.final_layer_norm.weight", ("final_norm/scale",)),
            Tensor("gpt_neox.final_layer_norm.bias", ("final_norm/bias",)),
            Tensor("embed_out.weight", ("lm_head/kernel",), True, also=("lm_head.weight",)),
            Tensor("score.weight", ("score/kernel",), True),
        ),
        harmless=frozenset({"hidden_dropout", "classifier_dropout"}),
        prefix="gpt_neox.",
        buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
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
