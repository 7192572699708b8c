#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures every model family against transformers on torch, and writes README's table of them.

    python scripts/family_table.py            # prints it
    python scripts/family_table.py --write    # puts it into README.md

Each entry is the largest difference of a logit over the variants of the family in
tests/models/make_oracles.py (random weights, logits of some units). Needs the parity extra.
"""

import argparse
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models"), str(ROOT / "tests")]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from make_oracles import CASES, inputs, make_model  # noqa: E402
from model_rows import RUNTIME, batch, logits  # noqa: E402

from jaxrlhf.models import heads  # noqa: E402
from jaxrlhf.models.families import FAMILIES  # noqa: E402
from jaxrlhf.models.transformer import (  # noqa: E402
    abstract_params,
    decode_step,
    hidden_states,
    logical_axes,
    prefill,
)
from jaxrlhf.models.weights import load_hf, save_hf  # noqa: E402
from jaxrlhf.parallel.compiling import jit  # noqa: E402
from jaxrlhf.parallel.mesh import make_mesh  # noqa: E402
from jaxrlhf.parallel.rules import shardings  # noqa: E402

COLUMNS = {
    "import": "its model, read by us",
    "export": "ours, read by transformers",
    "left-pad": "its left-padded batch",
    "cache": "cached steps against whole rows",
    "sharded": "8 devices against one",
    "bf16": "activations in bfloat16",
}
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"


def rows_apart(got: Any, want: Any, rows: list[list[int]]) -> float:
    """Largest difference on real tokens; both [B, T, V], right-padded."""
    pairs = zip(np.asarray(got, np.float32), np.asarray(want, np.float32), rows, strict=True)
    return max(float(np.abs(a[: len(r)] - b[: len(r)]).max()) for a, b, r in pairs)


def theirs_alone(model: Any, rows: list[list[int]], width: int) -> np.ndarray:
    """Logits [B, T, V] of each row alone, the shortest first (see make_oracles.expected)."""
    import torch

    out: list[Any] = [None] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        with torch.no_grad():
            found = model(torch.tensor([rows[i]])).logits[0].numpy()
        out[i] = np.pad(found, ((0, width - len(found)), (0, 0)))
    return np.stack(out)


def cached(params: Any, config: Any, rows: list[list[int]], count: int) -> tuple[Any, Any]:
    """(logits of the last `count` tokens of each row through the cache, how long prompts were)."""
    prompts = [row[: len(row) - count] for row in rows]
    tokens, positions, segments = batch(prompts)
    width = tokens.shape[1]
    lengths = np.array([len(prompt) for prompt in prompts])
    columns = jnp.arange(width + count)
    mask = (columns < lengths[:, None]) | (columns >= width)
    _, cache = prefill(params, config, RUNTIME, tokens, positions, segments, width + count)
    step = jax.jit(decode_step, static_argnums=(1, 2))
    found = []
    for t in range(count):
        token = jnp.array([row[n + t] for row, n in zip(rows, lengths, strict=True)])
        state, cache = step(
            params, config, RUNTIME, token, jnp.asarray(lengths + t), cache, width + t, mask
        )
        found.append(heads.logits(params, config, state))
    return np.stack(found, 1), lengths


def measure(name: str) -> dict[str, float]:
    """All columns of one variant."""
    import torch
    import transformers

    model, rows = make_model(name), inputs(seed=5)
    ours_right = batch(rows)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = load_hf(folder, kind="lm")
        params, config = ours.params, ours.config
        whole = np.asarray(logits(params, config, RUNTIME, *ours_right))
        width = whole.shape[1]
        found["import"] = rows_apart(whole, theirs_alone(model, rows, width), rows)

        save_hf(f"{folder}/ours", params, config, hf_config=ours.hf_config)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/ours", attn_implementation="eager"
        )
        found["export"] = rows_apart(whole, theirs_alone(again, rows, width), rows)
    if config.rope_limit is None:  # else the longest row of its batch decides for all
        tokens, positions, segments = map(torch.tensor, batch(rows, left=True))
        with torch.no_grad():
            left = model(
                input_ids=tokens.long(),
                attention_mask=segments.long(),
                position_ids=positions.long(),
            ).logits.numpy()
        right = [np.roll(left[i], -(width - len(row)), axis=0) for i, row in enumerate(rows)]
        found["left-pad"] = rows_apart(whole, right, rows)

    short = [row[: config.rope_limit] for row in rows]
    steps, lengths = cached(params, config, short, 3)
    found["cache"] = max(
        float(np.abs(steps[i] - _of(params, config, row)[n : n + 3]).max())
        for i, (row, n) in enumerate(zip(short, lengths, strict=True))
    )
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    where, _ = shardings(logical_axes(config), abstract_params(config), mesh)
    placed = jax.tree.map(jax.device_put, params, where)

    def spread(tree, *arrays):
        return heads.logits(tree, config, hidden_states(tree, config, RUNTIME, *arrays))

    even = tuple(np.concatenate([x, x[:1]]) for x in ours_right)  # rows that the mesh divides
    found["sharded"] = rows_apart(jit(spread, mesh)(placed, *even)[:-1], whole, rows)
    low = logits(params, config, replace(RUNTIME, dtype="bfloat16"), *ours_right)
    found["bf16"] = rows_apart(low, whole, rows)
    return found


def _of(params: Any, config: Any, row: list[int]) -> np.ndarray:
    return np.asarray(logits(params, config, RUNTIME, *batch([row]))[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    write = parser.parse_args().write
    lines = [
        f"| `model_type` | variants | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for family in sorted(FAMILIES):
        names = [n for n, (kind, use, _) in CASES.items() if kind == family and use == "lm"]
        found = [measure(name) for name in names]
        worst = (max(each[c] for each in found if c in each) for c in COLUMNS)
        lines.append(f"| {family} | {len(names)} | " + " | ".join(f"{x:.0e}" for x in worst) + " |")
        print(lines[-1], flush=True)
    means = "; ".join(f"{name}: {text}" for name, text in COLUMNS.items())
    table = "\n".join(lines) + f"\n\n{means[0].upper()}{means[1:]}.\n"
    if write:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        text = re.sub(pattern, lambda _: BEGIN + table + END, text, count=1, flags=re.S)
        readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
