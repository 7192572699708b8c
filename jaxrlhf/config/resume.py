# SPDX-License-Identifier: Apache-2.0
"""What identifies a run's settings, and what may change when it is continued.

Each field carries its rule (`base.OnResume`): free fields do not touch what is computed, those of
the result only what comes of it, growing ones leave it a prefix (where nothing else depends on the
planned end), and fields that name content are compared by the content's own digest, so that a moved
folder is no change. Everything else refuses, with a diff.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jaxrlhf.config.base import Section
from jaxrlhf.config.load import dotted
from jaxrlhf.config.optim import OptimSection
from jaxrlhf.config.reward import is_function
from jaxrlhf.config.schema import Shape, nearest, walk
from jaxrlhf.errors import ConfigError

Verdict = Literal["free", "result", "grown", "allowed", "refused"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting that differs from the run's."""

    key: str
    old: Any
    new: Any
    verdict: Verdict
    why: str = ""  # it is refused, where that is not plain

    def __str__(self) -> str:
        because = f" ({self.why})" if self.why else ""
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}{because}"


def _shown(value: Any) -> str:
    return "not there" if value is MISSING else json.dumps(value, ensure_ascii=False, default=str)


MISSING = object()


def _identity(value: Any, shape: Shape) -> Any:
    """What is compared of a value: of content only that it is given, of a function its name."""
    if shape.where == "reward" and isinstance(value, str):
        if not is_function(value):
            return "a model"
        return Path(value).name  # its code is content, wherever the file lies
    if shape.resume == "content" and isinstance(value, str):
        return "given"
    return list(value) if isinstance(value, tuple) else value  # YAML knows lists only


def settings(config: Section) -> dict[str, tuple[Any, Shape]]:
    """{dotted key: (what is compared, shape)} of every leaf."""
    return {dotted(path): (_identity(value, shape), shape) for path, value, shape in walk(config)}


def digest(stage: str, config: Section) -> str:
    """SHA-256 of the settings that what a stage computes depends on, its inputs' content aside."""
    kept = {
        key: value for key, (value, shape) in settings(config).items() if shape.resume != "free"
    }
    text = json.dumps({"stage": stage, "settings": kept}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(old: Section, new: Section, allow: Iterable[str] = ()) -> list[Change]:
    """Every setting of `new` that differs from `old`; `allow` names keys whose change is wanted."""
    before, after = settings(old), settings(new)
    allowed = tuple(allow)
    found = []
    for key in [*before, *(k for k in after if k not in before)]:
        was, shape = before.get(key, (MISSING, None))
        now, newer = after.get(key, (MISSING, None))
        if was == now and type(was) is type(now):
            continue
        rule = (newer or shape or Shape("scalar", "")).resume
        verdict: Verdict = "refused"
        why = _no_prefix(key, new) if rule == "grow" and _larger(now, was) else None
        if rule == "free" or rule == "result":
            verdict = rule
        elif why == "":
            verdict = "grown"
        elif any(key == name or key.startswith(name + ".") for name in allowed):
            verdict = "allowed"
        found.append(Change(key, was, now, verdict, why or ""))
    return found


def _larger(now: Any, was: Any) -> bool:
    numbers = isinstance(now, int | float) and isinstance(was, int | float)
    return numbers and now > was


def _no_prefix(key: str, config: Section) -> str:
    """Why a longer run would not have begun as the shorter one did; "" where it would have."""
    optim = getattr(config, "optim", None)
    if isinstance(optim, OptimSection) and optim.schedule != "constant":
        return (
            f"optim.schedule = {optim.schedule} falls towards the planned end: the longer run's "
            "learning rates are others from the first step"
        )
    if isinstance(optim, OptimSection) and 0 < optim.warmup < 1:
        return (
            f"optim.warmup = {optim.warmup:g} is a share of all steps: the longer run's is longer"
        )
    if key == "train.epochs":
        return (
            "the last batch of the shorter run is filled up, where the longer one goes on with "
            "rows; give train.steps instead"
        )
    return ""


def check_resume(
    old: Section, new: Section, allow: Iterable[str] = (), run: str | Path = "the run"
) -> list[Change]:
    """The changes that are accepted; ConfigError with the diff if any is refused.

    A name in `allow` that is no key is an error too, so that a typo does not pass unseen.
    """
    allowed = tuple(allow)
    known = tuple(dict.fromkeys([*settings(old), *settings(new)]))
    for name in allowed:
        if not any(key == name or key.startswith(name + ".") for key in known):
            close = nearest(name, known, known)
            hint = f"; did you mean {close}?" if close else ""
            raise ConfigError(f"--allow-change {name}: unknown key{hint}")
    found = changes(old, new, allowed)
    if refused := [change for change in found if change.verdict == "refused"]:
        lines = "\n".join(f"  {change}" for change in refused)
        keys = " ".join(f"--allow-change {change.key}" for change in refused)
        raise ConfigError(
            f"{run} was started with other settings:\n{lines}\n"
            "continuing would mix two runs. Start anew in another folder (--output DIR), "
            f"or continue knowingly ({keys})"
        )
    return found
