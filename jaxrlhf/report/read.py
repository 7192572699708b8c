# SPDX-License-Identifier: Apache-2.0
"""Run directories as they are found: finished, running, killed or damaged.

Nothing here raises over content. What cannot be read is left out and said in `Run.missing`.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.errors import DataError
from jaxrlhf.evaluation.results import EvalResult, read_results

# {metric: {split: [(step, value), ...]}}
Curves = dict[str, dict[str, list[tuple[float, float]]]]


@dataclass(frozen=True)
class Run:
    """One stage's folder, read."""

    name: str
    folder: Path
    stage: str = ""
    status: str = "unfinished"
    seconds: float | None = None
    parents: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # flat: {"optim.learning_rate": 1e-3}
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)  # flat
    curves: Curves = field(default_factory=dict)
    samples: tuple[dict[str, Any], ...] = ()
    results: tuple[EvalResult, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run says of itself that it did all it had planned."""
        return self.status in ("done", "skipped", "finished")


def read_runs(folders: list[Path]) -> tuple[str, list[Run]]:
    """A title and the runs of all `folders`, pipelines opened up into their stages."""
    if not folders:
        raise DataError("report: no run given; jaxrlhf report RUN [RUN...]")
    runs: list[Run] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such run directory; give a folder under runs/")
        name = folder.resolve().name
        if (folder / "pipeline.json").is_file():
            stages = _read_pipeline(folder)
            prefix = f"{name} / " if len(folders) > 1 else ""
            for run in stages:
                parents = tuple(prefix + p for p in run.parents)
                runs.append(replace(run, name=prefix + run.name, parents=parents))
        else:
            runs.append(read_run(folder, name))
    seen: dict[str, int] = {}
    for i, run in enumerate(runs):
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            runs[i] = replace(run, name=f"{run.name} ({seen[run.name]})")
    title = ", ".join(folder.resolve().name for folder in folders[:3])
    runs = _with_parents(runs)
    return title + (f" and {len(folders) - 3} more" if len(folders) > 3 else ""), runs


def _read_pipeline(folder: Path) -> list[Run]:
    data, problem = _json(folder / "pipeline.json")
    stages = data.get("stages") if isinstance(data, dict) else None
    runs = []
    for entry in stages if isinstance(stages, list) else []:
        if not isinstance(entry, dict):
            continue
        name = str(entry.get("name") or entry.get("stage") or "stage")
        place = Path(str(entry.get("dir") or name))
        place = place if place.is_absolute() else folder / place
        run = read_run(place, name)
        seconds = _number(entry.get("seconds"))
        runs.append(
            replace(
                run,
                stage=str(entry.get("stage") or run.stage),
                status=str(entry.get("status") or run.status),
                seconds=run.seconds if seconds is None else seconds,
                parents=_names(entry.get("parents")) or run.parents,
            )
        )
    if not runs:  # damaged: the folders still say a lot
        found = sorted(p for p in folder.iterdir() if p.is_dir())
        runs = [read_run(p, p.name) for p in found if any((p / f).is_file() for f in FILES)]
        said = problem or "it names no stage"
        runs.append(Run(folder.resolve().name, folder, missing=(f"pipeline.json: {said}",)))
    return runs


FILES = ("summary.json", "metrics.jsonl", "config.yaml", "eval.json", "samples.jsonl")


def read_run(folder: Path, name: str) -> Run:
    """One run directory; `folder` may lack any file, or be missing itself."""
    missing: list[str] = []
    if not folder.is_dir():
        return Run(name, folder, status="missing", missing=("the folder does not exist",))

    summary, problem = _json(folder / "summary.json")
    if problem:
        missing.append(f"summary.json: {problem}")
    summary = summary if isinstance(summary, dict) else {}
    environment, problem = _json(folder / "environment.json")
    if problem and problem != "not there":
        missing.append(f"environment.json: {problem}")

    text, config = "", {}
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        loaded = yaml.safe_load(text)
        config = flatten(loaded) if isinstance(loaded, dict) else {}
    except OSError:
        missing.append("config.yaml: not there")
    except (yaml.YAMLError, RecursionError, ValueError):
        missing.append("config.yaml: no YAML")

    results: tuple[EvalResult, ...] = ()
    if (folder / "eval.json").is_file():
        try:
            results = tuple(read_results(folder / "eval.json"))
        except (DataError, OSError) as error:
            missing.append(f"eval.json: {str(error).split(': ', 1)[-1]}")

    rows, notes = _jsonl(folder / "metrics.jsonl")
    curves = _curves(rows)
    if notes != "not there" or not results:
        missing += [f"metrics.jsonl: {notes}"] if notes else []
    samples, notes = _jsonl(folder / "samples.jsonl")
    if notes not in ("", "not there", "empty"):  # not every stage writes samples
        missing.append(f"samples.jsonl: {notes}")

    stage = str(summary.get("stage") or config.get("stage") or ("eval" if results else ""))
    return Run(
        name=name,
        folder=folder,
        stage=stage,
        status=_status(summary, bool(results)),
        seconds=_first(summary, "seconds", "wall_seconds", "time"),
        parents=_names(summary.get("parents")),
        summary=summary,
        config=config,
        config_text=text,
        environment=flatten(environment) if isinstance(environment, dict) else {},
        curves=curves,
        samples=tuple(samples),
        results=results,
        missing=tuple(missing),
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}; lists stay values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def steps_of(run: Run) -> tuple[float | None, float | None]:
    """(done, planned), as far as the summary or the last line of the metrics tells."""
    done = _first(run.summary, "steps_done", "steps", "step")
    planned = _first(run.summary, "steps_planned", "planned", "planned_steps")
    if done is None:
        steps = [p[0] for split in run.curves.values() for line in split.values() for p in line]
        done = max(steps, default=None)
    return done, planned


def _status(summary: dict[str, Any], evaluated: bool) -> str:
    if not summary:
        return "done" if evaluated else "unfinished"
    done = _first(summary, "steps_done", "steps", "step")
    planned = _first(summary, "steps_planned", "planned", "planned_steps")
    if done is not None and planned is not None:
        return "done" if done >= planned else str(summary.get("exit_reason") or "unfinished")
    return str(summary.get("status") or summary.get("exit_reason") or "done")


def _json(path: Path) -> tuple[Any, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace")), ""
    except FileNotFoundError:
        return None, "not there"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({type(error).__name__})"


def _jsonl(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows that can be read, and what has to be said about the others."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return [], "not there"
    rows, bad, cut = [], 0, False
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
            rows.append(row)
        except (ValueError, AssertionError, RecursionError):
            cut = i == len(lines) - 1  # no newline after it: still being written
            bad += not cut
    notes = ["the last line is cut; left out"] * cut
    notes += [f"{bad} unreadable line{'s' * (bad > 1)} left out"] * (bad > 0)
    notes += ["empty"] * (not rows and not notes)
    return rows, ", ".join(notes)


def _curves(rows: list[dict[str, Any]]) -> Curves:
    curves: Curves = {}
    for row in rows:
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        split = str(row.get("split") or "train")
        for name, value in row.items():
            if name in ("step", "split") or name.startswith("time/"):
                continue
            # Strict writers spell NaN as null: the point is there and is not a number.
            value = math.nan if value is None else _number(value)
            if value is not None:
                curves.setdefault(name, {}).setdefault(split, []).append((step, value))
    for splits in curves.values():
        for line in splits.values():
            line.sort(key=lambda point: point[0])
    return curves


def _number(value: Any) -> float | None:
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _first(data: dict[str, Any], *names: str) -> float | None:
    return next((n for name in names if (n := _number(data.get(name))) is not None), None)


def _names(parents: Any) -> tuple[str, ...]:
    """Parents as a pipeline lists them: names, or {"name": ...}."""
    if not isinstance(parents, list):
        return ()
    names = [p.get("name") if isinstance(p, dict) else p for p in parents]
    return tuple(name for name in names if isinstance(name, str) and name)


def _with_parents(runs: list[Run]) -> list[Run]:
    """Parents that a summary gives by content, {setting: digest}, as the runs they came from."""
    made = {digest: run.name for run in runs if (digest := content_of(run))}
    found = []
    for run in runs:
        given = run.summary.get("parents")
        if not run.parents and isinstance(given, dict):
            said = ((str(key), str(digest)) for key, digest in given.items())
            names = [made.get(digest) or f"{key} {digest[:8]}" for key, digest in said]
            run = replace(run, parents=tuple(n for n in dict.fromkeys(names) if n != run.name))
        found.append(run)
    return found


def content_of(run: Run) -> str:
    """The content digest of what a run made, or "" where it is not known."""
    digest = run.summary.get("content")
    return digest if isinstance(digest, str) else ""
