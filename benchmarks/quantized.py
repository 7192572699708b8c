# SPDX-License-Identifier: Apache-2.0
"""What quantizing a base saves and costs: `python benchmarks/quantized.py --help`.

Two measurements, each run in a process of its own:

- memory: steps of SFT with LoRA on a model of the true shape of Qwen2.5-0.5B with random weights
  (bfloat16; made in a folder on the first call). Loss of each step, seconds of the last, bytes of
  the frozen base, and the most memory that was the process's own (files that are mapped left out).
- quality, with --model and --data: some steps of SFT with LoRA on a real model; held-out loss
  before and after.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

FORMATS = (None, "int8", "int4", "nf4")


def shape() -> Any:
    """Qwen2.5-0.5B."""
    from jaxrlhf.models.config import ModelConfig

    return ModelConfig(
        family="qwen2",
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        mlp_dim=4864,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=32768,
        qkv_bias=True,
        tie_embeddings=True,
    )


def make_model(folder: Path, layers: int | None) -> None:
    """A folder with random weights, and the embedded world's texts and tokenizer beside it."""
    import dataclasses

    import jax

    from jaxrlhf.data.synthetic import World
    from jaxrlhf.models.transformer import init_params
    from jaxrlhf.models.weights import save_hf

    config = shape()
    if layers:
        config = dataclasses.replace(config, num_layers=layers, vocab_size=1024)
    world = folder / "world"
    World(0, vocab_size=400).write(
        world, pretraining=1, demonstrations=64, prompts_train=1, prompts_eval=1
    )
    init = jax.jit(lambda key: init_params(key, config, param_dtype="bfloat16"))
    save_hf(folder / "model", init(jax.random.key(0)), config)


class OwnMemory(threading.Thread):
    """The most memory of this process that maps no file, sampled 50 times a second, MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        while True:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.peak = max(self.peak, int(found[1]) * 1024 / 1e6 if found else 0.0)
            time.sleep(0.02)


def one_run(settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """A stage in this process: what it wrote down and what it held."""
    from jaxrlhf import api
    from jaxrlhf.stages import training

    memory, sizes = OwnMemory(), {}
    run = training._run

    def watched(command: str, config: Any, recipe: Any, *more: Any) -> Any:
        sizes["frozen_mb"] = round(training.size_of(recipe.frozen) / 1e6, 1)
        sizes["loaded_mb"] = round(memory.peak, 1)
        return run(command, config, recipe, *more)

    training._run = watched
    memory.start()
    result = api.stage("sft", output=output, resume="never", **settings)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    return {
        **sizes,
        "peak_mb": round(memory.peak, 1),
        "losses": [round(line["loss"], 5) for line in steps][:4],
        "step_seconds": round(min(line["time/step_seconds"] for line in steps), 3),
        "held_out": [[line["step"], round(line["nats_per_token"], 4)] for line in held_out],
    }


def measured(kind: str, name: str | None, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """`one_run` in a process of its own."""
    output = work / f"{kind}-{name or 'none'}"
    given = settings | {"model.quantize": name}
    command = [sys.executable, __file__, "--one", json.dumps(given), "--work", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} {name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {name or 'as it is'}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model and runs")
    parser.add_argument("--out", type=Path, help="the JSON file written")
    parser.add_argument("--formats", nargs="+", default=[str(f) for f in FORMATS])
    parser.add_argument("--layers", type=int, help="a smaller model, to try it out")
    parser.add_argument("--model", help="a real model, for the measurement of quality")
    parser.add_argument("--data", help="rows it learns from")
    parser.add_argument("--steps", type=int, default=50, help="of the measurement of quality")
    parser.add_argument("--conditions", default="", help="what else the machine did; kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one_run(json.loads(given.one), given.work)))
        return
    formats = [None if name == "None" else name for name in given.formats]
    if not (given.work / "model" / "config.json").is_file():
        make_model(given.work, given.layers)
    lora = {"model.lora.rank": 16, "train.steps": 2, "train.batch_size": 2}
    memory = lora | {
        "model": str(given.work / "model"),
        "model.tokenizer": str(given.work / "world" / "tokenizer"),
        "model.dtype": "bfloat16",
        "data.train": str(given.work / "world" / "demonstrations.jsonl"),
        "data.max_length": 64,
        "data.truncation": "drop",
        "optim.learning_rate": 1e-3,
        "optim.schedule": "constant",
    }
    import jax

    found: dict[str, Any] = {
        "conditions": given.conditions,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "memory": {str(f): measured("memory", f, memory, given.work) for f in formats},
    }
    if given.model:
        quality = lora | {
            "model": given.model,
            "data.train": given.data,
            "data.max_length": 256,
            "data.truncation": "drop",
            "data.eval_fraction": 0.01,
            "train.steps": given.steps,
            "train.batch_size": 8,
            "train.eval_every": given.steps,
            "model.unroll": 1,
            "optim.learning_rate": 1e-2,
        }
        found["quality"] = {str(f): measured("quality", f, quality, given.work) for f in formats}
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
