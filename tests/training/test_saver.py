"""The store fails: training goes on, tries again, and stops before much is lost."""

import dataclasses
import itertools
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.training import checkpoint, loop, saver
from ldm_scaling.training.events import Events
from tests import curves
from tests.training import toy


def _failing(monkeypatch, cls, name, failures, error):
    """The first `failures` calls raise."""
    real, calls = getattr(cls, name), []

    def act(self, *args, **kwargs):
        calls.append(args)
        if len(calls) <= failures:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, act)
    return calls


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 0.0)


@pytest.mark.parametrize("where", ["begin", "commit", "commit unforeseen", "curves"])
def test_a_store_that_recovers_costs_nothing(tmp_path, monkeypatch, caplog, where):
    mesh, error = toy.one_device(), OSError(28, "No space left on device")
    whole = loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path / "whole", mesh, seed=3)
    if where == "begin":
        calls = _failing(monkeypatch, checkpoint._Manager, "save", 1, error)
    elif where.startswith("commit"):  # In Orbax's own thread, after training went on.
        from orbax.checkpoint import AsyncCheckpointer

        if where != "commit":  # A kind of error that nobody has seen there.
            error = KeyError("No space left")
        calls = _failing(monkeypatch, AsyncCheckpointer, "_save_step_metadata", 1, error)
    else:
        failed = UserError("cannot write curves.csv: No space left on device")
        monkeypatch.setattr(Events, "last", lambda self, name: 0.0)  # No flush at the start.
        calls = _failing(monkeypatch, Events, "flush", 1, failed)
    with caplog.at_level(logging.WARNING):
        state = loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path / "cut", mesh, seed=3)
    assert len(calls) > 1
    assert re.search(
        r"step 2 was not written, attempt 1 .*No space left.*Training goes on", caplog.text
    )
    assert re.search(r"written again, at step \d after 1 failures", caplog.text)
    toy.equal(whole, state)
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 6
    # The run's curves are whole, and what goes on from the checkpoint is the unbroken run.
    assert curves.of(tmp_path / "cut") == curves.of(tmp_path / "whole")
    config = dataclasses.replace(toy.CONFIG, steps=8)
    toy.equal(
        loop.fit(toy.task(), config, toy.Loader, tmp_path / "whole", mesh, seed=3),
        loop.fit(toy.task(), config, toy.Loader, tmp_path / "cut", mesh, seed=3),
    )


def test_however_often_it_failed_there_is_a_next_attempt(monkeypatch):
    class Full:
        def poll(self, seconds):
            return False, None

        def clean(self):
            pass

    def prepare(step):
        raise UserError("No space left on device")

    monkeypatch.setattr(saver, "_FIRST_PAUSE", 5.0)
    config = dataclasses.replace(toy.CONFIG, checkpoint_patience=10)
    own = saver.Saver("toy", Full(), config, 0, prepare, lambda step: None)
    own._failures = 5_000
    own.tend(2, due=True)
    assert own._failures == 5_001 and 290 < own._again - time.monotonic() <= saver._LONGEST_PAUSE


@pytest.mark.parametrize("patience, stopped", [(0, 6), (3, 5)])
def test_a_store_that_stays_broken_stops_the_run(tmp_path, monkeypatch, capfd, patience, stopped):
    """Steps 2 is on disk; from then on nothing can be written."""
    config = dataclasses.replace(toy.CONFIG, steps=20, checkpoint_patience=patience)
    real = checkpoint._Manager.save

    def save(self, step, *args, **kwargs):
        if step > 2:
            raise OSError(28, "No space left on device")
        return real(self, step, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint._Manager, "save", save)
        with pytest.raises(saver.StoreError) as caught:
            loop.fit(toy.task(), config, toy.Loader, tmp_path / "cut", toy.one_device(), seed=3)
    message = str(caught.value)
    assert f"stopped at step {stopped}" in message and "No space left on device" in message
    assert "since step 2" in message and "\n" not in message
    assert isinstance(caught.value, UserError)  # The command line ends with status 2.
    assert "NOT SAVED since step 2" in capfd.readouterr().err
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 2
    # Mended, the same call ends with the unbroken run's numbers.
    whole = loop.fit(toy.task(), config, toy.Loader, tmp_path / "w", toy.one_device(), seed=3)
    cut = loop.fit(toy.task(), config, toy.Loader, tmp_path / "cut", toy.one_device(), seed=3)
    toy.equal(whole, cut)


class Broken:
    """Checkpoints of which none can be begun, at a clock that moves when told."""

    def __init__(self, monkeypatch, patience):
        self.now, self.attempts = 0.0, []
        monkeypatch.setattr(saver, "_FIRST_PAUSE", 5.0)
        monkeypatch.setattr(saver.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(saver.time, "sleep", self._sleep)
        config = dataclasses.replace(
            toy.CONFIG, checkpoint_every=1_000, checkpoint_patience=patience
        )
        self.saver = saver.Saver("toy", self, config, 0, lambda step: None, self._begin)

    def _sleep(self, seconds):
        self.now += seconds

    def _begin(self, step):
        self.attempts.append(self.now)
        raise UserError("the store is gone")

    def poll(self, seconds=0.0):
        return False, None

    def clean(self):
        pass

    abandon = clean


def test_pauses_between_attempts_grow_while_training_goes_on(monkeypatch):
    broken = Broken(monkeypatch, 10_000)
    for number in range(1, 100):
        broken.now = float(number)  # A step a second.
        broken.saver.tend(number, due=number == 1)
    np.testing.assert_allclose(np.diff(broken.attempts), [5, 10, 20, 40])
    assert broken.saver.trouble() == "NOT SAVED since step 0"


def test_the_last_step_is_tried_for_ten_minutes(monkeypatch):
    broken = Broken(monkeypatch, 10_000)
    with pytest.raises(saver.StoreError, match="stopped at step 9: .*since step 0 .the store is"):
        broken.saver.finish(9)
    np.testing.assert_allclose(np.diff(broken.attempts), [5, 10, 20, 40, 80, 160, 300])
    assert 600 <= broken.now < 900


def test_a_store_that_hangs_does_not_hide_why_a_run_stops(tmp_path, monkeypatch):
    """The save of step 2 does not end, and the run leaves its bounds at step 3."""
    from orbax.checkpoint import AsyncCheckpointer

    answers, real = threading.Event(), AsyncCheckpointer._save_step_metadata

    def hang(self, *args, **kwargs):
        answers.wait(60)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AsyncCheckpointer, "_save_step_metadata", hang)
    for name in ("_UNDER_WAY", "_AT_THE_END"):
        monkeypatch.setattr(saver, name, 0.1)
    task = toy.task(diverges=lambda averages: "it grew" if next(steps) == 3 else "")
    steps, began = itertools.count(1), time.monotonic()
    try:
        with pytest.raises(loop.DivergedError, match="step 3: it grew; the checkpoint of step 0"):
            loop.fit(task, toy.CONFIG, toy.Loader, tmp_path, toy.one_device(), seed=3)
        assert time.monotonic() - began < 30
    finally:
        answers.set()


HERE = str(pathlib.Path(__file__).parent)
_FULL = """
import dataclasses, resource, sys
import toy
from ldm_scaling.training import loop, saver
saver._FIRST_PAUSE = 0.0
soft, mended = 300, int(sys.argv[2])
limits = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
class Loader(toy.Loader):
    def __next__(self):
        if self.count == 3:
            limits(soft)  # No file may be longer: writes end as on a disk that is full.
        if self.count == mended:
            limits(resource.RLIM_INFINITY)
        return super().__next__()
# Whether the save of step 2, in the background, comes before the limit is a matter of luck.
patience = 8 if mended > 14 else 12
config = dataclasses.replace(toy.CONFIG, steps=14, checkpoint_patience=patience)
loop.fit(toy.task(), config, Loader, sys.argv[1], toy.one_device(), seed=3)
"""


@pytest.mark.parametrize("mended", [9, 99])
def test_files_that_cannot_grow(tmp_path, mended):
    """The real thing, as far as it needs no other file system: every write ends short."""
    where = tmp_path / "cut"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": HERE}
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(where), str(mended)], env=environment, text=True,
        capture_output=True, timeout=120,
    )
    config = dataclasses.replace(toy.CONFIG, steps=14)
    if mended == 99:
        assert done.returncode == 1 and "StoreError: toy: stopped at step" in done.stderr
        assert (checkpoint.latest(where / "checkpoints") or 0) < 14
    else:
        assert done.returncode == 0, done.stderr
        assert checkpoint.latest(where / "checkpoints") == 14
    assert "Training goes on" in done.stderr
    whole = loop.fit(toy.task(), config, toy.Loader, tmp_path / "w", toy.one_device(), seed=3)
    cut = loop.fit(toy.task(), config, toy.Loader, where, toy.one_device(), seed=3)
    toy.equal(whole, cut)
    assert curves.of(where) == curves.of(tmp_path / "w")
