# SPDX-License-Identifier: Apache-2.0
"""The loop: resumed = uninterrupted to the bit, however it was stopped; exit codes."""

import json
import random
import signal
import time

import pytest
import toy
from devices import start

from jaxrlhf.errors import ConfigError
from jaxrlhf.train.checkpoint import Checkpoints

POINTS = [
    "step:0",
    "step:2",
    "before_save:3",
    "saving:3",
    "written:3",
    "manifest:3",
    "evaluated:4",
    "committed:6",
    "retained:6",
    "written:9",
    "step:11",
    "evaluated:12",
    "manifest:12",
    "committed:12",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its result and its record."""
    folder = tmp_path_factory.mktemp("whole")
    result = toy.run(folder)
    assert (result["exit_code"], result["reason"], result["step"]) == (0, "done", 12)
    return result, toy.record(folder)


def finish(folder, whole, **kwargs):
    """Runs what is left and demands the uninterrupted run's result, log and checkpoints."""
    result = toy.run(folder, **kwargs)
    assert result["exit_code"] == 0
    same = ("digest", "best", "tokens")
    assert {k: result[k] for k in same} == {k: whole[0][k] for k in same}
    assert toy.record(folder) == whole[1]
    return result


def killed_at(folder, point):
    child = start(toy.run, folder / "out.json", env={"JAXRLHF_CRASH_AT": point}, folder=str(folder))
    text, _ = child.communicate(timeout=240)
    assert child.returncode == -signal.SIGKILL, text


def test_the_record_has_every_step_once_with_the_evaluations_in_place(whole):
    lines, contents = whole[1]
    train = [x["step"] for x in lines if x.get("split") == "train"]
    evals = [x["step"] for x in lines if x.get("split") == "eval"]
    assert train == list(range(1, 13))
    assert evals == [0, 4, 8, 12]
    assert [x["step"] for x in lines if "prompt" in x] == [0, 4, 8, 12]
    assert sorted(contents) == [9, 12]
    assert contents[12][1]["error"] == lines[-5]["error"]  # ranked by its own evaluation
    assert all(x["learning_rate"] > 0 for x in lines if x.get("split") == "train")


def test_killed_three_times_it_ends_the_same(tmp_path, whole):
    for point in ("written:3", "manifest:6", "committed:9"):
        killed_at(tmp_path, point)
    assert finish(tmp_path, whole)["start"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_it_ends_the_same(tmp_path, whole, point):
    killed_at(tmp_path, point)
    finish(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_times_a_good_checkpoint_never_goes_backward(tmp_path, whole, seed):
    rng = random.Random(seed)
    last = 0
    for _ in range(5):
        child = start(toy.run, tmp_path / "out.json", folder=str(tmp_path), pause=0.05)
        time.sleep(rng.uniform(4, 9))
        child.kill()
        child.communicate()
        latest = Checkpoints(tmp_path).latest() or 0
        assert latest >= last
        last = latest
    finish(tmp_path, whole)


@pytest.mark.parametrize("at", [0, 5, 8, 11])
def test_sigterm_finishes_the_step_saves_and_says_resumable(tmp_path, whole, at):
    before = signal.getsignal(signal.SIGTERM)
    result = toy.run(tmp_path, signal_at=[at])
    assert signal.getsignal(signal.SIGTERM) is before
    if at == 11:  # nothing was left to do
        assert (result["exit_code"], result["reason"]) == (0, "done")
    else:
        assert (result["exit_code"], result["reason"]) == (143, "stopped")
        assert result["step"] == at + 1 == result["steps"][-1]
        assert "resumable" in result["message"]
        again = toy.run(tmp_path)
        assert again["start"] == at + 1
        assert again["digest"] == whole[0]["digest"]
    assert toy.record(tmp_path)[0] == whole[1][0]


def exit_code(folder):
    """Steps slow enough that a signal never finds the run at its end."""
    raise SystemExit(toy.run(folder, pause=1.0)["exit_code"])


@pytest.mark.slow
@pytest.mark.parametrize("line", ["compiling", "first step", "eval at 4"])
def test_a_real_sigterm_ends_with_143_and_is_resumed(tmp_path, whole, line):
    child = start(exit_code, tmp_path / "out.json", folder=str(tmp_path))
    assert child.stdout is not None
    while line not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 143, text
    assert "resumable" in text
    assert toy.run(tmp_path)["digest"] == whole[0]["digest"]
    assert toy.record(tmp_path)[0] == whole[1][0]


def test_a_finished_run_called_again_does_nothing(tmp_path, whole):
    toy.run(tmp_path)
    files = sorted(p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    before = [(p, p.stat().st_mtime_ns) for p in files]
    result = finish(tmp_path, whole)
    assert result["start"] == 12
    assert before == [(p, p.stat().st_mtime_ns) for p in files]


def test_resumed_past_a_damaged_checkpoint_it_ends_the_same(tmp_path, whole, capfd):
    toy.run(tmp_path, signal_at=[6])
    data = next((tmp_path / "checkpoints" / "7" / "params" / "d").iterdir())
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    result = finish(tmp_path, whole)
    assert result["start"] == 6
    assert data.name in capfd.readouterr().out


def test_non_finite_steps_are_skipped_counted_and_a_streak_ends_the_run(tmp_path, whole):
    result = toy.run(tmp_path / "few", poison=[2, 3, 7])
    assert result["exit_code"] == 0
    lines, _ = toy.record(tmp_path / "few")
    train = {x["step"]: x for x in lines if x.get("split") == "train"}
    assert [s for s in train if train[s]["nonfinite"]] == [3, 4, 8]
    assert train[3]["loss"] is None
    result = toy.run(tmp_path / "streak", poison=range(5, 12), stop_after_nonfinite=3)
    assert (result["exit_code"], result["reason"]) == (1, "non-finite")
    assert "3 times in a row" in result["message"]
    # Logged one step late, so at most one more was tried; none of them moved the parameters,
    # and the last checkpoint is from before.
    assert result["step"] in (8, 9)
    good = json.loads(
        (
            tmp_path / "streak" / "checkpoints" / str(result["steps"][-1]) / "manifest.json"
        ).read_text()
    )
    assert good["step"] <= 8
    assert Checkpoints(tmp_path / "streak").verify(good["step"]) == []


def failing(folder):
    """The second save fails in the background: the loop must stop soon, not at the end."""
    import resource

    from jaxrlhf.errors import CheckpointError

    real = toy.batch

    def batch(step=0, **kwargs):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
        return real(step, **kwargs)

    toy.batch = batch
    try:
        toy.run(folder, pause=0.3, steps=40)
    except CheckpointError as e:
        return str(e)
    return None


def test_a_save_that_fails_in_the_background_stops_the_run_soon(tmp_path):
    child = start(failing, tmp_path / "out.json", folder=str(tmp_path / "run"))
    text, _ = child.communicate(timeout=240)
    assert child.returncode == 0, text
    message = json.loads((tmp_path / "out.json").read_text())
    assert message, text
    assert "step 6 could not be written" in message
    assert "step 4 is kept" in message
    assert Checkpoints(tmp_path / "run").latest() == 4


def test_every_evaluation_is_saved_and_that_of_the_start_ranks_nothing(tmp_path):
    """The figures are best before training, then at 4, a step at which no save is due."""
    figures = {0: 0.0, 4: 1.0, 8: 3.0, 12: 2.0}
    result = toy.run(
        tmp_path, save_every=5, keep_last=9, score=lambda params, step: {"error": figures[step]}
    )
    assert result["best"] == 4
    contents = toy.record(tmp_path)[1]
    assert {step: found[1] for step, found in contents.items()} == {
        4: {"error": 1.0},
        5: {},
        8: {"error": 3.0},
        10: {},
        12: {"error": 2.0},
    }
    # A checkpoint of the first step, without an evaluation of its own.
    first = toy.run(tmp_path / "first", signal_at=[0])
    assert (first["steps"], first["best"]) == ([1], None)


def test_a_figure_that_no_evaluation_has_is_named_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"keep_best = eror.*it has error, tokens"):
        toy.run(tmp_path, best="eror")
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """An uninterrupted run with a line every 5 steps."""
    folder = tmp_path_factory.mktemp("sparse")
    return toy.run(folder, log_every=5), toy.record(folder)


def test_a_line_every_few_steps_has_their_means_and_totals(whole, sparse):
    every = [x for x in whole[1][0] if x.get("split") == "train"]
    lines = [x for x in sparse[1][0] if x.get("split") == "train"]
    assert [x["step"] for x in lines] == [5, 10, 12]
    for line, first in zip(lines, (0, 5, 10), strict=True):
        part = every[first : line["step"]]
        for name in ("loss", "grad_norm", "learning_rate"):
            mean = sum(x[name] for x in part) / len(part)
            assert line[name] == pytest.approx(mean, rel=1e-12)
        assert line["tokens"] == sum(x["tokens"] for x in part)
    assert sparse[0]["tokens"] == whole[0]["tokens"] == sum(x["tokens"] for x in every)


@pytest.mark.parametrize("at", [1, 6])
def test_stopped_between_two_lines_the_record_is_the_same(tmp_path, sparse, at):
    assert toy.run(tmp_path, log_every=5, signal_at=[at])["exit_code"] == 143
    result = toy.run(tmp_path, log_every=5)
    assert (result["digest"], result["tokens"]) == (sparse[0]["digest"], sparse[0]["tokens"])
    assert toy.record(tmp_path)[0] == sparse[1][0]


def twice(folder):
    """The second signal comes while the first one's step is still at work."""
    toy.run(folder, signal_at=[3, 3])


def test_a_second_signal_ends_at_once(tmp_path):
    child = start(twice, tmp_path / "out.json", folder=str(tmp_path / "run"))
    text, _ = child.communicate(timeout=240)
    assert child.returncode == 143, text
