# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found out, and its file `eval.json`: the contract of stages and report.

A stage fills one `EvalResult` for each model it judged and calls `write_results(folder, [...])`;
the report calls `read_results(path)`. JSON has no NaN: a number that is not finite is written as
null (NaN) or as the string "Infinity" / "-Infinity", and read back as the same float.

    {"stage": "eval", "model": str, "label": str, "baseline": str, "is_baseline": bool,
     "count": int, "names": {"proxy": "reward model", "gold": "gold scorer"},
     "metrics": {name: float}, "intervals": {name: [low, high]}, "level": 0.95,
     "comparisons": [{"metric", "baseline", "before", "after", "delta", "interval", "win_rate",
                      "win_rate_interval", "count"}],
     "calibration": {"bins": [{"low", "high", "count", "confidence", "accuracy"}], "ece",
                     "accuracy", "count"} | null,
     "curve": [{"series", "label", "kl", "proxy", "gold", "objective", "distinct_2", "n", "coef",
                "intervals": {name: [low, high]}}],
     "alarms": [{"name", "severity", "message", "before", "after"}],
     "samples": [{"prompt", "completion", "scores", "length", "finish_reason",
                  "baseline_completion", "baseline_scores"}],
     "notes": [str]}

A file with several models is {"stage": "eval", "results": [the object above, ...]}.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf.errors import DataError

Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: `unit` behind numbers and axes, `better` "higher", "lower" or ""."""

    title: str
    unit: str = ""
    better: str = ""
    percent: bool = False


# The names evaluations and training stages share. A name not listed here is shown as it is.
METRICS = {
    "gold": Metric("gold score", "", "higher"),
    "proxy": Metric("proxy score", "", "higher"),
    "objective": Metric("objective J = reward - coef x KL", "", "higher"),
    "objective/coef": Metric("KL coefficient of J"),
    "objective/optimum": Metric("largest possible J at this coefficient"),
    "objective/share_of_gain": Metric("share of the possible gain", "", "higher", percent=True),
    "reward": Metric("reward", "", "higher"),
    "valence": Metric("valence", "", "higher"),
    "win_rate": Metric("win rate", "", "higher", percent=True),
    "kl": Metric("KL to the reference", "nats per completion"),
    "entropy": Metric("entropy", "nats per token"),
    "nats_per_token": Metric("loss", "nats per token", "lower"),
    "perplexity": Metric("perplexity", "", "lower"),
    "bits_per_byte": Metric("loss", "bits per byte", "lower"),
    "accuracy": Metric("pair accuracy", "", "higher", percent=True),
    "accuracy/ceiling": Metric("best possible pair accuracy", "", "", percent=True),
    "accuracy/bag_of_words": Metric("bag-of-words floor", "", "", percent=True),
    "accuracy/longer_wins": Metric("longer-wins rule", "", "", percent=True),
    "accuracy/when_longer": Metric("accuracy where chosen is longer", "", "higher", percent=True),
    "accuracy/when_shorter": Metric("accuracy where chosen is shorter", "", "higher", percent=True),
    "pair_loss": Metric("pair loss", "nats per pair", "lower"),
    "ece": Metric("expected calibration error", "", "lower"),
    "ece/bag_of_words": Metric("calibration error of the bag of words", "", ""),
    "brier": Metric("Brier score", "", "lower"),
    "length_bias/correlation": Metric("correlation of score and length"),
    "length_bias/margin_correlation": Metric("correlation of margin and length difference"),
    "length_bias/prefers_longer": Metric("prefers the longer one", percent=True),
    "completions/mean_length": Metric("mean length", "tokens"),
    "completions/median_length": Metric("median length", "tokens"),
    "completions/std_length": Metric("spread of length", "tokens"),
    "completions/min_length": Metric("shortest", "tokens"),
    "completions/max_length": Metric("longest", "tokens"),
    "completions/eos_rate": Metric("ends by itself (EOS)", percent=True),
    "distinct_1": Metric("distinct-1", "", "higher"),
    "distinct_2": Metric("distinct-2", "", "higher"),
    "repetition": Metric("repeated 4-grams", "", "lower", percent=True),
    "self_bleu": Metric("self-BLEU", "", "lower"),
}


def better(name: str) -> str:
    """Which values of a metric are better: "higher", "lower", or "" where that is not known.

    A part that has no line of its own goes the way of its whole: `gold/NAME` as `gold`.
    """
    whole = METRICS.get(name.partition("/")[0])
    return METRICS.get(name, whole or Metric(name)).better


@dataclass(frozen=True)
class Comparison:
    """One metric of this model against a baseline on the same prompts, paired.

    `delta` = after - before with its interval; `win_rate` counts a tie as half.
    """

    metric: str
    baseline: str
    before: float
    after: float
    delta: float
    interval: Interval | None = None
    win_rate: float | None = None
    win_rate_interval: Interval | None = None
    count: int = 0


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability table; `confidence` and `accuracy` are NaN where it is empty."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of a preference model: see `calibration.reliability` for the definitions."""

    bins: tuple[Bin, ...]
    ece: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class CurvePoint:
    """A point of the reward-against-KL plane.

    `series` says which curve it belongs to: "run" (a trained model), "base", "best_of_n",
    "optimum" (the best any policy can do at that KL, from base samples); points of one series are
    joined in order of KL. `kl` is in nats per completion; `intervals` has the field names as keys.
    """

    series: str
    label: str
    kl: float
    proxy: float | None = None
    gold: float | None = None
    objective: float | None = None
    distinct_2: float | None = None
    n: int | None = None
    coef: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Alarm:
    """Something a reader must know before believing the headline; severity "warning" or "alarm"."""

    name: str
    severity: str
    message: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Sample:
    """One completion, beside the baseline's completion of the same prompt where there is one."""

    prompt: str
    completion: str
    scores: dict[str, float] = field(default_factory=dict)
    length: int | None = None
    finish_reason: str | None = None
    baseline_completion: str | None = None
    baseline_scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Everything one evaluation says about one model.

    Attributes:
        model: what was judged: a path or name, as the user gave it.
        label: short name for plots and tables; the run's (stage's) own name where there is one.
        is_baseline: True for the model the others are measured against.
        baseline: label of the model that `comparisons` and `samples` are measured against.
        count: completions or pairs judged.
        names: what "proxy" and "gold" are here, for axis labels ({"proxy": "reward model"}).
        metrics: {name: value}; names as in `METRICS` where they fit.
        intervals: {name: (low, high)} at `level`, for any of `metrics`.
        curve: points besides the model's own (best-of-n, optimum...); the model's own point is
            made from metrics "kl", "proxy", "gold".
    """

    model: str
    label: str = ""
    is_baseline: bool = False
    baseline: str = ""
    count: int = 0
    names: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    level: float = 0.95
    comparisons: tuple[Comparison, ...] = ()
    calibration: Calibration | None = None
    curve: tuple[CurvePoint, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values, the layout of this module's docstring."""
        return {"stage": "eval", **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, place: str = "eval.json") -> "EvalResult":
        """The inverse of `to_json`; unknown keys are ignored, so that newer files stay readable.

        Raises DataError, naming `place` and the field, where a value has the wrong type.
        """
        if not isinstance(data, Mapping):
            raise DataError(f"{place}: expected an object, found {type(data).__name__}")
        if not isinstance(data.get("model"), str):
            raise DataError(f"{place}: field model must be a string, found {data.get('model')!r}")
        read = _Reader(place)
        calibration = data.get("calibration")
        return cls(
            model=data["model"],
            label=read.text(data, "label"),
            is_baseline=bool(data.get("is_baseline", False)),
            baseline=read.text(data, "baseline"),
            count=int(read.number(data, "count", 0)),
            names={k: str(v) for k, v in read.mapping(data, "names").items()},
            metrics=read.numbers(data, "metrics"),
            intervals=read.intervals(data, "intervals"),
            level=read.number(data, "level", 0.95),
            comparisons=tuple(read.comparison(x) for x in read.items(data, "comparisons")),
            calibration=read.calibration(calibration) if calibration else None,
            curve=tuple(read.point(x) for x in read.items(data, "curve")),
            alarms=tuple(read.alarm(x) for x in read.items(data, "alarms")),
            samples=tuple(read.sample(x) for x in read.items(data, "samples")),
            notes=tuple(str(x) for x in data.get("notes") or ()),
        )


def write_results(folder: Path | str, results: Sequence[EvalResult]) -> Path:
    """Writes `folder/eval.json`, whole or not at all, and returns its path."""
    if not results:
        raise ValueError("write_results needs at least one EvalResult")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any]
    if len(results) == 1:
        data = results[0].to_json()
    else:
        data = {"stage": "eval", "results": [r.to_json() for r in results]}
    path, part = folder / "eval.json", folder / "eval.json.part"
    # allow_nan=False: a NaN that slipped through must fail here, not in somebody's JSON parser.
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # A tokenizer may emit half a surrogate pair; the file must stay valid UTF-8.
    part.write_bytes((text + "\n").encode("utf-8", "replace"))
    os.replace(part, path)
    return path


def read_results(path: Path | str) -> list[EvalResult]:
    """The results in an `eval.json`, or in the run folder that holds one.

    Raises DataError where the file is missing, is no JSON, or a field has the wrong type.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "eval.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `jaxrlhf eval` writes it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); run the evaluation again") from None
    results = data.get("results", [data]) if isinstance(data, dict) else [data]
    if not isinstance(results, list):
        raise DataError(f"{path}: field results must be a list, found {type(results).__name__}")
    return [EvalResult.from_json(x, place=str(path)) for x in results]


def _plain(value: Any) -> Any:
    """Dataclass contents to JSON values: NumPy scalars to Python's, non-finite floats spelled."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


class _Reader:
    """Typed access to parsed JSON; every error names the file and the field."""

    def __init__(self, place: str):
        self.place = place

    def fail(self, name: str, want: str, value: Any) -> DataError:
        return DataError(f"{self.place}: field {name} must be {want}, found {value!r:.80}")

    def as_number(self, name: str, value: Any) -> float:
        if value is None:
            return math.nan
        if value in ("Infinity", "-Infinity", "NaN") or (
            isinstance(value, int | float) and not isinstance(value, bool)
        ):
            return float(value)
        raise self.fail(name, "a number", value)

    def number(self, data: Mapping, name: str, default: float = math.nan) -> float:
        return self.as_number(name, data[name]) if name in data else default

    def optional(self, data: Mapping, name: str) -> float | None:
        return None if data.get(name) is None else self.as_number(name, data[name])

    def text(self, data: Mapping, name: str, default: str = "") -> str:
        value = data.get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, "a string", value)
        return value

    def optional_text(self, data: Mapping, name: str) -> str | None:
        return None if data.get(name) is None else self.text(data, name)

    def mapping(self, data: Mapping, name: str) -> Mapping[str, Any]:
        value = data.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.fail(name, "an object", value)
        return value

    def items(self, data: Mapping, name: str) -> list[Mapping[str, Any]]:
        value = data.get(name) or []
        if not isinstance(value, list) or not all(isinstance(x, Mapping) for x in value):
            raise self.fail(name, "a list of objects", value)
        return value

    def numbers(self, data: Mapping, name: str) -> dict[str, float]:
        return {k: self.as_number(f"{name}.{k}", v) for k, v in self.mapping(data, name).items()}

    def interval(self, name: str, value: Any) -> Interval:
        if not isinstance(value, list) or len(value) != 2:
            raise self.fail(name, "[low, high]", value)
        return self.as_number(name, value[0]), self.as_number(name, value[1])

    def optional_interval(self, data: Mapping, name: str) -> Interval | None:
        return None if data.get(name) is None else self.interval(name, data[name])

    def intervals(self, data: Mapping, name: str) -> dict[str, Interval]:
        return {k: self.interval(f"{name}.{k}", v) for k, v in self.mapping(data, name).items()}

    def comparison(self, x: Mapping) -> Comparison:
        return Comparison(
            metric=self.text(x, "metric"),
            baseline=self.text(x, "baseline"),
            before=self.number(x, "before"),
            after=self.number(x, "after"),
            delta=self.number(x, "delta"),
            interval=self.optional_interval(x, "interval"),
            win_rate=self.optional(x, "win_rate"),
            win_rate_interval=self.optional_interval(x, "win_rate_interval"),
            count=int(self.number(x, "count", 0)),
        )

    def calibration(self, x: Mapping) -> Calibration:
        bins = tuple(
            Bin(
                self.number(b, "low"),
                self.number(b, "high"),
                int(self.number(b, "count", 0)),
                self.number(b, "confidence"),
                self.number(b, "accuracy"),
            )
            for b in self.items(x, "bins")
        )
        count = int(self.number(x, "count", 0))
        return Calibration(bins, self.number(x, "ece"), self.number(x, "accuracy"), count)

    def point(self, x: Mapping) -> CurvePoint:
        n = self.optional(x, "n")
        return CurvePoint(
            series=self.text(x, "series", "run"),
            label=self.text(x, "label"),
            kl=self.number(x, "kl"),
            proxy=self.optional(x, "proxy"),
            gold=self.optional(x, "gold"),
            objective=self.optional(x, "objective"),
            distinct_2=self.optional(x, "distinct_2"),
            n=None if n is None or not math.isfinite(n) else int(n),
            coef=self.optional(x, "coef"),
            intervals=self.intervals(x, "intervals"),
        )

    def alarm(self, x: Mapping) -> Alarm:
        return Alarm(
            name=self.text(x, "name"),
            severity=self.text(x, "severity", "warning"),
            message=self.text(x, "message"),
            before=self.optional(x, "before"),
            after=self.optional(x, "after"),
        )

    def sample(self, x: Mapping) -> Sample:
        length = self.optional(x, "length")
        return Sample(
            prompt=self.text(x, "prompt"),
            completion=self.text(x, "completion"),
            scores=self.numbers(x, "scores"),
            length=None if length is None or not math.isfinite(length) else int(length),
            finish_reason=self.optional_text(x, "finish_reason"),
            baseline_completion=self.optional_text(x, "baseline_completion"),
            baseline_scores=self.numbers(x, "baseline_scores"),
        )
