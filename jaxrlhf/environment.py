# SPDX-License-Identifier: Apache-2.0
"""Where a run happens: versions, devices, commit; for bug reports and environment.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "jaxrlhf",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "datasets",
    "grain",
    "numpy",
    "pydantic",
    "safetensors",
    "torch",
)
# Settings from outside that change what is computed or where.
VARIABLES = re.compile(r"(JAX|XLA|JAXRLHF|HF|TPU|CUDA|GLIBC|LIBTPU|WANDB|OMP)_\w+")
SECRET = re.compile(r"(?i)(token|key|secret|passw|credential|auth|cookie)")
REDACTED = "(hidden)"


def redact(text: str) -> str:
    """The text without the values of secret variables and without `user:password@` of addresses."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, REDACTED)
    return re.sub(r"(\w+://)[^/\s:@]+:[^/\s@]+@", rf"\1{REDACTED}@", text)


def versions() -> dict[str, str]:
    """{package: version} of what is installed, without importing it."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this checkout, with `+changes`; None where it is no checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if head and git("status", "--porcelain", "-uno") else "") or None
    except (OSError, subprocess.SubprocessError):
        return None


def devices() -> dict[str, Any]:
    """What jax computes on; imports jax. A backend that does not start is reported, not raised."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        return {"error": redact(str(error).splitlines()[0])}
    kinds = sorted({device.device_kind for device in found})
    return {
        "platform": found[0].platform,
        "kind": ", ".join(kinds),
        "count": len(found),
        "processes": jax.process_count(),
    }


def describe() -> dict[str, Any]:
    """Everything, ready for json; secrets are hidden by name and by value."""
    variables = {
        name: REDACTED if SECRET.search(name) else redact(value)
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    }
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "versions": versions(),
        "devices": devices(),
        "commit": commit(),
        "variables": variables,
        "command": redact(" ".join(sys.argv)),
    }


def text(found: dict[str, Any]) -> str:
    """`describe()` as aligned lines."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines.append(f"{key}:" + ("" if value else " none"))
            width = max((len(name) for name in value), default=0)
            lines += [f"  {name:<{width}}  {inner}" for name, inner in value.items()]
        else:
            lines.append(f"{key}: {'unknown' if value is None else value}")
    return "\n".join(lines)
