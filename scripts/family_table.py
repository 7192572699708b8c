#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures every model family against transformers and PEFT on torch.

    python scripts/family_table.py                    # prints what it finds
    python scripts/family_table.py --write            # for `jaxrlhf env --models` and README.md
    python scripts/family_table.py --write llama phi3 # these anew, the others as they are

Each figure is the largest difference of a logit over the variants of the family in
tests/models/make_oracles.py (random weights, logits of some units). Needs the parity extra.
"""

import argparse
import importlib.metadata
import json
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
from jaxrlhf.models.adapters.peft import save_adapter  # noqa: E402
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve  # noqa: E402
from jaxrlhf.models.adapters.trees import join  # noqa: E402
from jaxrlhf.models.families import FAMILIES, verified  # noqa: E402
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
        found["PEFT"] = with_peft(again, params, config, rows, folder)
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


def with_peft(model: Any, params: Any, config: Any, rows: list[list[int]], folder: str) -> float:
    """A LoRA of ours on every projection, with weights that change much, read by PEFT."""
    import peft

    adapter = resolve(AdapterSpec(rank=3, alpha=5), config)
    leaves = init_adapter(jax.random.key(0), adapter, params, "float32")
    rng = np.random.default_rng(0)

    def move(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    whole = join(jax.tree_util.tree_map_with_path(move, leaves), params)
    save_adapter(Path(folder) / "adapter", whole, adapter, config, kind="lm", base=f"{folder}/ours")
    theirs = peft.PeftModel.from_pretrained(model, f"{folder}/adapter")
    got = np.asarray(logits(whole, config, RUNTIME, *batch(rows)))
    return rows_apart(got, theirs_alone(theirs, rows, got.shape[1]), rows)


def _of(params: Any, config: Any, row: list[int]) -> np.ndarray:
    return np.asarray(logits(params, config, RUNTIME, *batch([row]))[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="these only; none = all")
    parser.add_argument("--write", action="store_true", help="keep them, and renew README's table")
    given = parser.parse_args()
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    for family in sorted(given.families or FAMILIES):
        names = [n for n, (kind, use, _) in CASES.items() if kind == family and use == "lm"]
        found = [measure(name) for name in names]
        worst = {
            column: float(f"{max(each[column] for each in found if column in each):.2g}")
            for column in verified.COLUMNS
            if any(column in each for each in found)
        }
        print(family, len(names), worst, flush=True)
        if given.write:
            keep(family, {"variants": len(names), **worst})
    return 0


def keep(family: str, values: dict[str, Any]) -> None:
    """One family's figures into the file of figures, and README's table made from it again."""
    kept = verified.figures() if verified.FILE.exists() else {"families": {}}
    packages = ("jax", "torch", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    families = {k: v for k, v in kept["families"].items() if k in FAMILIES} | {family: values}
    text = json.dumps({"versions": versions, "families": families}, indent=1, sort_keys=True)
    verified.FILE.write_text(text + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    whole = readme.read_text(encoding="utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    table = BEGIN + verified.markdown() + END
    readme.write_text(re.sub(pattern, lambda _: table, whole, count=1, flags=re.S), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
