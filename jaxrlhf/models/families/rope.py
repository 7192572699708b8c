# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in config.json, as transformers 4 and 5 spell them.

`rope_parameters` (5), or `rope_theta` and `rope_scaling` (4).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrlhf.models.config import ModelConfig

# rope_type -> (what it needs, what it may say besides)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
FRACTION = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"
LOCAL_THETA = "rope_local_base_freq"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Rope:
    """What rotates: theta, scaling, the rotated part of a head, a theta for layers with a window.

    Attributes:
        theta, fraction: what holds where config.json does not say.
        theta_name, fraction_name: what transformers 4 calls them; a fraction_name of None = all of
            a head rotates.
        window_theta: of layers with a window, where the family has such; None = it has none.
        bare_longrope: the family writes `rope_scaling` of longrope with its two lists alone, and
            the original length beside it; older names of longrope are read.
    """

    theta: float = 10000.0
    theta_name: str = "rope_theta"
    fraction: float = 1.0
    fraction_name: str | None = None
    window_theta: float | None = None
    bare_longrope: bool = False

    @property
    def known(self) -> frozenset[str]:
        names = {"rope_theta", "rope_scaling", "rope_parameters", self.theta_name}
        names |= {self.fraction_name, FRACTION} if self.fraction_name else set()
        names |= {LOCAL_THETA} if self.window_theta else set()
        names |= {ORIGINAL} if self.bare_longrope else set()
        return frozenset(names)

    def _standard(self, given: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
        """One spelling of what either generation writes, with what it leaves out."""
        rope = {key: value for key, value in given.items() if value is not None}
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if self.bare_longrope and rope["rope_type"] in ("su", "yarn"):
            rope["rope_type"] = "longrope"
        beside = hf.get(self.theta_name, hf.get("rope_theta"))
        rope.setdefault("rope_theta", self.theta if beside is None else beside)
        if self.fraction_name:
            fraction = hf.get(self.fraction_name, hf.get(FRACTION))
            rope.setdefault(FRACTION, self.fraction if fraction is None else fraction)
        elif rope.get(FRACTION) == 1:
            del rope[FRACTION]
        if ORIGINAL in KINDS.get(rope["rope_type"], ((), ()))[0]:
            beside = hf.get(ORIGINAL) or hf.get("max_position_embeddings")
            if beside is not None and rope["rope_type"] != "llama3":
                rope.setdefault(ORIGINAL, beside)
        return rope

    def read(self, hf: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        """rope_theta, rope_scaling, rope_fraction, window_rope_theta."""
        found: dict[str, dict[str, Any]] = {}
        for name in ("rope_parameters", "rope_scaling"):
            given = hf.get(name)
            if given is None:
                continue
            if not isinstance(given, Mapping):
                problems.append(f"{name} = {given!r}: an object or null")
                return
            if self.window_theta and "full_attention" in given:
                self._read_window(given.get("sliding_attention") or {}, values, problems)
                given = given["full_attention"] or {}
            found[name] = self._standard(given, hf)
        if self.window_theta:
            values.setdefault("window_rope_theta", hf.get(LOCAL_THETA) or self.window_theta)
        rope = next(iter(found.values())) if found else self._standard({}, hf)
        if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
            problems.append(
                f"rope_parameters = {hf['rope_parameters']} and rope_scaling = "
                f"{hf['rope_scaling']} disagree: keep the one that is true"
            )
        theta = hf.get(self.theta_name, hf.get("rope_theta"))
        if theta is not None and theta != rope["rope_theta"]:
            problems.append(
                f"{self.theta_name} = {theta} and rope_parameters.rope_theta = "
                f"{rope['rope_theta']} disagree"
            )
        self._take(rope, values, problems)

    def _read_window(
        self, given: Mapping[str, Any], values: dict[str, Any], problems: list[str]
    ) -> None:
        values["window_rope_theta"] = given.get("rope_theta") or self.window_theta
        others = {"rope_theta", "rope_type"}
        if given.get("rope_type", "default") != "default" or set(given) - others:
            problems.append(
                f"rope_parameters.sliding_attention = {dict(given)}: only rope_theta is read there"
            )

    def _take(self, rope: dict[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        kind = rope["rope_type"]
        if kind not in KINDS:
            problems.append(f"rope_type = {kind!r}: supported are {', '.join(sorted(KINDS))}")
            return
        needs, may = KINDS[kind]
        own = (
            ("rope_type", "rope_theta", FRACTION)
            if self.fraction_name
            else (
                "rope_type",
                "rope_theta",
            )
        )
        rest = {key: value for key, value in rope.items() if key not in own}
        wrong = []
        if missing := [key for key in needs if key not in rest]:
            wrong.append(f"rope_type {kind!r} lacks {', '.join(missing)}")
        if kind == "default":
            rest = {key: value for key, value in rest.items() if value not in (1, 1.0)}
        if unread := [key for key in rest if key not in (*needs, *may)]:
            wrong.append(f"rope field {', '.join(unread)} is not read with rope_type {kind!r}")
        theta, fraction = rope["rope_theta"], rope.get(FRACTION, 1.0)
        for key, value in {"rope_theta": theta, FRACTION: fraction, **rest}.items():
            if key == "truncate":
                good = isinstance(value, bool)
            elif key in ("short_factor", "long_factor"):
                good = isinstance(value, list) and bool(value) and all(map(_positive, value))
            else:
                good = _positive(value)
            if not good and key not in unread:
                wrong.append(f"{key} = {value!r}: a positive number")
        if not wrong and kind == "longrope":
            wrong += self._check_lengths(rest, fraction, values)
        problems += wrong
        if wrong:
            return
        values["rope_theta"], values["rope_fraction"] = float(theta), float(fraction)
        scaling = {
            key: tuple(value) if isinstance(value, list) else value for key, value in rest.items()
        }
        if kind != "default":
            values["rope_scaling"] = tuple(sorted({"rope_type": kind, **scaling}.items()))

    def _check_lengths(self, rest, fraction, values) -> list[str]:
        width, heads = values.get("hidden_size"), values.get("num_heads")
        size = values.get("head_dim")
        if size is None and isinstance(width, int) and isinstance(heads, int) and heads:
            size = width // heads
        if not isinstance(size, int):
            return []
        pairs = int(size * fraction) // 2
        return [
            f"{key} has {len(rest[key])} numbers, a head has {pairs} rotated pairs"
            for key in ("short_factor", "long_factor")
            if len(rest[key]) != pairs
        ]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Both spellings."""
        scaling = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in config.rope_scaling
        }
        full = {"rope_theta": config.rope_theta, "rope_type": "default", **scaling}
        hf: dict[str, Any] = {self.theta_name: config.rope_theta}
        if self.fraction_name:
            full[FRACTION] = hf[self.fraction_name] = config.rope_fraction
        old = scaling or None
        if self.bare_longrope:
            hf[ORIGINAL] = scaling.get(ORIGINAL, config.max_positions)
            lists = ("short_factor", "long_factor", ORIGINAL, "rope_type")
            if scaling and set(scaling) == set(lists):
                old = {"type": "longrope", **{key: scaling[key] for key in lists[:2]}}
        hf |= {"rope_scaling": old, "rope_parameters": full}
        if self.window_theta:
            near = {"rope_theta": config.window_rope_theta, "rope_type": "default"}
            hf["rope_parameters"] = {"full_attention": full, "sliding_attention": near}
            hf[LOCAL_THETA] = config.window_rope_theta
        return hf
