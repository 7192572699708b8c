# SPDX-License-Identifier: Apache-2.0
"""jaxrlhf: from a language model and feedback to an aligned model, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxrlhf.errors import CheckpointError, ConfigError, DataError, JaxrlhfError, ModelError

if TYPE_CHECKING:
    from jaxrlhf import losses as losses
    from jaxrlhf import ops as ops
    from jaxrlhf import sampling as sampling
    from jaxrlhf.api import dpo as dpo
    from jaxrlhf.api import evaluate as evaluate
    from jaxrlhf.api import export as export
    from jaxrlhf.api import generate as generate
    from jaxrlhf.api import load as load
    from jaxrlhf.api import ppo as ppo
    from jaxrlhf.api import pretrain as pretrain
    from jaxrlhf.api import reward as reward
    from jaxrlhf.api import run as run
    from jaxrlhf.api import score as score
    from jaxrlhf.api import sft as sft
    from jaxrlhf.api import stage as stage
    from jaxrlhf.api import write_report as write_report

COMMANDS = (
    "dpo",
    "evaluate",
    "export",
    "generate",
    "load",
    "ppo",
    "pretrain",
    "reward",
    "run",
    "score",
    "sft",
    "stage",
    "write_report",
)

# The maths, usable without any configuration: jaxrlhf.losses.preference.dpo(...).
PACKAGES = ("losses", "ops", "sampling")

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "JaxrlhfError",
    "ModelError",
    "dpo",
    "evaluate",
    "export",
    "generate",
    "load",
    "losses",
    "ops",
    "ppo",
    "pretrain",
    "reward",
    "run",
    "sampling",
    "score",
    "sft",
    "stage",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """The commands as functions, and the packages, imported when first used: `import jaxrlhf` costs
    nothing."""
    if name in COMMANDS:
        from jaxrlhf import api

        return getattr(api, name)
    if name in PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *COMMANDS, *PACKAGES})
