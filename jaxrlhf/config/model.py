# SPDX-License-Identifier: Apache-2.0
"""`model.*`: which model, and how it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import DType, ModelName, Positive, PositiveFloat, Section


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


class ModelSection(Section):
    """`model: PATH` is short for `model.path: PATH`."""

    shorthand: ClassVar[str | None] = "path"

    path: ModelName | None = Field(
        default=None,
        description="a run directory (its best or last checkpoint), an HF folder or hub name",
    )
    tokenizer: ModelName | None = Field(
        default=None, description="a folder or hub name; null = the one beside the model"
    )
    dtype: DType = Field(
        default="float32", description="what is computed in; frozen models are stored so"
    )
    param_dtype: DType = Field(default="float32", description="the master weights that train")
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


class FreshModelSection(ModelSection):
    """As above, or a new model (`init`) instead of a path."""

    init: Architecture | None = Field(
        default=None, description="instead of path: a fresh model of this shape"
    )

    def contradictions(self) -> Iterator[str]:
        if self.path is not None and self.init is not None:
            yield "path and init are both given: either load a model or start a new one"
