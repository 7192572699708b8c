# SPDX-License-Identifier: Apache-2.0
"""`model.*`: which model, and how it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import (
    DType,
    ModelName,
    Positive,
    PositiveFloat,
    Rate,
    Section,
    as_list,
)


class Architecture(Section):
    """A model with fresh random weights; sizes left out follow from the others."""

    family: Literal["llama", "gpt2"] = Field(default="llama", description="which family of decoder")
    hidden_size: Positive = Field(default=128, description="width of the residual stream")
    num_layers: Positive = Field(default=2, description="decoder layers")
    num_heads: Positive = Field(default=4, description="query heads")
    num_kv_heads: Positive | None = Field(
        default=None, description="key/value heads; null = num_heads"
    )
    head_dim: Positive | None = Field(default=None, description="null = hidden_size / num_heads")
    mlp_dim: Positive | None = Field(
        default=None,
        description="width of the MLP; null = 4 x hidden_size (gpt2), 8/3 of it (llama)",
    )
    vocab_size: Positive | None = Field(default=None, description="null = the tokenizer's")
    max_positions: Positive = Field(default=1024, description="longest row, tokens")
    rope_theta: PositiveFloat = Field(
        default=10000.0, description="base of the rotary angles (llama)"
    )
    tie_embeddings: bool = Field(
        default=True, description="the output head is the embedding, transposed"
    )

    def contradictions(self) -> Iterator[str]:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            yield (
                f"hidden_size = {self.hidden_size} must be a multiple of num_heads = "
                f"{self.num_heads} (or give head_dim)"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield (
                f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )


Names = Annotated[list[str], BeforeValidator(as_list)]


class AdapterSection(Section):
    """Few new weights that train in the place of the model's own, which stay as they are.

    lora: rank r matrices beside the model's (arXiv:2106.09685); dora: with magnitudes of their
    own (arXiv:2402.09353); ia3: one vector each (arXiv:2205.05638); soft_prompt: embeddings in
    front of every text (arXiv:2104.08691); prefix: keys and values there, in every layer
    (arXiv:2101.00190); bottleneck: narrow mlps after attention and mlp (arXiv:1902.00751).
    `model.lora` is short for `model.adapter`.
    """

    # Of which kinds a setting is, where not of all.
    only_of: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(
            ("rank", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern"),
            ("lora", "dora"),
        ),
        **dict.fromkeys(("targets", "modules_to_save"), ("lora", "dora", "ia3", "bottleneck")),
        **dict.fromkeys(("virtual_tokens", "init_text"), ("soft_prompt", "prefix")),
        "width": ("bottleneck",),
    }

    kind: Literal["lora", "dora", "ia3", "soft_prompt", "prefix", "bottleneck"] = Field(
        default="lora", description="what is added"
    )
    rank: Positive = Field(default=16, description="lora, dora: r, the rank of what is added")
    alpha: PositiveFloat | None = Field(
        default=None, description="lora, dora: what is added counts alpha / r; null = 2 r"
    )
    targets: Names = Field(
        default_factory=list,
        description="projections, by our name (q) or transformers' (q_proj); all-linear = every "
        "one but heads and experts; experts = those of a mixture (lora); [] = all-linear, for ia3 "
        "k, v and down. bottleneck: attention, mlp; [] = both",
    )
    dropout: Rate = Field(
        default=0.0, description="lora, dora: share of their inputs left out while training"
    )
    rslora: bool = Field(
        default=False, description="lora, dora: alpha / sqrt(r) instead (arXiv:2312.03732)"
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict,
        description="other ranks, by name or regular expression, e.g. {o: 4, 'layers.0.*': 8}",
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="other values of alpha, likewise"
    )
    modules_to_save: Names = Field(
        default_factory=list,
        description="modules that train whole beside it; new heads always do",
    )
    virtual_tokens: Positive = Field(
        default=20, description="soft_prompt, prefix: how many stand in front of every text"
    )
    init_text: str | None = Field(
        default=None,
        description="soft_prompt, prefix: the text they start as, repeated or cut to "
        "virtual_tokens; null = tokens drawn from the vocabulary",
    )
    width: Positive = Field(default=64, description="bottleneck: numbers between down and up")

    def contradictions(self) -> Iterator[str]:
        for key, kinds in self.only_of.items():
            if self.kind in kinds or key not in self.model_fields_set:
                continue
            if getattr(self, key) != self.default_of(key):
                yield f"{key} is of {' and '.join(kinds)}: {self.kind} has none; leave it out"

    @classmethod
    def default_of(cls, key: str) -> object:
        """The default of a key."""
        return cls.model_fields[key].get_default(call_default_factory=True)


class ModelSection(Section):
    """`model: PATH` is short for `model.path: PATH`."""

    shorthand: ClassVar[str | None] = "path"

    path: ModelName | None = Field(
        default=None,
        description="a run directory (its best or last checkpoint), an HF folder or hub name",
    )
    base: ModelName | None = Field(
        default=None,
        description="where path is an adapter: its base; null = the one its adapter_config.json "
        "names",
    )
    tokenizer: ModelName | None = Field(
        default=None, description="a folder or hub name; null = the one beside the model"
    )
    add_tokens: Names = Field(
        default_factory=list,
        description="control tokens that the tokenizer is given where it lacks them, e.g. the turn "
        "markers of a chat template",
    )
    resize_embeddings: bool | Positive = Field(
        default=False,
        description="rows for tokens past the model's vocabulary, each the mean of the others; N = "
        "up to a multiple of N",
    )
    dtype: DType = Field(
        default="float32", description="what is computed in; frozen models are stored so"
    )
    param_dtype: DType = Field(default="float32", description="the master weights that train")
    quantize: Literal["nf4", "int8", "int4"] | None = Field(
        default=None,
        description="how frozen models keep the projections of their layers: four or eight bits "
        "instead of dtype; training then needs an adapter (QLoRA)",
    )
    remat: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, ~17 % slower",
    )
    unroll: Positive | Literal["all", "auto"] = Field(
        default="auto",
        description="layers per iteration of the scan over them; auto = all up to 8 layers, else 1",
    )
    attention_block: Positive = Field(
        default=64,
        description="query positions per block of causal attention (same result, other speed)",
    )
    logprob_chunk: Positive | None = Field(
        default=None,
        description="positions whose logits exist at a time; null = chosen by vocabulary size",
    )


class TrainedModelSection(ModelSection):
    """As above, and what of it trains."""

    synonyms: ClassVar[dict[str, str]] = {"lora": "adapter"}

    adapter: AdapterSection | None = Field(
        default=None, description="train an adapter; null = all parameters train"
    )

    def contradictions(self) -> Iterator[str]:
        if self.adapter is not None and self.resize_embeddings:
            yield (
                "resize_embeddings gives a model rows of its own, and an adapter leaves its base "
                "as it is: write the larger model first (jaxrlhf export with the same model.* "
                "keys), then adapt that"
            )


class FreshModelSection(TrainedModelSection):
    """As above, or a new model (`init`) instead of a path."""

    init: Architecture | None = Field(
        default=None, description="instead of path: a fresh model of this shape"
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.path is not None and self.init is not None:
            yield "path and init are both given: either load a model or start a new one"
        if self.init is not None and self.adapter is not None:
            yield "adapter changes a trained model, and init is a fresh one: leave one of them out"
