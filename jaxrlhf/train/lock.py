# SPDX-License-Identifier: Apache-2.0
"""One run in one directory: a lock that names its holder and dies with it."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf.errors import CheckpointError

BEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # another machine's lock that did not move for so long is nobody's


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Holds `folder/run.lock` for as long as the block runs.

    On one machine the kernel releases the lock with its holder, however that ends, so a killed run
    never stands in the way. A holder on another machine (a shared filesystem) is recognised by the
    file's time, which a running holder renews.

    Raises:
        CheckpointError: another run is at work there, with its host and process.
    """
    path = Path(folder) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise CheckpointError(f"cannot write in the run directory {folder}: {e.strerror}") from e
    try:
        holder = _read(fd)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder} is in use by another run ({who}): two runs in one directory would "
                "overwrite each other. Wait for it, stop it, or give another --output"
            ) from None
        except OSError:
            pass  # a filesystem without locks: the file's time has to do
        # flock does not reach across machines on every filesystem: trust the renewed time too.
        elsewhere = holder.get("host") not in (None, socket.gethostname())
        age = time.time() - os.fstat(fd).st_mtime
        if elsewhere and age < STALE_SECONDS:
            raise CheckpointError(
                f"{folder} is in use by another run ({who}, seen {age:.0f} s ago). If it is gone, "
                f"start again in {STALE_SECONDS - age:.0f} s, or remove {path}"
            )
        _write(fd, {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})
        stop = threading.Event()
        beat = threading.Thread(target=_renew, args=(fd, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            _write(fd, {})  # emptied, not removed: a waiter may hold the same file open
    finally:
        os.close(fd)


def _read(fd: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:  # cut short by a kill or a full disk
        return {}
    return found if isinstance(found, dict) else {}


def _write(fd: int, content: dict[str, object]) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(content).encode() if content else b"", 0)


def _renew(fd: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(fd)
