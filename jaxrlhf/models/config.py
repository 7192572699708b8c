# SPDX-License-Identifier: Apache-2.0
"""What a model is (`ModelConfig`) and how it is computed (`Runtime`); no jax here.

Both are frozen and hashable, so that a jitted function can take them as static arguments.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from jaxrlhf.errors import ModelError

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Position = Literal["rope", "learned"]
Block = Literal["pre", "post", "both", "parallel"]
QKNorm = Literal["none", "head", "all"]


def _closest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _choices(name: str, value: Any, choices: tuple) -> str | None:
    return None if value in choices else f"{name} = {value!r}: one of {', '.join(choices)}"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder, and nothing about training or hardware.

    Families (`models/families.py`) translate a Hugging Face config.json to these fields and back.
    Building one with values that contradict each other raises ModelError, all of them at once.
    """

    family: str = "llama"  # a key of models.families.FAMILIES
    vocab_size: int = 512  # V
    hidden_size: int = 256  # D
    num_layers: int = 4  # L
    num_heads: int = 4  # N, query heads
    num_kv_heads: int | None = None  # K, divides N; None = N
    head_dim: int | None = None  # H; None = D / N
    mlp_dim: int = 1024  # F
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False  # scales are stored as their difference from 1
    # Where norms stand: before attention and mlp, after them (before they are added), both, or
    # before two branches that read the same x and are added together.
    block: Block = "pre"
    qk_norm: QKNorm = "none"  # an RMS norm of q and of k: of every head, or of all heads as one
    activation: Activation = "silu"
    gated_mlp: bool = True  # act(x gate) * (x up), or act(x up)
    position: Position = "rope"
    rope_theta: float = 10000.0
    # () or (("factor", 8.0), ("rope_type", "linear"), ...): pairs, so that it can be hashed.
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    max_positions: int = 2048  # rows of a learned position table; advisory for rope
    rope_fraction: float = 1.0  # the part of every head that is rotated, from its start
    rope_layers: tuple[bool, ...] = ()  # which layers rotate; () = all
    window: int | None = None  # a token sees itself and the window - 1 before it
    window_layers: tuple[bool, ...] = ()  # which layers have the window; () = all
    window_rope_theta: float | None = None  # layers with the window rotate by this, unscaled
    query_scale: float | None = None  # scores are q k / sqrt(query_scale); None = H
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    logit_softcap: float | None = None  # the same for logits
    embedding_scale: bool = False  # embeddings are multiplied by sqrt(D)
    num_experts: int = 0  # E; 0 = one mlp for all tokens
    experts_per_token: int = 0
    renormalize_experts: bool = True  # the weights of a token's experts add up to 1
    router_aux_coef: float = 0.0  # weight of the load-balancing loss
    tie_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_heads, 1))
            if self.num_heads > 0 and self.hidden_size % self.num_heads:
                raise ModelError(
                    f"hidden_size = {self.hidden_size} is no multiple of num_heads = "
                    f"{self.num_heads}: state head_dim, or change one of the two"
                )
        if isinstance(self.rope_scaling, dict):
            pairs = {
                k: tuple(v) if isinstance(v, list) else v for k, v in self.rope_scaling.items()
            }
            object.__setattr__(self, "rope_scaling", tuple(sorted(pairs.items())))
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_positions",
        )
        problems = [
            f"{name} = {getattr(self, name)!r}: a positive integer"
            for name in sizes
            if not isinstance(getattr(self, name), int)
            or isinstance(getattr(self, name), bool)
            or getattr(self, name) < 1
        ]
        problems += filter(
            None,
            (
                _choices("norm", self.norm, ("rms", "layer")),
                _choices("activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu")),
                _choices("position", self.position, ("rope", "learned")),
                _choices("block", self.block, ("pre", "post", "both", "parallel")),
                _choices("qk_norm", self.qk_norm, ("none", "head", "all")),
            ),
        )
        problems += [
            f"{name} = {value!r}: a positive number or null"
            for name in (
                "window",
                "window_rope_theta",
                "query_scale",
                "attention_softcap",
                "logit_softcap",
            )
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        for name in ("rope_layers", "window_layers"):
            values = tuple(bool(value) for value in getattr(self, name))
            object.__setattr__(self, name, () if all(values) else values)
            if values and len(values) != self.num_layers:
                problems.append(f"{name} has {len(values)} entries, num_layers = {self.num_layers}")
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            problems.append(
                f"experts_per_token = {self.experts_per_token}: from 1 to num_experts = "
                f"{self.num_experts}"
            )
        if not 0 < self.rope_fraction <= 1:
            problems.append(f"rope_fraction = {self.rope_fraction!r}: more than 0, at most 1")
        if not problems and self.num_heads % self.kv_heads:
            problems.append(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
            )
        if (
            not problems
            and self.position == "rope"
            and (not self.rotary_dim or self.rotary_dim % 2)
        ):
            part = "" if self.rope_fraction == 1 else f" x rope_fraction = {self.rope_fraction}"
            problems.append(
                f"head_dim = {self.head_dim}{part}: rotary positions need an even head size"
            )
        if problems:
            raise ModelError("impossible model: " + "; ".join(problems))

    @property
    def kv_heads(self) -> int:
        """K as an int (never None once built)."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def head_size(self) -> int:
        """H as an int (never None once built)."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that are rotated."""
        return int(self.head_size * self.rope_fraction)

    @property
    def rope_limit(self) -> int | None:
        """Longest row that turns as fast as short ones do; None = all rows turn alike."""
        rope = dict(self.rope_scaling)
        if rope.get("rope_type") == "dynamic":
            return self.max_positions
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        return None

    @property
    def row_limit(self) -> int | None:
        """Longest row that can be sampled: up to the last learned position, or `rope_limit`."""
        return self.max_positions if self.position == "learned" else self.rope_limit

    def has_window(self, layer: int) -> bool:
        """Whether a layer sees only its window."""
        return self.window is not None and (not self.window_layers or self.window_layers[layer])

    @property
    def uniform(self) -> bool:
        """Whether every layer computes the same."""
        return not self.window_layers and not self.rope_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `ModelConfig.from_dict` gives back an equal config."""
        values = dataclasses.asdict(self)
        values["rope_scaling"] = dict(self.rope_scaling)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ModelError for a field that does not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := [f"{key}{_closest(key, known)}" for key in values if key not in known]:
            raise ModelError(f"unknown model field {', '.join(wrong)}; fields: {sorted(known)}")
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**found)


@dataclass(frozen=True)
class Runtime:
    """How a model is computed; nothing here changes what is computed, up to rounding.

    Args:
        dtype: of activations and matmul inputs; statistics (norms, softmax, losses) are float32.
        param_dtype: of the master weights; cast to `dtype` where they are used.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        unroll: layers unrolled per step of the scan over layers; True = all of them (faster for
            small models, slower to compile for deep ones).
        fuse: multiply by q, k, v (and gate, up) as one matrix, concatenated inside jit. Off when
            the tensor axis of the mesh is larger than 1, where it would move the shards.
        attention_block: queries per block of causal attention; a block never looks at the keys
            after it, so the masked half is not computed. 0 = no blocks.
        logprob_chunk: positions whose logits exist at the same time in a loss.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    unroll: int | bool = 1
    fuse: bool = True
    attention_block: int = 64
    logprob_chunk: int = 128

    def __post_init__(self):
        dtypes = ("float32", "bfloat16", "float16", "float64")
        problems = list(
            filter(
                None,
                (
                    _choices("dtype", self.dtype, dtypes),
                    _choices("param_dtype", self.param_dtype, dtypes),
                ),
            )
        )
        if self.unroll is not True and (self.unroll is False or self.unroll < 1):
            problems.append(f"unroll = {self.unroll!r}: a positive integer or true")
        if self.attention_block < 0 or self.logprob_chunk < 0:
            problems.append("attention_block and logprob_chunk: 0 or more")
        if problems:
            raise ModelError("impossible runtime: " + "; ".join(problems))
