# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact, verified, never trusted when damaged, never lost to a new one that failed."""

import json
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from devices import run_on_devices

from jaxrlhf.errors import CheckpointError
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import put_batch, use_mesh
from jaxrlhf.train import checkpoint
from jaxrlhf.train.checkpoint import MANIFEST, Checkpoints, _json_digest
from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.optim import make_optimizer
from jaxrlhf.train.state import init_state, place_state
from jaxrlhf.train.step import jit_train_step, make_train_step


def make_state(seed=0, name="adamw", **size):
    tx, _ = make_optimizer(name, 1e-2, weight_decay=0.1)
    return init_state(toy.params(seed, **size), tx, ema=True, extra={"kl_coef": jnp.float32(0.1)})


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def said(checkpoints):
    """Collects what a Checkpoints tells the user."""
    lines = []
    checkpoints._announce = lines.append
    return lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with good checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, meta={"stage": "toy"})
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_a_state_comes_back_bit_for_bit(saved):
    state, step = Checkpoints(saved).restore(abstract(make_state()))
    want = make_state(2)
    assert step == 2
    assert jax.tree.structure(state) == jax.tree.structure(want)
    assert content_digest(state) == content_digest(want)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_every_optimizer_state_comes_back(tmp_path, name):
    tx, _ = make_optimizer(name, 1e-2)
    want = init_state(toy.params(), tx)  # nothing in extra
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, want)
    got, _ = checkpoints.restore(abstract(want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert content_digest(got) == content_digest(want)


def test_the_next_stage_reads_the_parameters_alone(saved):
    checkpoints = Checkpoints(saved)
    params, step = checkpoints.restore_params()
    assert step == 2
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert content_digest(params) == content_digest(toy.params(2))
    assert checkpoints.manifest(2)["content"]["params"] == content_digest(toy.params(2))
    meta = checkpoints.read_meta(2)
    assert (meta["stage"], meta["step"]) == ("toy", 2)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), toy.params())
    got, _ = checkpoints.restore_params(half, step=1)
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.params(1))
    assert content_digest(got) == content_digest(want)


def files(run, step=2):
    return sorted(p for p in (run / "checkpoints" / str(step)).rglob("*") if p.is_file())


def test_every_flipped_bit_is_noticed(run):
    checkpoints = Checkpoints(run)
    rng = random.Random(0)
    candidates = [p for p in files(run) if p.stat().st_size]
    assert checkpoints.verify(2) == []
    for _ in range(300):
        path = rng.choice(candidates)
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        wrong = checkpoints.verify(2)
        assert len(wrong) == 1, f"bit {bit} of {path.name}"
        assert path.name in wrong[0]
        path.write_bytes(good)
    assert checkpoints.verify(2) == []


def test_every_truncation_and_every_missing_file_is_noticed(run):
    checkpoints = Checkpoints(run)
    for path in files(run):
        good = path.read_bytes()
        path.unlink()
        assert path.name in checkpoints.verify(2)[0]
        if good:
            path.write_bytes(good[: len(good) // 2])
            assert path.name in checkpoints.verify(2)[0]
            path.write_bytes(bytes(len(good)))
            assert path.name in checkpoints.verify(2)[0]
        path.write_bytes(good)
    assert checkpoints.verify(2) == []


def test_swapped_files_are_noticed(run):
    data = {p.parent.parent.name: p for p in files(run) if p.parent.name == "d"}
    a, b = list(data.values())[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert len(Checkpoints(run).verify(2)) == 2


def test_resume_falls_back_past_a_damaged_checkpoint_and_says_so(run):
    path = next(p for p in files(run) if p.parent.name == "d")
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 4
    path.write_bytes(bad)
    checkpoints = Checkpoints(run)
    lines = said(checkpoints)
    state, step = checkpoints.restore(abstract(make_state()))
    assert step == 1
    assert content_digest(state) == content_digest(make_state(1))
    assert "step 2 is not used" in lines[0]
    assert path.name in lines[0]
    assert "falling back to the checkpoint of step 1" in lines[1]
    with pytest.raises(CheckpointError, match=path.name):
        Checkpoints(run).restore(abstract(make_state()), step=2)
    checkpoints.save(2, make_state(2))  # the step is reached again
    checkpoints.wait()
    assert checkpoints.verify(2) == []


def test_debris_is_never_latest_and_is_cleaned_by_the_next_save(run):
    folder = run / "checkpoints"
    (folder / "3").mkdir()
    (folder / "3" / "params").mkdir()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(folder / "2", folder / "5")
    (folder / "5" / MANIFEST).unlink()
    (folder / "note.txt").write_text("mine")
    checkpoints = Checkpoints(run)
    assert checkpoints.latest() == 2
    checkpoints.restore(abstract(make_state()))
    checkpoints.save(3, make_state(3))
    checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3", "note.txt"]


def test_another_runs_checkpoints_are_not_overwritten(run):
    checkpoints = Checkpoints(run)
    with pytest.raises(CheckpointError, match=r"steps 1, 2.*--resume auto"):
        checkpoints.save(1, make_state(7))
    assert checkpoints.verify(1) == checkpoints.verify(2) == []


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, best="accuracy", keep_best=1)
    for step, accuracy in enumerate([0.2, 0.9, 0.5, None, 0.9, 0.1, 0.3], start=1):
        metrics = {} if accuracy is None else {"accuracy": accuracy}
        checkpoints.save(step, make_state(step), metrics=metrics)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 6, 7]  # of equals the later
    assert checkpoints.best() == 5
    lowest = Checkpoints(tmp_path, best="accuracy", best_mode="min")
    assert lowest.best() == 6


def test_a_state_of_another_shape_is_refused_with_the_difference(saved):
    with pytest.raises(CheckpointError, match=r"up/kernel: saved \(16, 32\), expected \(16, 48\)"):
        Checkpoints(saved).restore(abstract(make_state(mlp=48)))
    with pytest.raises(CheckpointError, match=r"opt_state/\d/mu/.*saved.*expected nothing"):
        Checkpoints(saved).restore(abstract(make_state(name="sgd")))
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; it has 1, 2"):
        Checkpoints(saved).restore(abstract(make_state()), step=9)
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        Checkpoints(saved / "nowhere").restore(abstract(make_state()))


@pytest.mark.parametrize("limit", [4096, 40_000, 70_000])
def test_a_full_disk_is_reported_and_the_old_step_survives(tmp_path, limit):
    """A limit on file sizes stands in for the disk; Orbax itself reports nothing until asked."""
    big = {"embed": 64, "mlp": 512}  # 128 KiB a matrix
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1, **big))
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def save():
        checkpoints.save(2, make_state(2, **big))
        checkpoints.wait()

    try:
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes.*step 1 is kept"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path)
    state, step = again.restore(abstract(make_state(**big)))
    assert step == 1
    assert content_digest(state) == content_digest(make_state(1, **big))
    again.save(2, make_state(2, **big))
    again.wait()
    assert again.latest() == 2


def test_too_small_a_disk_is_known_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, 1,000 are free"):
        checkpoints.save(1, make_state())
    assert checkpoints.steps() == []


def test_a_write_that_says_one_thing_and_stores_another_is_caught(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    digests = iter(["what was on the device", "what was read back"])
    monkeypatch.setattr(checkpoint, "content_digest", lambda tree: next(digests))
    checkpoints.save(1, make_state())
    with pytest.raises(CheckpointError, match="read back differ"):
        checkpoints.wait()
    assert checkpoints.steps() == []


def rewrite(run, step, **changed):
    """Another manifest of a checkpoint, in order in itself."""
    path = run / "checkpoints" / str(step) / MANIFEST
    found = {**json.loads(path.read_text()), **changed}
    found.pop("sha256")
    path.write_text(json.dumps(found | {"sha256": _json_digest(found)}))


def held(run):
    """The content of everything in a folder."""
    return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_later_versions_checkpoint_is_an_error_and_nothing_is_removed(run):
    rewrite(run, 2, version=99)
    before = held(run)
    checkpoints = Checkpoints(run)
    for look in (checkpoints.latest, lambda: checkpoints.verify(2)):
        with pytest.raises(CheckpointError, match=r"format version 99.*update jaxrlhf"):
            look()
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        checkpoints.save(1, make_state(1))
    assert held(run) == before


def failing_reads(monkeypatch, name):
    """Reading the files of that name fails, as on a network disk that is away for a moment."""
    read_bytes, digest = Path.read_bytes, checkpoint._file_digest

    def check(path):
        if path.name == name:
            raise OSError(5, "Input/output error")
        return path

    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(check(path)))
    monkeypatch.setattr(
        checkpoint, "_file_digest", lambda path, sync=False: digest(check(path), sync=sync)
    )


@pytest.mark.parametrize("name", [MANIFEST, "meta.json"])
def test_a_file_that_cannot_be_read_is_not_a_damaged_one(run, monkeypatch, name):
    before = held(run)
    checkpoints = Checkpoints(run)
    with monkeypatch.context() as patch:
        failing_reads(patch, name)
        with pytest.raises(CheckpointError, match=f"{name} could not be read.*nothing was changed"):
            checkpoints.latest()
    assert held(run) == before
    assert checkpoints.latest() == 2


def test_what_may_be_the_best_is_kept_while_it_cannot_be_read(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1, best="accuracy")
    for step, accuracy in ((1, 0.9), (2, 0.5)):
        checkpoints.save(step, make_state(step), metrics={"accuracy": accuracy})
    checkpoints.wait()
    lines = said(checkpoints)
    with monkeypatch.context() as patch:
        failing_reads(patch, MANIFEST)
        checkpoints.retain()
    assert "no checkpoint is removed" in lines[0]
    checkpoints.save(3, make_state(3), metrics={"accuracy": 0.1})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_a_damaged_checkpoint_is_moved_aside(run):
    for content in (b"once", b"twice"):  # what was moved aside before makes room
        data = next(p for p in files(run) if p.parent.name == "d")
        data.write_bytes(content)
        checkpoints = Checkpoints(run)
        lines = said(checkpoints)
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        aside = run / "checkpoints" / "2.damaged"
        assert (aside / data.relative_to(run / "checkpoints" / "2")).read_bytes() == content
        assert str(aside) in lines[-1]
        again = Checkpoints(run)
        assert (again.steps(), again.latest()) == ([1, 2], 2)


def test_an_optimizer_state_of_version_1_is_refused_its_parameters_are_read(run):
    leaves = Checkpoints(run).manifest(2)["leaves"]
    rewrite(run, 2, version=1)
    Checkpoints(run).restore(abstract(make_state()))  # one that fits is the same in both
    rewrite(run, 2, leaves={**leaves, "train/opt_state/2/count": ["int32", []]})
    with pytest.raises(CheckpointError, match=r"format version 1.*model\.path=.*") as caught:
        Checkpoints(run).restore(abstract(make_state()))
    assert "opt_state/2/count" in str(caught.value)
    params, _ = Checkpoints(run).restore_params()
    assert content_digest(params) == content_digest(toy.params(2))


def test_a_figure_that_is_not_finite_never_ranks(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5, best="loss", best_mode="min")
    for step, loss in enumerate([float("nan"), 2.0, 1.0, float("-inf")], start=1):
        checkpoints.save(step, make_state(step), metrics={"loss": loss})
    checkpoints.wait()
    assert checkpoints.best() == 3


def meshes(folder):
    """Saved on fsdp 8 after 3 steps; restored elsewhere, then 20 steps there and here."""
    tx, _ = make_optimizer("sgd", 0.05, momentum=0.9)
    out = {}

    def place(devices, **sizes):
        mesh = make_mesh(devices, **sizes)
        with use_mesh(mesh):
            state, where, _ = place_state(toy.params(embed=32, mlp=64), tx, mesh, toy.AXES)
            step = jit_train_step(make_train_step(toy.loss_fn, tx), where, mesh)
        return mesh, state, where, step

    def go(mesh, state, step, first, n):
        with use_mesh(mesh):
            for i in range(first, first + n):
                batch = put_batch(toy.batch(i, rows=16, embed=32), mesh)
                state, _ = step(state, {}, batch, jax.random.key(0), 0.05)
        return state

    mesh, state, where, step = place(jax.devices(), fsdp=8)
    state = go(mesh, state, step, 0, 3)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state)
    checkpoints.wait()
    digest = content_digest(state)  # before the state is donated
    want = jax.device_get(go(mesh, state, step, 3, 20).params)
    for name, devices, sizes in [
        ("fsdp 8", jax.devices(), {"fsdp": 8}),
        ("2x2x2", jax.devices(), {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tensor 4", jax.devices()[:4], {"tensor": 4}),
        ("single", jax.devices()[:1], {}),
    ]:
        mesh, state, where, step = place(devices, **sizes)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
        )
        state, _ = Checkpoints(folder).restore(target)
        placed = jax.tree.map(lambda x, s: x.sharding == s, state, where)
        same = content_digest(state) == digest
        got = jax.device_get(go(mesh, state, step, 3, 20).params)
        worst = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        )
        out[name] = [same, all(jax.tree.leaves(placed)), worst]
    return out


@pytest.mark.slow
def test_restored_on_another_mesh_it_is_the_same_state_and_trains_the_same(tmp_path):
    got = run_on_devices(8, meshes, folder=str(tmp_path))
    assert len(got) == 4
    for name, (same, placed, worst) in got.items():
        assert same, name
        assert placed, name
        assert worst < 1e-5, (name, worst)
    assert got["fsdp 8"][2] == 0.0
