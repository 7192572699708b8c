# SPDX-License-Identifier: Apache-2.0
"""Metrics on their way out: metrics.jsonl and TensorBoard always, W&B if asked.

metrics.jsonl is the record: one JSON object a line, {"step", "split", name: number...}. Wall-clock
things stand under "time/" and are the only ones that may differ between two equal runs. On resume
the file is cut back to the restored step, so that a resumed run's log is an uninterrupted run's.
"""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.parallel.distributed import to_host

TOTALS = frozenset({"tokens", "episodes", "pairs"})  # counted up, not averaged


def sums(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(sum, count) pairs on the host, everything fetched in one go; a plain number counts once."""
    host = jax.tree.map(to_host, jax.device_get(dict(metrics)))
    pairs = {k: v if isinstance(v, tuple | list) else (v, 1.0) for k, v in host.items()}
    return {name: (float(total), float(count)) for name, (total, count) in pairs.items()}


def averages(metrics: Mapping[str, Any]) -> dict[str, float]:
    """(sum, count) pairs to means, a plain number to itself; fetches everything in one go.

    A pair of TOTALS gives its sum. A count of 0 (nothing of the kind in this batch) gives no entry.
    """
    out: dict[str, float] = {}
    for name, (total, count) in sums(metrics).items():
        if name in TOTALS:
            out[name] = total
        elif count != 0.0:
            out[name] = total / count
    return out


class MetricWriter:
    """Writes one run's metrics and samples; does nothing in any process but the first."""

    def __init__(
        self,
        folder: str | Path,
        *,
        track: Iterable[str] = (),
        start: int = 0,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        announce: Callable[[str], None] = print,
    ):
        """Opens the files of a run directory.

        Args:
            track: "wandb" sends everything there too, if installed; "tensorboard" is always on.
            start: the step resumed from: later lines of the files are removed, at 0 all of them.
            name, config: what a tracker shows of the run.
        """
        self.folder = Path(folder)
        self.primary = jax.process_index() == 0
        self._announce = announce
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._wandb: Any = None
        if not self.primary:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in ("metrics.jsonl", "samples.jsonl"):
                truncate(self.folder / file, start)
                self._files[file] = open(self.folder / file, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        with self._never_stop("TensorBoard"):
            from tensorboardX import SummaryWriter

            # purge_step hides what a killed run wrote past the step it is resumed from.
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        if "wandb" in track:
            with self._never_stop("W&B"):
                wandb = importlib.import_module("wandb")
                self._wandb = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "jaxrlhf"),
                    name=name or self.folder.name,
                    id=_run_id(self.folder),
                    resume="allow",
                    dir=str(self.folder),
                    config=dict(config or {}),
                )

    def write(self, step: int, values: Mapping[str, Any], split: str = "train") -> None:
        """One line: numbers as they are, (sum, count) pairs averaged, NaN and infinity as null."""
        if not self.primary:
            return
        values = averages(values)
        self._line("metrics.jsonl", {"step": step, "split": split, **values})
        finite = {
            k if k.startswith("time/") else f"{split}/{k}": v
            for k, v in values.items()
            if math.isfinite(v)
        }
        if self._board is not None:
            with self._never_stop("TensorBoard"):
                for k, v in finite.items():
                    self._board.add_scalar(k, v, step)
        if self._wandb is not None:
            with self._never_stop("W&B"):
                self._wandb.log({**finite, "step": step}, step=step)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds texts to samples.jsonl: prompt, completion, scores, length, finish_reason."""
        for row in rows:
            if self.primary:
                self._line("samples.jsonl", {"step": step, **row})

    def flush(self) -> None:
        """To the disk, so that a checkpoint never knows of a step that the log does not."""
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise _unwritable(self.folder, e) from e

    def close(self) -> None:
        """Ends the record; safe to call twice."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._board is not None:
            with self._never_stop("TensorBoard"):
                self._board.close()
        if self._wandb is not None:
            with self._never_stop("W&B"):
                self._wandb.finish()
        self._files, self._board, self._wandb = {}, None, None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self, file: str, content: dict[str, Any]) -> None:
        try:
            text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)
            self._files[file].write(text + "\n")
            self._files[file].flush()
        except OSError as e:
            raise _unwritable(self.folder / file, e) from e

    @contextlib.contextmanager
    def _never_stop(self, what: str) -> Iterator[None]:
        """A tracker that fails is said so once and left out; training goes on."""
        try:
            yield
        except Exception as e:  # whatever a tracker can raise
            if what == "W&B":
                self._wandb = None
            else:
                self._board = None
            hint = " (pip install 'jaxrlhf[track]')" if isinstance(e, ImportError) else ""
            self._announce(f"{what} is off for this run: {type(e).__name__}: {e}{hint}")


def truncate(path: Path, step: int) -> None:
    """Removes the lines of a .jsonl file that speak of a later step, and a last line cut short.

    At step 0 nothing has been done yet and everything goes.
    """
    if not path.exists():
        return
    kept = []
    if step > 0:
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as f:
        f.writelines(kept)
        f.flush()
        os.fsync(f.fileno())
    os.replace(new, path)


def last_values(folder: str | Path) -> dict[str, float]:
    """The last number of each kind in metrics.jsonl, evaluation under "eval/"; no times."""
    path = Path(folder) / "metrics.jsonl"
    found: dict[str, float] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        prefix = "" if content.pop("split") == "train" else "eval/"
        del content["step"]
        kept = {k: v for k, v in content.items() if v is not None and not k.startswith("time/")}
        found.update({prefix + k: v for k, v in kept.items()})
    return found


def _finite(x: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(x, Mapping):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _run_id(folder: Path) -> str:
    """The tracker's id of this run, the same after a resume."""
    file = folder / "tracker_id"
    if not file.exists():
        file.write_text(os.urandom(8).hex())
    return file.read_text().strip()


def _unwritable(path: Path, e: OSError) -> JaxrlhfError:
    return JaxrlhfError(
        f"cannot write {path}: {e.strerror}. Free some space or give another --output; "
        "what has been saved so far is untouched and the run can be resumed"
    )
