# SPDX-License-Identifier: Apache-2.0
"""How a run is stopped: politely by a signal, or (in tests) killed at a named point."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax

RESUMABLE = 143  # exit code after a signal: 128 + SIGTERM; everything done so far is saved


@contextlib.contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or SIGINT into an answer of True; the second ends the process.

    Yields a function to poll between units of work. Without it a SIGTERM would save nothing. With
    several processes SIGTERM is left to jax's preemption service, by which they agree on a step
    (`parallel.distributed.stop_agreed`). Outside the main thread nothing is installed.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(RESUMABLE)  # not SystemExit: it would be raised inside someone's except block
        received.append(number)
        name = signal.Signals(number).name
        text = f"\n{name}: finishing this step, then saving; once more to quit without saving\n"
        os.write(2, text.encode())  # print could be interrupted in the middle of itself

    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield lambda: False
        return
    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def crash_point(name: str, step: int) -> None:
    """Kills the process here if JAXRLHF_CRASH_AT says so: `name:step`, several joined by commas.

    For tests of what a kill leaves behind; without the variable it does nothing.
    """
    if f"{name}:{step}" in os.environ.get("JAXRLHF_CRASH_AT", "").split(","):
        os.kill(os.getpid(), signal.SIGKILL)
