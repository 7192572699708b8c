# SPDX-License-Identifier: Apache-2.0
"""Several processes: start-up, and the few things that only one of them, or all together, do."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf.errors import JaxrlhfError

HEARTBEAT_SECONDS = 20  # jax's default lets a survivor wait 100 s for a dead process
START_SECONDS = 60
LEAVE_SECONDS = 10  # jax's default lets a failed process wait 300 s for the others, and them for it


def wanted() -> bool:
    """Whether the environment says that this process is one of several.

    Either JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), or a cluster that
    jax detects by itself: a TPU slice of several hosts, Slurm or Open MPI with several tasks.
    """
    env = os.environ
    return bool(
        env.get("JAX_COORDINATOR_ADDRESS")
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or env.get("MEGASCALE_COORDINATOR_ADDRESS")
        or int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def initialize() -> bool:
    """Joins the other processes where the environment says so; call before anything touches jax.

    Returns whether there are others. JAXRLHF_HEARTBEAT_SECONDS says after how long a silent process
    counts as dead, JAXRLHF_START_SECONDS how long to wait for all of them at the start.

    Raises:
        JaxrlhfError: JAX_NUM_PROCESSES or JAX_PROCESS_ID missing or wrong.
    """
    if not wanted():
        return False
    if jax.distributed.is_initialized():
        return True
    given: dict[str, Any] = {}
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = (int(os.environ[k]) for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            if not 0 <= index < count:
                raise ValueError
        except (KeyError, ValueError):
            raise JaxrlhfError(
                f"JAX_COORDINATOR_ADDRESS={address} is set, so JAX_NUM_PROCESSES (how many) and "
                "JAX_PROCESS_ID (0 to how many - 1, another one on each) must be set too; found "
                f"JAX_NUM_PROCESSES={os.environ.get('JAX_NUM_PROCESSES')}, "
                f"JAX_PROCESS_ID={os.environ.get('JAX_PROCESS_ID')}"
            ) from None
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    seconds = float(os.environ.get("JAXRLHF_START_SECONDS", START_SECONDS))
    beat = int(os.environ.get("JAXRLHF_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS))
    print(
        f"joining the other processes {given or '(found by jax)'}, up to {seconds:g} s", flush=True
    )
    # When its own patience ends jax aborts with a C++ stack trace: be there first, with words.
    late = threading.Timer(seconds, _give_up, args=(seconds, given))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=beat,
        )
    finally:
        late.cancel()
    # Collectives between CPU processes connect when a program first needs them, and give up when
    # one process comes 30 s after another. All are here now; later none may be.
    barrier("joined")
    return True


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that all processes do as one; `initialize` at its start.

    Where it raises in one of them the others would wait in their next collective for what never
    comes, and the failed one, when Python ends, for them. So it leaves soon after its error, which
    the others learn from jax and end too (the one whose output has the error is the one to read).
    """
    initialize()
    try:
        yield
    except BaseException:
        if jax.distributed.is_initialized():
            atexit.unregister(_leave)
            atexit.register(_leave)  # before jax's own: the last registered is the first called
        raise


def _leave() -> None:
    """The usual end if the others are ending too, else this process's own."""
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(LEAVE_SECONDS)
    if farewell.is_alive():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(JaxrlhfError.exit_code)


def _give_up(seconds: float, given: dict[str, Any]) -> None:
    count = given.get("num_processes")
    os.write(
        2,
        (
            f"\nnot all {count or 'the'} processes came together within {seconds:g} s. "
            "Start the same command on every host"
            + (
                f": JAX_COORDINATOR_ADDRESS={given['coordinator_address']} "
                f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID=0 ... {count - 1} (this one is "
                f"{given['process_id']}; process 0 runs at that address)"
                if count
                else " (gcloud compute tpus tpu-vm ssh NAME --worker=all --command ...)"
            )
            + ". JAXRLHF_START_SECONDS sets the patience\n"
        ).encode(),
    )
    os._exit(JaxrlhfError.exit_code)


def is_primary() -> bool:
    """True in the one process that prints and writes logs."""
    return jax.process_index() == 0


def from_primary(value: int) -> int:
    """What the first process says (in 32 bits), in all of them; all must call."""
    return int(array_from_primary(np.int32(value)))


def array_from_primary(value: Any) -> np.ndarray:
    """The first process's array, in all of them; all must call, with one of its shape and dtype."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def stop_agreed(step: int, requested: bool) -> bool:
    """Whether to stop after this step: in every process the same answer at the same step.

    With one process it is `requested`. With several, SIGTERM goes to jax's preemption service,
    which picks a step that no process has passed yet; one that was asked to stop in another way
    (SIGINT) does not stop alone, which would leave the others waiting for ever.
    """
    if jax.process_count() == 1:
        return requested
    return bool(multihost_utils.reached_preemption_sync_point(step))


def to_host(x: Any) -> np.ndarray:
    """The whole array as numpy, gathered from all processes where needed (then all must call)."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
