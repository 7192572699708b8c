# SPDX-License-Identifier: Apache-2.0
"""Model folders of true shapes to ready arrays: time and host memory. `--help` says how.

Folders of random bfloat16 weights are written tensor by tensor; then each case loads one in a
process of its own, while the parent reads its /proc/PID/status every 2 ms (a thread inside would
wait for Python's lock just when memory peaks). Memory is RssAnon above what the process held before
it began: mapped pages of files are the page cache's and not counted, peak_rss_mb has them.

    excess = peak of RssAnon above the start - bytes of the loaded arrays
    bound  = 1.1 x bytes of the largest tensor, in the dtype it is loaded as

Files are in the page cache. transformers loads the same folders beside it, with torch on a CPU. In
the stored dtype its tensors are the mapped file itself: nothing is read or checked before it is
used, nothing can be donated. In float32 both read and convert everything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from run import ROOT, versions

from jaxrlhf.cli import MALLOC

LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_ROPE,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
}
CONFIGS["smoke"] = CONFIGS["Llama-3.2-1B"] | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# Layout of the files: bytes of a shard, or None for one file.
FOLDERS = {
    "Qwen2.5-0.5B": ("Qwen2.5-0.5B", None),
    "Llama-3.2-1B": ("Llama-3.2-1B", None),
    "Llama-3.2-1B-sharded": ("Llama-3.2-1B", 500_000_000),
    "smoke": ("smoke", None),
}
CASES = {  # name: (devices, dtype); None = transformers
    "1 device, bfloat16": (1, "bfloat16"),
    "8 devices, bfloat16": (8, "bfloat16"),
    "1 device, float32": (1, "float32"),
    "8 devices, float32": (8, "float32"),
    "transformers, bfloat16": (None, "bfloat16"),
    "transformers, float32": (None, "float32"),
}


def make_folder(folder: Path, name: str) -> None:
    """A model folder with random weights, one tensor in memory at a time."""
    import ml_dtypes

    from jaxrlhf.models.families import config_from_hf
    from jaxrlhf.models.weights import OutgoingTensor, tensors_of, write_json, write_tensors

    config_name, shard = FOLDERS[name]
    hf = CONFIGS[config_name] | {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
        bits &= 0x81FF  # sign, two bits of the exponent, mantissa
        bits |= 0x3C00  # magnitudes from 2^-7 to 2^-3
        return bits.view(dtype)

    outgoing = [
        OutgoingTensor(tensor, shape, dtype, lambda shape=shape: values(shape))
        for tensor, shape in tensors_of(config_from_hf(hf, name), "lm").items()
    ]
    write_tensors(folder, outgoing, max_shard_bytes=shard or 10**12)
    write_json(folder / "config.json", hf)


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes of /proc/PID/status: VmRSS, RssAnon, RssFile; {} once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("Rss", "VmRSS")))
    return {key: 1024 * int(value.split()[0]) for key, value in pairs}


def load_ours(folder: Path, devices: int, dtype: str) -> Iterator[int]:
    """Yields once when ready to begin, then the bytes of the loaded arrays."""
    import jax
    import jax.numpy as jnp

    from jaxrlhf.models.families import config_from_hf
    from jaxrlhf.models.transformer import abstract_params, logical_axes
    from jaxrlhf.models.weights import load_hf, read_hf_config
    from jaxrlhf.parallel.mesh import make_mesh
    from jaxrlhf.parallel.rules import shardings

    assert jax.device_count() == devices
    config = config_from_hf(read_hf_config(folder), "config.json")
    where = shardings(logical_axes(config), abstract_params(config), make_mesh(fsdp=devices))[0]
    jax.block_until_ready(jnp.zeros(8) + 1)
    yield 0
    params = jax.block_until_ready(load_hf(folder, dtype=dtype, shardings=where).params)
    leaves = jax.tree.leaves(params)
    yield sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)


def load_theirs(folder: Path, dtype: str) -> Iterator[int]:
    """The same with transformers on torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # imports what it imports late
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    yield 0
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    yield sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())


def child(folder: Path, case: str) -> None:
    """Loads once; says when it begins, waits for the parent, and says what it took."""
    devices, dtype = CASES[case]
    steps = load_theirs(folder, dtype) if devices is None else load_ours(folder, devices, dtype)
    next(steps)
    print(json.dumps(status()), flush=True)
    sys.stdin.readline()
    cpu, wall = time.process_time(), time.perf_counter()
    held = next(steps)
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    took = {key: round(value, 3) for key, value in took.items()}
    print(json.dumps(took | {"held": held}), flush=True)
    sys.stdin.readline()


def measure(folder: Path, case: str) -> dict[str, Any]:
    """One load in a process of its own, watched from here."""
    devices, dtype = CASES[case]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if devices is not None:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        # Memory as the command line has it.
        settings = (f"glibc.malloc.{setting}" for setting in MALLOC.split())
        environment["GLIBC_TUNABLES"] = ":".join(settings)
    else:
        environment.pop("GLIBC_TUNABLES", None)
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, __file__, "--child", case, "--folder", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            before = json.loads(process.stdout.readline() or "{}")
            peaks = dict(before)
            process.stdin.write("go\n")
            process.stdin.flush()
            os.set_blocking(process.stdout.fileno(), False)
            text = ""
            while not text.endswith("\n") and process.poll() is None:
                for key, value in status(process.pid).items():
                    peaks[key] = max(peaks[key], value)
                text += process.stdout.readline() or ""
                time.sleep(0.002)
            process.stdin.write("done\n")
            process.stdin.flush()
        except (BrokenPipeError, json.JSONDecodeError, KeyError) as error:
            raise SystemExit(f"{folder.name}, {case}: the process ended early") from error
    found = json.loads(text)
    held = found.pop("held")
    largest = largest_tensor(folder, 4 if dtype == "float32" else 2)
    above = peaks["RssAnon"] - before["RssAnon"]
    return found | {
        "held_mb": round(held / 1e6, 1),
        "peak_anon_mb": round(above / 1e6, 1),
        "excess_mb": round((above - held) / 1e6, 1),
        "bound_mb": round(1.1 * largest / 1e6, 1),
        "peak_rss_mb": round((peaks["VmRSS"] - before["VmRSS"]) / 1e6, 1),
    }


def largest_tensor(folder: Path, itemsize: int) -> int:
    """Bytes of the largest tensor: the embedding, in both models."""
    config = json.loads((folder / "config.json").read_text())
    return config["vocab_size"] * config["hidden_size"] * itemsize


def other_paths(folder: Path, scratch: Path) -> dict[str, float]:
    """Seconds of what else every run does with weights: digest, and writing them again."""
    from jaxrlhf.models.tensor_files import weights_digest
    from jaxrlhf.models.weights import load_hf, save_hf

    began = time.perf_counter()
    weights_digest(folder)
    digested = time.perf_counter()
    model = load_hf(folder)
    loaded = time.perf_counter()
    save_hf(scratch, model.params, model.config, hf_config=model.hf_config)
    saved = time.perf_counter()
    return {"digest_s": round(digested - began, 2), "save_s": round(saved - loaded, 2)}


def line(name: str, case: str, found: dict[str, Any]) -> str:
    return (
        f"{name:>22} {case:<23} {found['wall_s']:6.2f} s ({found['cpu_s']:6.2f} CPU s)  holds "
        f"{found['held_mb']:7.1f} MB, at most {found['excess_mb']:6.1f} MB more "
        f"(bound {found['bound_mb']:.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name for name in FOLDERS if name != "smoke"]
    parser.add_argument("--models", nargs="+", choices=list(FOLDERS), default=names)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=3, help="loads per case; fastest kept")
    parser.add_argument("--folder", type=Path, help="where model folders are made and kept")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.folder, options.child)
        return
    results: dict[str, Any] = {"cpus": os.cpu_count(), "versions": versions(), "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        place = options.folder or Path(temporary)
        for name in options.models:
            folder = place / name
            if not (folder / "config.json").is_file():
                make_folder(folder, name)
            found = results["models"].setdefault(name, {})
            for case in options.cases:
                times = [measure(folder, case) for _ in range(options.repetitions)]
                best = min(times, key=lambda each: each["wall_s"])
                # The fastest is the least disturbed; memory is the worst of all.
                for key in ("peak_anon_mb", "excess_mb", "peak_rss_mb"):
                    best[key] = max(each[key] for each in times)
                found[case] = best
                print(line(name, case, best), flush=True)
            found["other"] = other_paths(folder, Path(temporary) / "saved")
            print(f"{name:>22} {found['other']}", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
