# SPDX-License-Identifier: Apache-2.0
"""How much of this machine the product uses: `python benchmarks/run.py --help`.

Every workload runs in a process of its own, its steps interleaved with matrix products that measure
what the machine gives at that moment. CPU time (user + system, all threads) is the measure, since
machines are shared; shares compare within one run, milliseconds between machines mean nothing.

    share = model FLOPs of a step / CPU seconds of a step / best matmul FLOPs per CPU second

FLOPs: see workloads.py. The matmul peak is the best of several products by XLA and by NumPy.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrlhf.cli import MALLOC

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("tiny", "small", "quickstart", "smoke")
NAMES = ("sft", "dpo", "reward", "ppo", "decode")


def cpu_and_wall(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU and of wall clock that a call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


class Machine:
    """What the machine gives: fp32 products and reads, sampled again and again."""

    def __init__(self, small: bool = False):
        import jax
        import jax.numpy as jnp
        import numpy as np

        n = 128 if small else 1536
        host = np.full((n, n), 0.5, np.float32)
        device = jnp.asarray(host)
        product = jax.jit(lambda a: a @ a)
        self.flops = 2.0 * n**3
        self.products = [lambda: product(device).block_until_ready(), lambda: host @ host]
        # Far beyond any cache, as the weights of a model are.
        rows = 2**10 if small else 2**16
        table = np.full((rows, 512), 0.5, np.float32)
        on_device, column = jnp.asarray(table), np.full(512, 0.5, np.float32)
        total = jax.jit(jnp.sum)
        self.bytes = table.nbytes
        self.reads = [lambda: total(on_device).block_until_ready(), lambda: table @ column]
        self.gflops: list[float] = []
        self.read_cpu: list[float] = []  # GB per CPU second
        self.read_wall: list[float] = []  # GB per second
        for function in (*self.products, *self.reads):
            function()

    def sample_products(self) -> None:
        """One more sample of the peak, in GFLOP per CPU second."""
        times = [cpu_and_wall(f)[0] for f in self.products for _ in range(2)]
        self.gflops.append(self.flops / min(times) / 1e9)

    def sample_reads(self) -> None:
        """One more sample of the read bandwidth."""
        times = [cpu_and_wall(f) for f in self.reads for _ in range(4)]
        self.read_cpu.append(self.bytes / min(cpu for cpu, _ in times) / 1e9)
        self.read_wall.append(self.bytes / min(wall for _, wall in times) / 1e9)


def summary(values: list[float]) -> dict[str, float]:
    """Best and spread of samples of a rate."""
    found = {"best": max(values), "median": statistics.median(values), "worst": min(values)}
    return {name: round(value, 2) for name, value in found.items()}


def measure(run: Callable[[], None], machine: Machine, repetitions: int) -> dict[str, Any]:
    """CPU and wall times of a step, between samples of the machine's peak."""
    run()  # compiles what is not compiled yet, touches all memory
    machine.sample_products()
    times = []
    for _ in range(repetitions):
        times.append(cpu_and_wall(run))
        machine.sample_products()
    cpu = [c for c, _ in times]
    return {
        "cpu_ms": round(1e3 * statistics.median(cpu), 3),
        "cpu_ms_min": round(1e3 * min(cpu), 3),
        "cpu_ms_max": round(1e3 * max(cpu), 3),
        "wall_ms_min": round(1e3 * min(w for _, w in times), 3),
        "repetitions": repetitions,
    }


def peak_mb() -> float:
    """The most memory this process ever held, compiling included, MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def train_workload(name: str, size: str, repetitions: int) -> dict[str, Any]:
    """One of sft, dpo, reward, ppo."""
    import workloads

    machine = Machine(size == "smoke")
    work = workloads.WORKLOADS[name](size)
    found = measure(work.run, machine, repetitions)
    best = max(machine.gflops)
    return found | {
        "gflop": round(work.flops / 1e9, 4),
        "tokens": work.tokens,
        "peak_gflops": summary(machine.gflops),
        "share": round(work.flops / 1e6 / found["cpu_ms"] / best, 4),
        "share_best_step": round(work.flops / 1e6 / found["cpu_ms_min"] / best, 4),
        "peak_mb": peak_mb(),
    }


def decode_workload(size: str, repetitions: int) -> dict[str, Any]:
    """Tokens per second at several batches, and what a step at batch 1 reads of the weights."""
    import workloads

    machine = Machine(size == "smoke")
    rates = {}
    for batch in workloads.SHAPES[size].batches:
        work = workloads.decode(size, batch)
        found = measure(work.run, machine, repetitions)
        best = max(machine.gflops)
        rates[str(batch)] = found | {
            "tokens_per_cpu_second": round(1e3 * work.tokens / found["cpu_ms"], 2),
            "tokens_per_second_best": round(1e3 * work.tokens / found["wall_ms_min"], 2),
            "share": round(work.flops / 1e6 / found["cpu_ms"] / best, 4),
        }
    # The steps alone: a long completion less a short one.
    _, new = workloads.SHAPES[size].decode
    long, short = workloads.decode(size, 1, 3 * new), workloads.decode(size, 1, new)
    long.run()
    short.run()
    times: list[tuple[float, float]] = []
    for _ in range(max(repetitions, 3)):
        machine.sample_reads()
        a, b = cpu_and_wall(long.run), cpu_and_wall(short.run)
        times.append(((a[0] - b[0]) / (2 * new), (a[1] - b[1]) / (2 * new)))
    machine.sample_reads()
    gigabytes = workloads.weight_bytes(size) / 1e9
    cpu, wall = statistics.median(c for c, _ in times), statistics.median(w for _, w in times)
    return {
        "batches": rates,
        "batch_1_step": {
            "cpu_ms": round(1e3 * cpu, 4),
            "wall_ms": round(1e3 * wall, 4),
            "weight_mb": round(1e3 * gigabytes, 3),
            "read_gb_per_cpu_second": summary(machine.read_cpu),
            "read_gb_per_second": summary(machine.read_wall),
            "share_of_read_cpu": round(gigabytes / cpu / max(machine.read_cpu), 4),
            "share_of_read_wall": round(gigabytes / wall / max(machine.read_wall), 4),
        },
        "peak_gflops": summary(machine.gflops),
        "peak_mb": peak_mb(),
    }


def child(name: str, size: str, repetitions: int) -> dict[str, Any]:
    """The figures of one workload at one size, with the work done in a process of its own."""
    command = [sys.executable, __file__, "--child", "--sizes", size, "--workloads", name]
    command += ["--repetitions", str(repetitions)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Memory as the command line has it; GLIBC_TUNABLES= in the environment shows the difference.
    malloc = ":".join(f"glibc.malloc.{setting}" for setting in MALLOC.split())
    defaults = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": malloc}
    environment = {**defaults, **os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, size: str, found: dict[str, Any]) -> str:
    """One line of the table for one workload."""
    label = f"{size:>10} {name:>7}"
    if name != "decode":
        peak = found["peak_gflops"]
        return (
            f"{label}  {found['cpu_ms']:9.1f} CPU ms  {100 * found['share']:5.1f} % of "
            f"{peak['best']:.0f} GFLOP/s (seen {peak['worst']:.0f} to {peak['best']:.0f})  "
            f"{found['peak_mb']:7.0f} MB"
        )
    rates = ", ".join(
        f"{rate['tokens_per_second_best']:.0f} at B={batch} ({rate['tokens_per_cpu_second']:.0f} "
        "a CPU s)"
        for batch, rate in found["batches"].items()
    )
    step = found["batch_1_step"]
    return (
        f"{label}  tokens/s: {rates}; B=1 reads {100 * step['share_of_read_wall']:.0f} % of "
        f"{step['read_gb_per_second']['best']:.1f} GB/s ({100 * step['share_of_read_cpu']:.0f} % "
        f"by CPU time)  {found['peak_mb']:.0f} MB"
    )


def versions() -> dict[str, str]:
    """What a result depends on besides the code."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repetitions", type=int, default=5, help="steps timed per workload")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        [size], [name] = options.sizes, options.workloads
        found = (
            decode_workload(size, options.repetitions)
            if name == "decode"
            else train_workload(name, size, options.repetitions)
        )
        print(json.dumps(found))
        return
    results: dict[str, Any] = {"cpus": os.cpu_count(), "versions": versions(), "sizes": {}}
    for size in options.sizes:
        for name in options.workloads:
            found = child(name, size, options.repetitions)
            results["sizes"].setdefault(size, {})[name] = found
            print(line(name, size, found), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
