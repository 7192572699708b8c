# SPDX-License-Identifier: Apache-2.0
"""Names in a Python file, read without running it: what it imports is not imported for them."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _body(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_bytes(), str(file)).body
    except (OSError, SyntaxError, ValueError):
        return []


def functions_of(file: str | Path) -> tuple[str, ...]:
    """The public functions at the top of a file, in order; none where it cannot be read."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in _body(Path(file)) if isinstance(node, kinds)]
    return tuple(name for name in names if not name.startswith("_"))


def keys_of(file: str, table: str) -> tuple[str, ...]:
    """The keys of a dict with that name at the top of a file of this package, e.g.
    `keys_of("ops/advantages.py", "ESTIMATORS")`."""
    for node in _body(PACKAGE / file):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == table and isinstance(value, ast.Dict):
            return tuple(str(key.value) for key in value.keys if isinstance(key, ast.Constant))
    return ()
