"""The profiler's window leaves a trace; what it cannot write stops nothing."""

import dataclasses

from ldm_scaling.training import loop, profile
from tests.training import toy


def test_a_window_of_steps_leaves_a_trace(tmp_path):
    config = dataclasses.replace(toy.CONFIG, steps=4, profile_steps=(2, 3))
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert traces and all(path.stat().st_size > 0 for path in traces)


def _recorded(monkeypatch, window, start, steps):
    calls = []
    monkeypatch.setattr(profile.profiler, "start", lambda where: calls.append(["start", at[0]]))
    monkeypatch.setattr(profile.profiler, "stop", lambda: calls.append(["stop", at[0]]))
    own, at = profile.Profile("nowhere", window, start), [0]
    for step in range(start + 1, steps + 1):
        at[0] = step
        own.before(step)
        if own.ends(step):
            own.close()
    own.close()
    return calls


def test_windows_begin_and_end_once(monkeypatch):
    assert _recorded(monkeypatch, (), 0, 9) == []
    assert _recorded(monkeypatch, (3, 5), 0, 9) == [["start", 3], ["stop", 5]]
    assert _recorded(monkeypatch, (3, 3), 0, 9) == [["start", 3], ["stop", 3]]
    assert _recorded(monkeypatch, (3, 5), 3, 9) == [["start", 4], ["stop", 5]]  # Goes on inside.
    assert _recorded(monkeypatch, (3, 5), 5, 9) == []  # Is past it.
    assert _recorded(monkeypatch, (8, 20), 0, 9) == [["start", 8], ["stop", 9]]  # Ends before.


def test_a_trace_that_fails_is_told_in_the_log(monkeypatch, caplog):
    def broken(where):
        raise RuntimeError("only one profiler at a time")

    monkeypatch.setattr(profile.profiler, "start", broken)
    own = profile.Profile("nowhere", (1, 2))
    own.before(1)
    assert "only one profiler at a time" in caplog.text
    assert not own.ends(2)
