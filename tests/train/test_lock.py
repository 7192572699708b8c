# SPDX-License-Identifier: Apache-2.0
"""Two runs never share a directory, and a dead one never blocks it."""

import json
import os
import signal
import socket
import time

import pytest
from devices import start

from jaxrlhf.errors import CheckpointError
from jaxrlhf.train.lock import STALE_SECONDS, run_lock


def hold(folder, seconds):
    with run_lock(folder):
        print("held", flush=True)
        time.sleep(seconds)


def test_the_second_run_is_refused_by_name_and_a_killed_one_is_forgotten(tmp_path):
    child = start(hold, tmp_path / "out.json", folder=str(tmp_path), seconds=60)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckpointError, match=f"process {child.pid} on {socket.gethostname()}"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    for _ in range(2):  # neither the killed holder nor a finished one is in the way
        with run_lock(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    with run_lock(tmp_path), pytest.raises(CheckpointError), run_lock(tmp_path):
        pass


def test_another_machines_lock_holds_while_it_is_renewed(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(CheckpointError, match="process 1 on elsewhere"), run_lock(tmp_path):
        pass
    old = time.time() - STALE_SECONDS - 1
    os.utime(path, (old, old))
    with run_lock(tmp_path):
        pass
    path.write_text('{"host": "else')  # cut short
    with run_lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write in the run directory"):  # noqa: SIM117
        with run_lock(tmp_path / "file" / "run"):
            pass
