# SPDX-License-Identifier: Apache-2.0
"""Runs a test's function in another process: on n virtual devices, or on several processes at once.

    from devices import run_on_devices
    result = run_on_devices(8, my_function, accum=4)

The function lives at the top level of a test file, takes and returns JSON, and is imported afresh
in the child.
"""

import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

CHILD = """
import importlib.util, json, os, sys
file, name, kwargs, out = sys.argv[1:]
sys.path.insert(0, os.path.dirname(file))
spec = importlib.util.spec_from_file_location("child_test_module", file)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
result = getattr(module, name)(**json.loads(kwargs))
with open(out, "w") as f:
    json.dump(result, f)
"""


def start(
    function: Callable[..., Any],
    out: Path,
    *,
    devices: int = 1,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> subprocess.Popen[str]:
    """A child process that calls `function(**kwargs)` and writes its JSON result to `out`."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}"
        # By default eight threads that meet within 40 s on a busy machine, or the process ends.
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    )
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            inspect.getfile(function),
            function.__name__,
            json.dumps(kwargs),
            str(out),
        ],
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_on_devices(
    n: int, function: Callable[..., Any], *, timeout: float = 240, **kwargs: Any
) -> Any:
    """The JSON result of `function(**kwargs)` in a process with n virtual CPU devices."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        child = start(function, out, devices=n, **kwargs)
        text, _ = child.communicate(timeout=timeout)
        assert child.returncode == 0, f"{function.__name__} ended with {child.returncode}:\n{text}"
        return json.loads(out.read_text())


def run_in_processes(
    n: int,
    function: Callable[..., Any],
    *,
    devices: int = 1,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """The JSON results of `function(**kwargs)` in n processes joined by jax.distributed (gloo).

    The children find each other by the environment that `parallel.distributed.initialize` reads.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(n)]
        children = [
            start(
                function,
                outs[i],
                devices=devices,
                env={
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(n),
                    "JAX_PROCESS_ID": str(i),
                }
                | (env or {}),
                **kwargs,
            )
            for i in range(n)
        ]
        with ThreadPoolExecutor(n) as pool:
            texts = list(pool.map(partial(_said, timeout=timeout), children))
        codes = [child.returncode for child in children]
        said = "\n".join(f"--- process {i}\n{text}" for i, text in enumerate(texts))
        assert codes == [0] * n, f"the processes ended with {codes}:\n{said}"
        return [json.loads(out.read_text()) for out in outs]


def _said(child: subprocess.Popen[str], timeout: float) -> str:
    """What a child printed; one that takes longer is killed."""
    try:
        return child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()[0] + f"\n(killed after {timeout:g} s)"
