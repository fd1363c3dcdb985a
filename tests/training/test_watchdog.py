"""A process that is stuck ends with status 76 and says where it stood."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest

from ldm_scaling.training import checkpoint, watchdog

HERE = str(pathlib.Path(__file__).parent)
_STUCK = """
import dataclasses, logging, sys, time
logging.basicConfig(filename=sys.argv[1] + "/log.txt", level=logging.INFO)
import toy
from ldm_scaling.training import loop
class Loader(toy.Loader):
    def __next__(self):
        while self.count == 4:
            time.sleep(0.1)  # A file system that does not answer.
        return super().__next__()
config = dataclasses.replace(toy.CONFIG, stall_seconds=5.0)
loop.fit(toy.task(), config, Loader, sys.argv[1], toy.one_device(), seed=3)
"""


def test_a_stalled_step_ends_the_process_with_76(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _STUCK, str(tmp_path)], text=True, capture_output=True, timeout=180,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": HERE},
    )
    assert done.returncode == 76, done.stderr
    assert "toy: no step finished for 5 s after step 4" in done.stderr
    assert "raise train.stall_seconds" in done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "no step finished for 5 s" in log
    # Both threads' stacks: the loop waits for the feed, and the feed for the loader.
    assert "in __next__" in log and "in _fill" in log
    assert checkpoint.latest(tmp_path / "checkpoints") == 4


def _watch(seconds, act):
    """The statuses that the process would have ended with; `act` is told when it does."""
    ended, fired = [], threading.Event()

    def end(status):
        ended.append(status)
        fired.set()

    with watchdog.Watchdog("toy", seconds, 7, end) as dog:
        act(dog, fired)
    return ended


def test_the_first_step_may_compile(capsys):
    assert _watch(1.0, lambda dog, fired: time.sleep(1.5)) == []  # Four times 1 s are allowed.
    assert _watch(0.2, lambda dog, fired: fired.wait(30)) == [76]
    assert "for 0.8 s after step 7" in capsys.readouterr().err


def test_steps_that_finish_are_left_alone_and_what_follows_is_watched(capsys):
    def steps(dog, fired):
        for number in range(8, 28):
            dog.finished(number)
            time.sleep(0.1)

    def stuck(dog, fired):
        dog.finished(8)
        fired.wait(30)

    assert _watch(1.5, steps) == []
    assert _watch(0.4, stuck) == [76]
    assert "for 0.4 s after step 8" in capsys.readouterr().err


def test_validation_may_take_longer(capsys):
    def validates(dog, fired):
        dog.finished(8)
        with dog.patient():
            time.sleep(1.5)
        dog.finished(9)

    assert _watch(1.0, validates) == []


def test_a_later_step_that_compiles_may_take_longer(capsys):
    def compiles(dog, fired):
        dog.finished(8)
        dog.compiles(10)  # While the step before is still under way.
        dog.finished(9)
        time.sleep(1.0)
        dog.finished(10)
        fired.wait(30)

    assert _watch(0.5, compiles) == [76]
    assert "for 0.5 s after step 10" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [1e12, float("inf")])
def test_very_long_is_watched_too(seconds):
    def looks(dog, fired):
        dog.finished(8)
        time.sleep(0.05)
        assert dog._thread.is_alive()

    assert _watch(seconds, looks) == []


def test_zero_watches_nothing():
    assert _watch(0.0, lambda dog, fired: time.sleep(0.1)) == []


def test_a_log_that_hangs_does_not_hold_the_process(monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "_TELLING", 0.1)
    monkeypatch.setattr(watchdog.log, "critical", lambda *args: time.sleep(5))
    began, ended = time.monotonic(), []
    watchdog.end_process("stuck", ended.append)
    assert ended == [76] and time.monotonic() - began < 3


def test_a_runtime_error_of_one_process_is_raised_as_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError, match="planted"):
        with watchdog.lost_host("toy"):
            raise jax.errors.JaxRuntimeError("planted")


def test_memory_that_is_too_small_is_no_lost_host(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        with watchdog.lost_host("toy"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


def test_a_runtime_error_of_one_of_several_is_a_lost_host(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(watchdog, "end_process", ended.append)
    with watchdog.lost_host("toy"):
        raise jax.errors.JaxRuntimeError("Gloo: Connection closed by peer\nmore")
    (message,) = ended
    assert "process 0 of 4 lost the others (Gloo: Connection closed by peer)" in message


@pytest.mark.parametrize("status, end", [(2, 2), (75, 76)])
def test_a_host_that_said_why_it_stopped_is_not_lost(status, end, monkeypatch, capsys):
    """Where all have saved, the one that is late to hear of it is started again too."""
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(watchdog.processes, "failure", lambda: (status, "process 3: disk full"))
    monkeypatch.setattr(watchdog.processes, "leave", lambda status, why: ended.append(status))
    own = watchdog.end_process
    monkeypatch.setattr(
        watchdog, "end_process", lambda message, end=ended.append: own(message, end))
    with watchdog.lost_host("toy"):
        raise jax.errors.JaxRuntimeError("Gloo: Connection closed by peer")
    assert ended[0] == end
    assert ("toy: process 3: disk full" in capsys.readouterr().err) == (end == 2)
