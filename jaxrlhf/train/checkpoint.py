# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: Orbax writes the arrays, a manifest of digests says whether they can be trusted.

    checkpoints/STEP/params/       the parameters alone: all that a next stage reads
    checkpoints/STEP/train/        step, optimizer state and everything else that moves
    checkpoints/STEP/meta.json     what the run says about itself (model config, stage, parents...)
    checkpoints/STEP/manifest.json SHA-256 of every file, content digest of the parameters

Orbax survives a kill at any time, but reads flipped bits without a word and reports a failed
asynchronous save only when asked. So the manifest is written last, after the parameters have been
read back and compared; a folder without one that verifies is not a checkpoint; "latest" is
computed, never pointed to; older checkpoints go only after the new one is known to be good. What
cannot be judged (a later version wrote it, the disk could not be read) is an error, not damage;
what is damaged is moved aside to checkpoints/STEP.damaged by the next save.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf.errors import CheckpointError
from jaxrlhf.parallel.distributed import barrier
from jaxrlhf.train.digest import content_digest, named_leaves
from jaxrlhf.train.signals import crash_point
from jaxrlhf.train.state import TrainState
from jaxrlhf.types import Params

MANIFEST = "manifest.json"
META = "meta.json"
DAMAGED = ".damaged"
VERSION = 2  # 1: the optimizer state held the schedule's counter


class UnjudgedError(CheckpointError):
    """Whether a checkpoint is good cannot be said: a later version's, or it could not be read."""


class Checkpoints:
    """The checkpoints of one run directory. Every process makes one and calls it alike."""

    def __init__(
        self,
        folder: str | Path,
        *,
        meta: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        best: str | None = None,
        best_mode: str = "max",
        keep_best: int = 1,
        announce: Callable[[str], None] = print,
    ):
        """Looks at `folder/checkpoints`, which need not exist: nothing is written before a save.

        Args:
            folder: the run directory.
            meta: goes into meta.json of every checkpoint.
            keep_last: how many of the newest to keep.
            best: an evaluation metric by which the best `keep_best` are kept as well.
            best_mode: "max" or "min".
        """
        if best_mode not in ("max", "min") or keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"{best_mode=} must be max or min, {keep_last=} >= 1, {keep_best=} >= 0"
            )
        self.folder = Path(folder).resolve() / "checkpoints"  # Orbax wants absolute paths
        self.meta = dict(meta or {})
        self.keep_last, self.keep_best = keep_last, keep_best
        self.best_metric, self.best_mode = best, best_mode
        self._announce = announce if jax.process_index() == 0 else lambda message: None
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._restored: int | None = None
        self._damaged: set[int] = set()
        self._ready = False

    # -- looking ---------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first; whether they verify is another question."""
        if not self.folder.is_dir():
            return []
        found = [
            p for p in self.folder.iterdir() if p.name.isdecimal() and (p / MANIFEST).is_file()
        ]
        return sorted(int(p.name) for p in found)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of one checkpoint.

        Raises:
            UnjudgedError: it could not be read just now, or a later version of jaxrlhf wrote it.
            CheckpointError: it is missing or damaged.
        """
        path = self.path(step) / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            good = isinstance(found, dict) and found.pop("sha256", "") == _json_digest(found)
        except (FileNotFoundError, ValueError):
            good = False
        except OSError as e:
            raise _unreadable(path, e) from e
        if not good:
            raise CheckpointError(f"{path} is missing or damaged")
        if found["version"] > VERSION:
            raise UnjudgedError(
                f"{path} has format version {found['version']}, this jaxrlhf knows {VERSION}: "
                "update jaxrlhf to read it"
            )
        return found

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint's files, one line each; an empty list = nothing.

        Raises:
            UnjudgedError: that cannot be said, see `manifest`.
        """
        try:
            files = self.manifest(step)["files"]
        except UnjudgedError:
            raise
        except CheckpointError as e:
            return [str(e)]
        wrong = []
        for name, want in files.items():
            path = self.path(step) / name
            try:
                if (size := path.stat().st_size) != want["bytes"]:
                    wrong.append(f"{path} has {size} bytes instead of {want['bytes']}")
                elif _file_digest(path) != want["sha256"]:
                    wrong.append(f"{path} is damaged (its SHA-256 differs)")
            except (FileNotFoundError, NotADirectoryError):
                wrong.append(f"{path} is missing")
            except OSError as e:
                raise _unreadable(path, e) from e
        return wrong

    def latest(self) -> int | None:
        """The newest step whose every file verifies; says which ones were passed over and why.

        Raises:
            UnjudgedError: whether a newer one is good cannot be said, see `manifest`.
        """
        self.wait()
        return _same_everywhere(self._latest)

    def _latest(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            wrong = self.verify(step)
            if not wrong:
                if self._damaged:
                    self._announce(f"falling back to the checkpoint of step {step}")
                return step
            self._damaged.add(step)
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            self._announce(f"checkpoint of step {step} is not used: {wrong[0]}{more}")
        return None

    def best(self) -> int | None:
        """The kept step with the best value of the `best` metric; None where none has one."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _ranked(self) -> list[int]:
        if self.best_metric is None:
            return []
        values = {}
        for step in self.steps():
            try:
                value = self.manifest(step)["metrics"].get(self.best_metric)
            except UnjudgedError:
                raise
            except CheckpointError:
                continue
            if value is not None and math.isfinite(value):
                values[step] = value
        sign = -1 if self.best_mode == "max" else 1
        return sorted(values, key=lambda step: (sign * values[step], -step))

    # -- saving ----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving and returns once the arrays have left the devices: donating is safe then.

        A save still under way is waited for first.

        Args:
            step: units of work done, the name of the checkpoint.
            metrics: evaluation results to rank it by.
            meta: added to the run's meta for this one.

        Raises:
            CheckpointError: the previous save failed, the disk is too small, or the folder holds
                another run's checkpoints.
        """
        self.wait()
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").addFilter(_not_of_a_thread)
        items = _items(state)
        need = sum(x.nbytes for x in jax.tree.leaves(items))
        try:
            self._prepare(step, need)
            crash_point("before_save", step)
            digest = content_digest(state.params)
            record = {
                "version": VERSION,
                "step": step,
                "content": {"params": digest},
                "metrics": dict(metrics or {}),
                "leaves": {name: [x.dtype.name, list(x.shape)] for name, x in named_leaves(items)},
            }
            response = ocp.save_checkpointables_async(str(self.path(step)), items)
        except CheckpointError:
            raise
        except Exception as e:  # whatever the storage raises
            raise self._failed(step, need, e) from e
        meta = {**self.meta, **(meta or {}), "step": step, "content": {"params": digest}}
        shapes = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _abstract(state.params))
        crash_point("saving", step)

        def finish() -> None:
            try:
                response.result()
                crash_point("written", step)
                if jax.process_count() == 1:
                    back = ocp.load_checkpointables(str(self.path(step)), {"params": shapes})
                    if content_digest(back["params"]) != digest:
                        raise OSError("the parameters read back differ from those saved")
                if jax.process_index() == 0:
                    self._commit(step, record, meta)
                    crash_point("committed", step)
                    self.retain()
                    crash_point("retained", step)
            except Exception as e:
                self._error = self._failed(step, need, e)
                self._error.__cause__ = e

        self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong in the background, if anything did. Cheap: call it every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the save under way is on the disk and verified; raises CheckpointError if not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is None:
                barrier("checkpoint committed")
        self.check()

    def settle(self) -> None:
        """As `wait`, where another error is on its way: says what failed, never raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self._announce(str(self._error))
            self._error = None

    def _prepare(self, step: int, need: int) -> None:
        """Before the first save: nobody else's folder, no debris. Before each: room on the disk."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._ready:
                later = [s for s in self.steps() if self._restored is None or s > self._restored]
                foreign = [s for s in later if self._restored is None and s not in self._damaged]
                if foreign:
                    raise CheckpointError(
                        f"{self.folder} already holds checkpoints of steps "
                        f"{', '.join(map(str, foreign))}, which this run did not resume from: "
                        "resume them (--resume auto) or give another --output"
                    )
                for old in list(self.folder.iterdir()):
                    if not old.is_dir() or old.suffix == DAMAGED:
                        continue
                    if not (old / MANIFEST).exists():  # a save that was killed
                        _remove(old)
                    elif old.name.isdecimal() and int(old.name) in self._damaged:
                        self._move_aside(old)
                    elif old.name.isdecimal() and int(old.name) in later:
                        _remove(old)
            elif self.path(step).exists():
                _remove(self.path(step))
            free = shutil.disk_usage(self.folder).free
            if free < need * 1.05:
                raise CheckpointError(
                    f"not enough space for the checkpoint of step {step} in {self.folder}: "
                    f"needs {need:,} bytes, {free:,} are free. {self._kept()}"
                )
        self._ready = True
        barrier("checkpoint folder ready")

    def _move_aside(self, old: Path) -> None:
        """A damaged checkpoint is no longer one, but what is left of it is not ours to remove."""
        aside = old.with_name(old.name + DAMAGED)
        if aside.exists():
            shutil.rmtree(aside)
        old.rename(aside)
        self._announce(f"the damaged checkpoint is kept as {aside}: remove it once it is of no use")

    def _commit(self, step: int, record: dict[str, Any], meta: dict[str, Any]) -> None:
        path = self.path(step)
        (path / META).write_text(json.dumps(meta, indent=1, sort_keys=True))
        files = {}
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path).as_posix()
            files[name] = {"sha256": _file_digest(file, sync=True), "bytes": file.stat().st_size}
        for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
            _sync_folder(folder)
        content = {**record, "files": files}
        content["sha256"] = _json_digest(content)
        new = path / (MANIFEST + ".new")
        with open(new, "w", encoding="utf-8") as f:
            json.dump(content, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        crash_point("manifest", step)
        os.replace(new, path / MANIFEST)
        _sync_folder(path)
        _sync_folder(self.folder)

    def retain(self) -> None:
        """Removes what is kept no longer. `save` does, once the new one is known to be good.

        Where one of them cannot be judged, all are kept: it may be the best.
        """
        try:
            best = self._ranked()[: self.keep_best]
        except UnjudgedError as e:
            self._announce(f"no checkpoint is removed: {e}")
            return
        keep = {*self.steps()[-self.keep_last :], *best}
        for step in self.steps():
            if step not in keep:
                _remove(self.path(step))

    def _failed(self, step: int, need: int, e: BaseException) -> CheckpointError:
        try:
            free = f"{shutil.disk_usage(self.folder).free:,}"
        except OSError:
            free = "an unknown number"
        reason = " ".join(str(e).split())[:300]
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: "
            f"{type(e).__name__}: {reason}. It needs {need:,} bytes, {free} are free on the disk "
            f"(a quota or file-size limit may be lower). {self._kept()}"
        )

    def _kept(self) -> str:
        steps = self.steps()
        if not steps:
            return "No earlier checkpoint exists. Free some space and start again"
        return f"The checkpoint of step {steps[-1]} is kept. Free some space and resume"

    # -- restoring -------------------------------------------------------------------------------

    def read_meta(self, step: int) -> dict[str, Any]:
        """meta.json of a checkpoint."""
        try:
            return json.loads((self.path(step) / META).read_bytes())
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.path(step) / META} is missing or damaged") from e

    def restore(
        self, abstract_state: TrainState, step: int | None = None
    ) -> tuple[TrainState, int]:
        """The whole state of a checkpoint, to be continued from; saving then goes on from there.

        Args:
            abstract_state: a state of ShapeDtypeStructs; their shardings and dtypes are what comes
                back, on whatever mesh and in whatever dtypes it was saved.
            step: the latest good one by default.

        Returns:
            (state, step).

        Raises:
            CheckpointError: no such checkpoint, damaged files (named), another structure or other
                shapes than `abstract_state` (listed), or the optimizer state of an earlier version.
        """
        step = self._checked(step)
        items = self._load(step, _items(abstract_state))
        self._restored = step
        return TrainState(params=items["params"], **items["train"]), step

    def restore_params(
        self, abstract_params: Params | None = None, step: int | None = None
    ) -> tuple[Params, int]:
        """The parameters alone, for a next stage.

        Args:
            abstract_params: as in `restore`; None gives host arrays, as saved.
            step: the latest good one by default.
        """
        step = self._checked(step)
        if abstract_params is None:
            tree: dict[str, Any] = {}
            for name, (dtype, shape) in self.manifest(step)["leaves"].items():
                first, *keys = name.split("/")
                if first == "params":
                    here = tree
                    for key in keys[:-1]:
                        here = here.setdefault(key, {})
                    here[keys[-1]] = np.empty(shape, jax.numpy.dtype(dtype))
            abstract_params = tree
        return self._load(step, {"params": abstract_params})["params"], step

    def _checked(self, step: int | None) -> int:
        """A step whose files verify: the latest, or the one asked for."""
        if step is None:
            if (step := self.latest()) is None:
                raise CheckpointError(f"{self.folder} holds no good checkpoint")
            return step
        self.wait()
        if not self.path(step).is_dir():
            has = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {has}")
        if wrong := self.verify(step):
            raise CheckpointError("\n".join([f"the checkpoint of step {step} is damaged:", *wrong]))
        return step

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        from orbax.checkpoint import v1 as ocp

        record = self.manifest(step)
        # Orbax hides a mismatch behind "incompatible handler": compare first, say it ourselves.
        have = {
            name: tuple(shape)
            for name, (_, shape) in record["leaves"].items()
            if name.split("/")[0] in abstract
        }
        want = {name: tuple(x.shape) for name, x in named_leaves(abstract)}
        if have != want:
            lines = [f"  {n}: saved {have[n]}, expected nothing" for n in have if n not in want]
            lines += [f"  {n}: not saved, expected {want[n]}" for n in want if n not in have]
            lines += [
                f"  {n}: saved {have[n]}, expected {want[n]}"
                for n in want
                if n in have and have[n] != want[n]
            ]
            more = [f"  and {len(lines) - 12} more"] if len(lines) > 12 else []
            said = "does not fit this run (another model, optimizer or setting?):"
            other = [n for n in {**have, **want} if have.get(n) != want.get(n)]
            if record["version"] < VERSION and all(n.startswith("train/opt_state/") for n in other):
                said = (
                    f"cannot be continued: it has format version {record['version']}, whose "
                    "optimizer states were others. Its parameters can be read: train on in another "
                    f"--output with model.path={self.folder.parent}. The difference:"
                )
            raise CheckpointError("\n".join([f"{self.path(step)} {said}", *lines[:12], *more]))
        loaded = ocp.load_checkpointables(str(self.path(step)), jax.tree.map(_placed, abstract))
        same_dtypes = all(
            record["leaves"][f"params/{name}"][0] == x.dtype.name
            for name, x in named_leaves(abstract["params"])
        )
        if same_dtypes and content_digest(loaded["params"]) != record["content"]["params"]:
            raise CheckpointError(f"{self.path(step)}: the parameters read differ from those saved")
        return loaded


def _not_of_a_thread(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks that Orbax logs from its threads: `wait` raises their errors."""
    return "_SignalingThread.run()" not in str(record.msg)


def _items(state: TrainState) -> dict[str, Any]:
    train = {"step": state.step, "opt_state": state.opt_state, "extra": state.extra}
    return {"params": state.params, "train": train}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _placed(x: Any) -> Any:
    """An abstract leaf that says where it goes; the file's own placement is another machine's."""
    if isinstance(x, np.ndarray):
        return x
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _same_everywhere(find: Callable[[], int | None]) -> int | None:
    """What the first process finds, in every process."""
    if jax.process_count() == 1:
        return find()
    found = find() if jax.process_index() == 0 else None
    agreed = multihost_utils.broadcast_one_to_all(np.int64(-1 if found is None else found))
    return None if int(agreed) < 0 else int(agreed)


def _unreadable(path: Path, e: OSError) -> UnjudgedError:
    return UnjudgedError(
        f"{path} could not be read ({e.strerror or e}), so whether its checkpoint is good is not "
        "known: nothing was changed, call again once it can be read"
    )


def _remove(path: Path) -> None:
    """The manifest first: whatever a kill leaves of the rest is no checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _file_digest(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
