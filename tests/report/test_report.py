# SPDX-License-Identifier: Apache-2.0
"""The report: says the right thing, survives damaged runs, and runs nothing that data says."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import TRUTH, lm_curves, make_pipeline, run_folder, write_json

from jaxrlhf.errors import DataError
from jaxrlhf.evaluation.results import (
    Alarm,
    Bin,
    Calibration,
    Comparison,
    CurvePoint,
    EvalResult,
    Sample,
    write_results,
)
from jaxrlhf.report import write_report
from jaxrlhf.report.chart import number, root_ticks, ticks
from jaxrlhf.report.read import read_run, read_runs

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser's parser would see: tags, attributes, text; unbalanced tags fail."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.parts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.parts.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("runs") / "world")


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    return page(write_report([world], tmp_path_factory.mktemp("out") / "report.html"))


# --- what it says -------------------------------------------------------------------------------


def test_the_headline_names_the_winner_by_gold_with_its_interval(report):
    assert "ppo 0.05 is better than sft" in report.text
    assert re.search(r"gold score went from 0\.4\d+ to 0\.6\d+, a change of \+0\.2\d+", report.text)
    assert "95 % interval" in report.text
    assert re.search(r"wins \d\d % of 512 paired replies \(\d\d to \d\d %\)", report.text)


def test_overoptimisation_and_alarms_are_said(report):
    assert "ppo 0.002 has a higher proxy score than ppo 0.05" in report.text
    assert "collapse, it says the same everywhere" in report.text
    assert "proxy rose by" in report.text


def test_every_section_and_every_model_is_there(report):
    anchors = {a["href"][1:] for tag, a in report.tags if tag == "a"}
    ids = {a["id"] for tag, a in report.tags if tag == "section"}
    assert anchors == ids >= {"reward-kl", "models", "samples", "reward-model", "curves", "lineage"}
    for label in TRUTH:
        assert label in report.text
    for said in ("rl.kl_coef", "bag-of-words floor", "best of n from the base", "jax", "0.10.2"):
        assert said in report.text


def test_a_model_keeps_its_colour_from_plot_to_curve(world):
    from jaxrlhf.report.models import find_models, run_colours

    _, runs = read_runs([world])
    models = find_models(runs)
    colours = run_colours(runs, models)
    assert all(colours[m.label] == m.colour for m in models)
    assert models[0].label == "sft"
    assert models[0].colour == "base"
    trained = [m.colour for m in models[1:]]
    assert len(set(trained)) == len(trained)


@pytest.fixture
def swept(tmp_path):
    """Two runs of one stage, their evaluations under other names, and the base's samples."""

    def curves(step):
        same = {"loss": 1.0 / step, "nll": 1.0 / step, "nonfinite": 0.0, "kl": 0.1 * step}
        return {**same, "reward/valence": float(step), "reward": float(step)}, None

    folder = tmp_path / "swept"
    for i, coef in enumerate((0.1, 0.05)):
        run_folder(folder / f"ppo-{i}", "ppo", 5, {"rl": {"kl_coef": coef}}, curves)
        change = Comparison("objective", "small", 0.1, 0.2, 0.1, (0.05, 0.15), 0.7, (0.6, 0.8), 64)
        metrics = {"proxy": 0.25, "objective": 0.2 + i / 100, "objective/coef": coef, "kl": 0.5}
        run_folder(folder / f"eval-{i}", "eval", 1, {}, lambda step: ({}, None))
        write_results(
            folder / f"eval-{i}",
            [
                EvalResult(
                    model=str(folder / f"ppo-{i}"),
                    label=f"PPO {coef:g}",
                    metrics=metrics,
                    comparisons=(change,),
                )
            ],
        )
    found = {"proxy": 0.1, "optimum/0.05": 0.32, "optimum/0.05/kl": 2.0, "optimum/0.05/proxy": 0.42}
    run_folder(folder / "base", "eval", 1, {}, lambda step: ({}, None))
    base = EvalResult(
        model="small",
        label="base",
        is_baseline=True,
        metrics=found,
        intervals={"optimum/0.05": (0.3, 0.34)},
        curve=(CurvePoint("best_of_n", "best of 2", 0.19, proxy=0.15, n=2),),
    )
    write_results(folder / "base", [base])
    return [folder / name for name in ("ppo-0", "ppo-1", "eval-0", "eval-1", "base")]


def test_the_share_of_the_possible_gain_is_stated(swept, tmp_path):
    # (0.21 - 0.1) / (0.32 - 0.1); of 0.1 the base's samples say nothing
    _, runs = read_runs(swept)
    from jaxrlhf.report.models import find_models

    models = {m.label: m.result for m in find_models(runs)}
    assert models["PPO 0.05"].metrics["objective/share_of_gain"] == pytest.approx(0.5)
    assert models["PPO 0.05"].metrics["objective/optimum"] == 0.32
    assert "objective/share_of_gain" not in models["PPO 0.1"].metrics
    text = page(write_report(swept, tmp_path / "report.html")).text
    assert "share of the possible gain" in text
    assert "50.0 %" in text
    assert "best of 2 0.190 – 0.150" in text
    assert "the optimum at coefficient 0.05 2.00 0.320 0.300 to 0.340 0.420" in text


def test_a_run_has_the_colour_and_the_name_of_the_model_that_came_of_it(swept, tmp_path):
    from jaxrlhf.report.models import find_models, run_colours

    _, runs = read_runs(swept)
    models = {m.label: m for m in find_models(runs)}
    colours = run_colours(runs, list(models.values()))
    assert colours["ppo-0"] == models["PPO 0.1"].colour != models["PPO 0.05"].colour
    assert colours["ppo-1"] == models["PPO 0.05"].colour
    assert "PPO 0.1 (ppo-0)" in page(write_report(swept, tmp_path / "report.html")).text


def test_a_curve_is_drawn_once(swept):
    from jaxrlhf.report.curves import learning_curves
    from jaxrlhf.report.html import h, render
    from jaxrlhf.report.models import find_models

    _, runs = read_runs(swept)
    drawn = render(h("div", learning_curves(runs, find_models(runs)))).decode()
    shown = drawn.split("<table")[0]  # the final figures have them all
    assert ">loss" in shown
    assert "nll" not in shown
    assert "reward/valence" in shown
    assert ">reward<" not in shown
    assert "nonfinite" in drawn
    assert "nonfinite" not in shown.split("<details")[0]


def test_the_same_runs_give_the_same_bytes(world, tmp_path):
    first = write_report([world], tmp_path / "a.html").read_bytes()
    assert write_report([world], tmp_path / "b.html").read_bytes() == first
    assert write_report([world], tmp_path) == tmp_path / "report.html"


def test_two_pipelines_side_by_side_keep_their_names_apart(world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world, other)
    got = page(write_report([world, other], tmp_path / "r.html"))
    assert "world / sft" in got.text
    assert "other / sft" in got.text


def result(delta, interval, **extra):
    change = Comparison("gold", "sft", 0.5, 0.5 + delta, delta, interval, 0.5, (0.4, 0.6), 100)
    metrics = {"gold": 0.5 + delta, **extra}
    return EvalResult("m", label="new", baseline="sft", comparisons=(change,), metrics=metrics)


@pytest.mark.parametrize(
    ("delta", "interval", "said"),
    [
        (0.2, (0.1, 0.3), "new is better than sft"),
        (0.2, (-0.1, 0.5), "No clear difference from sft yet"),
        (-0.2, (-0.3, -0.1), "No model is better than sft"),
    ],
)
def test_the_verdict_follows_the_interval(tmp_path, delta, interval, said):
    write_results(tmp_path / "run", [result(delta, interval)])
    assert said in page(write_report([tmp_path / "run"], tmp_path / "r.html")).text


def test_lower_is_better_where_it_is(tmp_path):
    change = Comparison("nats_per_token", "base", 2.0, 1.2, -0.8, (-0.9, -0.7))
    found = EvalResult("m", "sft", metrics={"nats_per_token": 1.2}, comparisons=(change,))
    write_results(tmp_path / "run", [found])
    assert "sft is better than base" in page(write_report([tmp_path / "run"], tmp_path)).text


def test_a_proxy_alone_is_called_what_it_is(tmp_path):
    change = Comparison("proxy", "sft", 0.0, 1.0, 1.0, (0.9, 1.1))
    found = EvalResult("m", "ppo", metrics={"proxy": 1.0}, comparisons=(change,))
    write_results(tmp_path / "run", [found])
    assert "says little about quality" in page(write_report([tmp_path / "run"], tmp_path)).text


@pytest.mark.parametrize(
    ("interval", "floor", "said"),
    [
        ((0.68, 0.72), 0.6, "knows more than a bag of words"),
        ((0.58, 0.82), 0.6, "is not clearly better than a bag of words"),
        ((0.68, 0.72), 0.8, "does not beat a bag of words"),
    ],
)
def test_a_reward_model_alone_is_held_against_its_floors(tmp_path, interval, floor, said):
    metrics = {"accuracy": 0.7, "accuracy/bag_of_words": floor, "accuracy/longer_wins": 0.55}
    found = EvalResult("m", "rm", count=9, metrics=metrics, intervals={"accuracy": interval})
    write_results(tmp_path / "run", [found])
    assert said in page(write_report([tmp_path / "run"], tmp_path / "r.html")).text


# --- what is missing ----------------------------------------------------------------------------


def test_a_run_without_evaluation_reports_its_curves_and_says_so(tmp_path):
    import numpy as np

    curves = lm_curves(np.random.default_rng(0), 6.0, 2.0, 50)
    run = run_folder(tmp_path / "sft", "sft", 50, {"a": 1}, curves)
    got = page(write_report([run], tmp_path / "r.html"))
    assert "sft: eval loss fell" in got.text
    assert "No run has an eval.json" in got.text


def test_an_empty_folder_is_a_report_too(tmp_path):
    (tmp_path / "run").mkdir()
    got = page(write_report([tmp_path / "run"], tmp_path / "r.html"))
    assert "Nothing to show yet" in got.text
    for file in ("summary.json", "metrics.jsonl", "config.yaml"):
        assert f"{file}: not there" in got.text


def test_a_cut_last_line_and_a_broken_one_are_told_apart(tmp_path):
    rows = '{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "loss": NaN}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(rows)
    run = read_run(tmp_path, "run")
    assert len(run.curves["loss"]["train"]) == 2
    said = " ".join(run.missing)
    assert "the last line is cut" in said
    assert "1 unreadable line left out" in said
    got = page(write_report([tmp_path], tmp_path / "r.html"))
    assert "not finite at 2" in got.text


DAMAGE = ["", "{", "[]", "null", "3", '{"stages": 3}', "\x00\xff", '{"a": [[[', "[" * 3_000]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file", ["pipeline.json", "sft/summary.json", "sft/metrics.jsonl", "sft/config.yaml",
             "sft/environment.json", "sft/samples.jsonl", "eval sft/eval.json"],
)  # fmt: skip
def test_no_damage_to_one_file_stops_the_report(small, tmp_path, file, damage):
    copy = tmp_path / "world"
    shutil.copytree(small, copy)
    (copy / file).write_text(damage, encoding="latin-1")
    page(write_report([copy], tmp_path / "r.html"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline of two stages, quick to copy."""
    import numpy as np

    folder = tmp_path_factory.mktemp("small") / "world"
    curves = lm_curves(np.random.default_rng(0), 3.0, 2.0, 5)
    run_folder(folder / "sft", "sft", 5, {"a": 1}, curves)
    write_results(folder / "eval sft", [result(0.2, (0.1, 0.3), kl=1.0)])
    stages = [{"name": n, "stage": n.split()[0], "dir": n} for n in ("sft", "eval sft")]
    write_json(folder / "pipeline.json", {"stages": stages})
    return folder


def test_hostile_types_inside_valid_json_do_not_stop_the_report(small, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(small, copy)
    odd = {"stages": [3, {"name": ["x"], "stage": {}, "dir": 5, "seconds": "x", "parents": 7}, {}]}
    write_json(copy / "pipeline.json", odd)
    page(write_report([copy], tmp_path / "a.html"))
    write_json(copy / "pipeline.json", {"stages": [{"name": "sft", "parents": [[], {}, None]}]})
    row = {"step": 1, "loss": [1], "kl": "x", "big": 10**400, "flag": True, "none": None}
    (copy / "sft" / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": "x", "loss": 1}\n')
    write_json(copy / "sft" / "summary.json", {"stage": [], "steps_done": {}, "parents": {"a": 3}})
    sample = {"prompt": 3, "completion": "x", "scores": [1], "step": {}}
    (copy / "sft" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page(write_report([copy], tmp_path / "b.html"))


def test_runs_are_linked_by_content_whatever_their_folders_are_called(tmp_path):
    import numpy as np
    from made_up_runs import digest

    curves = lm_curves(np.random.default_rng(0), 3.0, 2.0, 5)
    run_folder(tmp_path / "first", "sft", 5, {}, curves)
    second = run_folder(tmp_path / "second", "dpo", 5, {}, curves, ["first"])
    summary = json.loads((second / "summary.json").read_text())
    summary["parents"]["data.train"] = digest("a file")
    write_json(second / "summary.json", summary)
    _, runs = read_runs([tmp_path / "first", second])
    assert runs[1].parents == ("first", f"data.train {digest('a file')[:8]}")
    got = page(write_report([tmp_path / "first", second], tmp_path / "r.html"))
    assert any(tag == "svg" and a.get("class") == "dag" for tag, a in got.tags)
    assert "loss, held out" in got.text


def test_unfinished_runs_are_named(tmp_path):
    run = tmp_path / "ppo"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    summary = {"stage": "ppo", "steps_done": 2, "steps_planned": 9, "exit_reason": "stopped"}
    write_json(run / "summary.json", summary)
    got = page(write_report([run], tmp_path / "r.html")).text
    assert "1 run is not finished: ppo (stopped)" in got
    assert "2 of 9" in got


def test_metrics_that_are_not_numbers_and_constants_are_shown_as_such(tmp_path):
    nan = float("nan")
    metrics = {"gold": nan, "proxy": float("inf"), "kl": nan, "perplexity": 1e300, "x": -1e-12}
    change = Comparison("gold", "sft", nan, nan, nan, (nan, nan), nan, (nan, nan), 0)
    point = CurvePoint("optimum", "o", nan, nan, float("inf"))
    write_results(
        tmp_path / "run",
        [EvalResult("m", metrics=metrics, comparisons=(change,), curve=(point,),
                    intervals={"gold": (nan, nan), "proxy": (-float("inf"), 1.0)},
                    calibration=Calibration((), nan, nan, 0))],
    )  # fmt: skip
    rows = [f'{{"step": {i}, "loss": 2.0, "only": null}}' for i in range(9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    got = page(write_report([tmp_path / "run"], tmp_path / "r.html")).text
    assert "NaN" in got
    assert "2.00 throughout" in got


def test_no_such_run_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such run directory"):
        write_report([tmp_path / "nothing"], tmp_path / "r.html")
    with pytest.raises(DataError, match="no run given"):
        write_report([], tmp_path / "r.html")


# --- what data cannot do ------------------------------------------------------------------------

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<iframe src=javascript:alert(1)>",
    "]]><b>x</b><!-- comment -->",
    "&lt;script&gt; &#60;b&#62; &amp;",
    "[x](javascript:alert(1)) http://evil.example/x.png",
    "{{7*7}} ${7*7} <%= 7 %>",
    "\u202eevil\u202c \x00\x1b[31m \ud800",
    "<meta http-equiv=refresh content=0>",
    "</textarea></pre></p></div></main><base href=//evil>",
]


def poisoned(folder: Path, text: str) -> Path:
    """A pipeline with `text` wherever data has a place for a string."""
    run = folder / "run"
    run.mkdir(parents=True)
    rows = [{"step": i, "split": text, "loss": 1.0 / (i + 1), text: i * 1.0} for i in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sample = {"step": 1, "prompt": text, "completion": text, "scores": {text: 1.0}}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "config.yaml").write_text(json.dumps({"stage": text, text: text, "a": text}))
    write_json(run / "environment.json", {text: text})
    write_json(run / "summary.json", {"stage": text, "status": text, "parents": {text: text},
                                      "content": text})  # fmt: skip
    entry = {"stage": text, "dir": "run", "status": text, "seconds": 1}
    write_json(
        folder / "pipeline.json",
        {
            "stages": [
                {"name": "a" + text, **entry},
                {"name": text, "parents": ["a" + text], **entry},
            ]
        },
    )
    around = {"gold": (0.4, 0.6), "proxy": (0.4, 0.6), text: (0.0, 1.0)}
    write_results(
        run,
        [
            EvalResult(
                text, label=text, is_baseline=base, baseline=text, count=3,
                names={"gold": text, "proxy": text}, notes=(text,), intervals=around,
                metrics={"gold": 0.5, "proxy": 0.5, "kl": 1.0, "accuracy": 0.7, text: 1.0},
                comparisons=(Comparison("gold", text, 0.1, 0.5, 0.4, (0.3, 0.5), 0.5),),
                calibration=Calibration((Bin(0.5, 1.0, 3, 0.7, 0.8),), 0.1, 0.8, 3),
                curve=(CurvePoint(text, text, 2.0, 0.5, 0.4),),
                alarms=(Alarm(text, text, text),),
                samples=(Sample(text, text, {text: 1.0}, 3, text, text, {text: 0.0}),),
            )
            for base in (True, False)
        ],
    )  # fmt: skip
    return folder


def skeleton(found: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in found.tags]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_data_becomes_text_and_never_a_tag_or_an_attribute(tmp_path, payload):
    harmless = page(write_report([poisoned(tmp_path / "a", "harmless")], tmp_path / "a.html"))
    attacked = page(write_report([poisoned(tmp_path / "b", payload)], tmp_path / "b.html"))
    assert skeleton(attacked) == skeleton(harmless)
    for tag, attributes in attacked.tags:
        assert tag not in {"script", "iframe", "img", "base", "link", "object", "form", "embed"}
        assert not any(name.startswith("on") for name in attributes)
        assert not {"style", "src", "srcdoc", "action", "xlink:href"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
        # Classes come from us alone.
        assert re.fullmatch(r"[a-z0-9 -]*", attributes.get("class", ""))


def test_what_was_said_is_shown_in_full(tmp_path):
    got = page(write_report([poisoned(tmp_path / "a", PAYLOADS[0])], tmp_path / "a.html"))
    assert got.text.count("<script>alert(1)</script>") > 10


def test_control_characters_and_half_surrogates_are_made_visible(tmp_path):
    path = write_report([poisoned(tmp_path / "a", "x\x00\x1b[31m\ud800y")], tmp_path / "a.html")
    data = path.read_bytes()
    assert b"\x00" not in data
    assert b"\x1b" not in data
    assert "x\ufffd\ufffd[31m" in data.decode("utf-8")


def test_the_policy_allows_our_one_style_sheet_and_nothing_else(world, tmp_path):
    html = write_report([world], tmp_path / "r.html").read_text()
    policy = next(a["content"] for t, a in Page(html).tags if "http-equiv" in a)
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert html.count("<style") == 1
    assert "@import" not in style
    assert "url(" not in style
    assert "<script" not in html
    # The policy comes before anything it has to govern.
    assert html.index("Content-Security-Policy") < html.index("<style") < html.index("<body")


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (-0.0456, "−0.0456"), (12.34, "12.3"), (1234.5, "1,234"),
     (999.6, "1,000"), (1.2e9, "1.20e9"), (3e-7, "3.00e−7"), (None, "–"), (float("nan"), "NaN"),
     (float("-inf"), "−∞")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3.2, 4.9) == pytest.approx([-2, 0, 2, 4])
    assert ticks(5, 5) == [5]
    assert root_ticks(34)[0] == 0
    assert all(t <= 34 for t in root_ticks(34))
    assert 3 < len(root_ticks(34)) < 9


def test_a_long_curve_is_thinned_without_losing_its_nan():
    from jaxrlhf.report.chart import Point, thin_out

    points = [Point(i, float("nan") if i == 5000 else 1.0) for i in range(10_000)]
    thin = thin_out(points)
    assert len(thin) <= 241
    assert sum(p.y != p.y for p in thin) == 1
