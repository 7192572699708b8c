# SPDX-License-Identifier: Apache-2.0
"""Reward functions: any Python callable named in a configuration, called as TRL calls them.

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]

`columns` holds the other columns of the prompt's row, one list a column. What comes back is checked
value by value: a reward that is missing or not finite stops the run and names its sample, since a
silent 0 would be learnt from.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from jaxrlhf.errors import ConfigError, JaxrlhfError

RewardFunction = Callable[..., Sequence[float]]


def load_function(source: str) -> RewardFunction:
    """The callable of `package.module:function` or `path/to/file.py:function`.

    Raises:
        ConfigError: no such module, file or function, or it cannot be called.
    """
    place, _, name = source.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser().resolve()
            if not path.is_file():
                raise ConfigError(f"reward {source}: there is no file {path}")
            module = _script(path) or _run_file(path)
        else:
            module = importlib.import_module(place)
    except ImportError as error:
        raise ConfigError(f"reward {source}: {place} cannot be imported: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's file can raise
        what = f"{type(error).__name__}: {error}{where_raised(error, place)}"
        raise ConfigError(f"reward {source}: {place} cannot be read: {what}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        found = [n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])]
        raise ConfigError(
            f"reward {source}: {place} has no function {name!r}; it has {', '.join(found[:12])}"
        )
    return cast(RewardFunction, function)


def _script(path: Path) -> ModuleType | None:
    """The script that Python was started with, if it is this file: run once more, it would begin
    the same run again."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    return main if file is not None and Path(file).resolve() == path else None


def _run_file(path: Path) -> ModuleType:
    name = f"jaxrlhf_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def where_raised(error: Exception, file: str | None) -> str:
    """` (file:line)` of the innermost frame of an error that lies in the file, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(file).expanduser().resolve() if file else None
    own = [frame for frame in frames if Path(frame.filename).resolve() == path]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def call_reward(
    function: RewardFunction,
    label: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence],
) -> np.ndarray:
    """Rewards of completions, float32 [B]: exactly one number each, finite in float32.

    Raises:
        JaxrlhfError: the function raised, or returned something else; names function and sample.
    """
    try:
        values = list(function(prompts=list(prompts), completions=list(completions), **columns))
    except Exception as error:
        code = getattr(inspect.unwrap(function), "__code__", None)
        place = where_raised(error, code and code.co_filename)
        raise JaxrlhfError(
            f"reward function {label} raised {type(error).__name__}: {error}{place}"
        ) from error
    if len(values) != len(completions):
        raise JaxrlhfError(
            f"reward function {label} returned {len(values)} values for {len(completions)} "
            "completions; it must return one float for each"
        )
    scores = np.full(len(values), np.nan, np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        for i, value in enumerate(values):
            with contextlib.suppress(TypeError, ValueError):
                scores[i] = float(value)
    check_scores(f"reward function {label}", scores, prompts, completions, values)
    return scores


def check_scores(
    scorer: str,
    scores: np.ndarray,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    returned: Sequence[Any] | None = None,
) -> None:
    """Refuses scores [B] that are not finite; a silent 0 or NaN would be learnt from.

    Args:
        returned: what each score was before it became float32, if not what it is.

    Raises:
        JaxrlhfError: names the scorer and the first such sample.
    """
    wrong = ~np.isfinite(scores)
    if not wrong.any():
        return
    i = int(wrong.argmax())
    value = float(scores[i]) if returned is None else returned[i]
    raise JaxrlhfError(
        f"{scorer} returned {value!r} for sample {i}: a finite number is needed, in float32. "
        f"Prompt {prompts[i][:80]!r}, completion {completions[i][:80]!r}"
    )
