"""The sweep's bar: what it says while it runs, and that it ends full."""

import io
import sys

from ldm_scaling import files
from ldm_scaling.study.progress import Progress


def test_rates_time_left_and_a_full_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ldm_scaling.study.progress.time.monotonic", lambda: now[0])
    with Progress(total=50.0, done=10.0) as progress:
        progress.show("c8")
        for _ in range(30):
            now[0] += 1.0
            progress.update(rows=40, images=3, gflops=1.0)
        assert "c8, 40 rows/s, 3.0 images/s" in progress._bar.postfix
        assert progress._bar.n == 40.0
    assert "100%" in capsys.readouterr().err.split("\r")[-1]


def test_a_stopped_sweep_does_not_look_finished(capsys):
    try:
        with Progress(total=50.0, done=0.0) as progress:
            progress.update(rows=1, images=1, gflops=5.0)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "100%" not in capsys.readouterr().err


def test_a_log_has_few_states_of_a_bar(tmp_path, monkeypatch):
    """A file or a pipe; a notebook's stream, which is neither, shows it as a terminal does."""
    with open(tmp_path / "log", "w+", encoding="utf-8", newline="") as log:
        monkeypatch.setattr(sys, "stderr", log)
        with Progress(total=50.0, done=0.0) as progress:
            for k in range(20):
                progress.show(f"c{k}")
                progress.update(rows=1, images=1, gflops=2.0)
        assert files.progress_seconds() > 10
        log.seek(0)
        states = log.read().split("\r")
    assert len([s for s in states if "%" in s]) == 2 and "100%" in states[-1]
    notebook = type("OutStream", (io.TextIOBase,), {})()
    monkeypatch.setattr(sys, "stderr", notebook)
    assert files.progress_seconds() < 1
