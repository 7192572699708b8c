# SPDX-License-Identifier: Apache-2.0
"""The one training loop of every stage: it knows when, the stage knows what."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxrlhf.errors import ConfigError
from jaxrlhf.parallel.distributed import stop_agreed
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.train.metrics import TOTALS, MetricWriter, averages, sums
from jaxrlhf.train.signals import RESUMABLE, crash_point, graceful_stop
from jaxrlhf.train.state import TrainState

# One unit of work: an optimizer step, or a PPO iteration. `step` counts from 0; (sum, count) pairs.
Advance = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]]
SHOWN = 4  # metrics on the progress line


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run of the loop ended."""

    state: TrainState
    step: int  # units of work done, those before `start` included
    reason: str  # "done", "stopped" (by a signal) or "non-finite"
    message: str  # one line for the person at the terminal
    metrics: dict[str, float]  # the last of each kind, evaluation under "eval/"
    tokens: int | None  # of all steps, those before `start` included; None = theirs are not known

    @property
    def exit_code(self) -> int:
        """0 only if everything planned was done; 143 = call again to go on."""
        return {"done": 0, "stopped": RESUMABLE}.get(self.reason, 1)


def train(
    advance: Advance,
    state: TrainState,
    *,
    start: int,
    steps: int,
    writer: MetricWriter,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[TrainState, int], Mapping[str, Any]] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    log_every: int = 1,
    so_far: Mapping[str, Any] | None = None,
    sample: Callable[[TrainState, int], Iterable[Mapping[str, Any]]] | None = None,
    sample_every: int | None = None,
    stop_requested: Callable[[], bool] | None = None,
    stop_after_nonfinite: int = 5,
    name: str = "train",
    again: str = "call it again",
    show: tuple[str, ...] = ("loss",),
) -> Outcome:
    """Runs units of work `start` to `steps`, logging, evaluating and saving on the way.

    Nothing waits for the device but what has to: metrics are fetched one step late. At a step that
    is both, evaluation comes before the save, and the log reaches the disk before the checkpoint
    does, so that a resumed run writes the same files as an uninterrupted one.

    Args:
        advance: (state, step) -> (state, metrics); must be a function of its arguments, so that
            resuming is exact. A metric `nonfinite` above 0 says that an update was skipped;
            `tokens` gives the rate on the progress line.
        state: consumed: a compiled step donates it.
        start: units already done (the restored step).
        evaluate: (state, steps done) -> metrics; every `eval_every` steps, before the first and
            after the last. What it returns ranks the checkpoint saved at the same step: where
            `checkpoints` keep the best, every evaluation after the first step is saved.
        save_every: 0 = only at the end.
        log_every: steps from one train line of the record to the next, which has their means.
        so_far: what the restored checkpoint's meta says under "record": the tokens so far, and the
            sums of the steps since the last line.
        sample: (state, steps done) -> rows for samples.jsonl; every `sample_every` steps (by
            default with each evaluation).
        stop_requested: polled after every step; by default SIGTERM and SIGINT are handled here. A
            pipeline passes its own (`signals.graceful_stop`), so that it knows too.
        stop_after_nonfinite: end after so many skipped updates in a row.
        name, show: how the progress line begins, and the metrics it shows first.
        again: how a stopped run is continued.

    Returns:
        An Outcome. The state, when `reason` is "non-finite", is the last one that was finite.

    Raises:
        CheckpointError: a save failed; at the latest at the end, normally one step later.
        ConfigError: the evaluation has no figure of the name by which the best is kept.
    """
    stack = contextlib.ExitStack()
    stop_requested = stop_requested or stack.enter_context(graceful_stop())
    sample_every = eval_every if sample_every is None else sample_every
    log = _Log(writer, name, start, steps, show, log_every, so_far)
    latest: dict[str, float] = {}  # what the evaluation of this very step found
    best = None if checkpoints is None else checkpoints.best_metric

    def due(every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == steps)

    def look(done: int) -> None:
        """Evaluation and samples at this step, each with its own line of the record."""
        if evaluate is not None and due(eval_every, done):
            began = time.perf_counter()
            found = averages(evaluate(state, done))
            if best is not None and best not in found and not log.evaluated:
                raise ConfigError(
                    f"train.keep_best = {best}: an evaluation has no such figure; it has "
                    f"{', '.join(found)}"
                )
            writer.write(done, {**found, "time/eval_seconds": time.perf_counter() - began}, "eval")
            latest.clear()
            latest.update(found)
            log.evaluation(done, found)
            crash_point("evaluated", done)
        if sample is not None and due(sample_every, done):
            writer.samples(done, sample(state, done))

    def save(done: int) -> None:
        if checkpoints is not None and done not in saved:
            writer.flush()
            checkpoints.save(done, state, metrics=latest, meta={"record": log.so_far()})
            saved.add(done)

    saved = {start} if start > 0 else set()  # what was restored need not be saved again
    pending: tuple[int, Mapping[str, Any]] | None = None
    reason, done, bad = "done", start, 0
    try:
        if start == 0:
            look(0)
            latest.clear()  # it ranks no checkpoint: none is of the weights before training
        while done < steps:
            if checkpoints is not None:
                checkpoints.check()
            crash_point("step", done)
            log.before()
            state, metrics = advance(state, done)
            log.dispatched(metrics)
            late, pending = pending, (done + 1, metrics)
            done += 1
            if late is not None:
                bad = bad + 1 if log.step(*late) else 0
            stop = stop_agreed(done, stop_requested())
            candidate = best is not None and evaluate is not None and due(eval_every, done)
            saving = due(save_every, done) or candidate or done == steps
            if (
                stop
                or saving
                or bad >= stop_after_nonfinite
                or (due(eval_every, done) or due(sample_every, done))
            ):
                # Somebody looks at this state now: its own line of the record comes first.
                bad = bad + 1 if log.step(*pending) else 0
                pending = None
            if bad >= stop_after_nonfinite:
                reason = "non-finite"
                log.line(done)  # nothing is saved, so no later run will write it
                break
            look(done)
            if saving or (stop and done < steps):
                save(done)
            if stop and done < steps:
                reason = "stopped"
                break
            latest.clear()
        if checkpoints is not None:
            checkpoints.wait()
            if done == start == steps and jax.process_index() == 0:
                checkpoints.retain()  # killed between its last save and this
    except BaseException:
        if checkpoints is not None:
            checkpoints.settle()
        raise
    finally:
        log.close()
        stack.close()
    writer.flush()
    kept = checkpoints.steps() if checkpoints is not None else []
    where = f"saved at step {kept[-1]}" if kept else "nothing was saved"
    message = {
        "done": f"{name}: {done} of {steps} steps done",
        "stopped": f"{name}: stopped at step {done} of {steps}, {where}: resumable: {again}",
        "non-finite": (
            f"{name}: loss or gradient was not finite {bad} times in a row, up to step {done}; "
            f"those updates were skipped, {where}. Lower optim.learning_rate or optim.clip_norm, "
            "use model.dtype=float32, or look at the batches of these steps with `data show`"
        ),
    }[reason]
    _say(message)
    return Outcome(state, done, reason, message, log.last, log.tokens)


class _Log:
    """Timing, the progress line, and the train lines of the record."""

    def __init__(
        self,
        writer: MetricWriter,
        name: str,
        start: int,
        steps: int,
        show: tuple[str, ...],
        every: int,
        so_far: Mapping[str, Any] | None,
    ):
        self.writer, self.name, self.start, self.steps = writer, name, start, steps
        self.show, self.every = show, every
        said = so_far or {}
        self.tokens: int | None = said.get("tokens", 0 if start == 0 else None)
        # Sums and counts of the steps since the last line.
        self.window = {name: (s, c) for name, (s, c) in said.get("window", {}).items()}
        self.timed: list[float] = []  # seconds of those that this process did
        self.evaluated = False
        self.first_seconds = 0.0
        self.last: dict[str, float] = {}
        self.loud = jax.process_index() == 0
        self.compiled = False
        self.clock = time.perf_counter()
        self.began = self.clock
        self.pace: float | None = None  # seconds a step, smoothed
        self.printed = 0.0
        self.bar: Any = None
        if self.loud and sys.stdout.isatty():
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}", markup=False),
                progress.TimeElapsedColumn(),
                refresh_per_second=4,
            )
            self.task = self.bar.add_task(name, total=steps, completed=start, text="")
            self.bar.start()

    def before(self) -> None:
        if not self.compiled:
            self.clock = time.perf_counter()
            self.say(f"{self.name}: compiling the first step")

    def dispatched(self, metrics: Mapping[str, Any]) -> None:
        if not self.compiled:
            self.compiled = True
            jax.block_until_ready(list(metrics.values()))
            self.first_seconds = time.perf_counter() - self.clock
            self.say(
                f"{self.name}: first step after {self.first_seconds:.1f} s, compilation included"
            )

    def step(self, done: int, metrics: Mapping[str, Any]) -> bool:
        """Counts one finished step, and writes a line where one is due; True where the step's
        update was skipped."""
        found = sums(metrics)
        values = averages(found)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if done == self.start + 1:
            seconds = self.first_seconds
        else:
            self.pace = seconds if self.pace is None else 0.9 * self.pace + 0.1 * seconds
        self.timed.append(seconds)
        for key, (total, count) in found.items():
            before = self.window.get(key, (0.0, 0.0))
            self.window[key] = (before[0] + total, before[1] + count)
        if self.tokens is not None:
            self.tokens += int(values.get("tokens", 0))
        if done % self.every == 0 or done == self.steps:
            self.line(done)
        skipped = values.get("nonfinite", 0.0) > 0
        if skipped:
            self.say(f"{self.name}: step {done}: loss or gradient not finite, update skipped")
        self.progress(done, values)
        return skipped

    def line(self, done: int) -> None:
        """Writes the means of the steps since the last line, if there are any."""
        if not self.window:
            return
        values = averages(self.window)
        seconds = sum(self.timed) / max(len(self.timed), 1)
        timed = {"time/step_seconds": seconds}
        if "tokens" in values:
            steps = done - (done - 1) // self.every * self.every
            timed["time/tokens_per_second"] = values["tokens"] / steps / max(seconds, 1e-9)
        self.writer.write(done, {**values, **timed})
        self.last.update(values)
        self.window, self.timed = {}, []

    def so_far(self) -> dict[str, Any]:
        """What a resumed run needs to write the same record: see `train`."""
        return {"tokens": self.tokens, "window": dict(self.window)}  # written down while we go on

    def progress(self, done: int, values: Mapping[str, float]) -> None:
        if not self.loud:
            return
        names = [k for k in self.show if k in values]
        names += [k for k in values if k not in (*names, "nonfinite", *TOTALS)]
        parts = [f"{k} {values[k]:.4g}" for k in names[:SHOWN]]
        if self.pace:
            if "tokens" in values:
                parts.append(f"{values['tokens'] / self.pace:,.0f} tok/s")
            left = round((self.steps - done) * self.pace)
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        text = "  ".join(parts)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
            return
        now = time.perf_counter()
        # The first, the last, and in between a line every few seconds, not one a step.
        if done in (self.start + 1, self.steps) or now - self.printed >= 5.0:
            self.printed = now
            print(f"{self.name} {done}/{self.steps}  {text}", flush=True)

    def evaluation(self, done: int, found: Mapping[str, float]) -> None:
        self.evaluated = True
        self.last.update({f"eval/{k}": v for k, v in found.items()})
        shown = [f"{k} {v:.4g}" for k, v in found.items() if k not in TOTALS]
        text = "  ".join(shown[: 2 * SHOWN])
        self.say(f"{self.name} eval at {done}  {text}")
        self.clock = time.perf_counter()  # the next step does not pay for it

    def say(self, text: str) -> None:
        if self.loud:
            if self.bar is not None:
                self.bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
