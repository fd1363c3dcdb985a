"""The meter: planted times come back; goodput survives restarts."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_scaling.training import loop, meter
from ldm_scaling.training.events import Events, read_curves
from tests.training import toy


class Clock:
    """Moves when told."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


def _run(own, clock, steps, step=2.0, data=0.5):
    for _ in range(steps):
        clock.now += data
        own.lap(meter.DATA)
        clock.now += step
        own.lap(meter.STEP)
        own.step()


def test_planted_times_come_back():
    clock = Clock()
    own = meter.Meter(batch_size=10, flops=5e12, peak=4e12, clock=clock, wall=clock)
    _run(own, clock, 1, step=100.0)  # Compiles: no step time, nothing productive.
    _run(own, clock, 4)
    clock.now += 7.0
    own.lap(meter.OTHER)
    clock.now += 3.0
    own.lap(meter.CHECKPOINT)
    values = own.values()
    assert values["time/step"] == pytest.approx(2.5)
    assert values["time/examples_per_second"] == pytest.approx(4.0)
    assert values["time/data_wait"] == pytest.approx(0.2)
    assert values["time/checkpoint_stall"] == pytest.approx(3.0)
    assert values["time/flops_utilisation"] == pytest.approx(0.5)  # 5e12 / 2.5 s of 4e12.
    # 4 steps of 2 s, of 100.5 + 4 x 2.5 + 10 s.
    assert values["time/goodput"] == pytest.approx(8 / 120.5)
    assert values["time/productive_seconds"] == pytest.approx(8.0)
    # The next log is of its own time.
    _run(own, clock, 2, step=1.0, data=0.0)
    values = own.values()
    assert values["time/step"] == pytest.approx(1.0) and values["time/checkpoint_stall"] == 0.0


def test_lost_steps_and_restarts_count_against_goodput():
    clock = Clock()
    first = meter.Meter(batch_size=1, clock=clock, wall=clock)
    _run(first, clock, 11, step=1.0, data=0.0)  # One compiles, ten count.
    kept = first.productive  # Of the checkpoint.
    _run(first, clock, 5, step=1.0, data=0.0)  # Lost.
    clock.now += 64.0  # The machine is gone, and comes again.
    second = meter.Meter(1, started=first.started, productive=kept, clock=clock, wall=clock)
    _run(second, clock, 21, step=1.0, data=0.0)
    # 10 + 20 of 11 + 5 + 64 + 21 seconds.
    assert second.goodput() == pytest.approx(30 / 101)


def test_a_wall_clock_that_is_set_moves_no_lap():
    clock, wall = Clock(), Clock()
    own = meter.Meter(batch_size=1, clock=clock, wall=wall)
    _run(own, clock, 3)
    wall.now -= 3_600.0
    _run(own, clock, 1)
    assert own.productive == pytest.approx(6.0)
    assert own.values()["time/step"] == pytest.approx(2.5)


def test_unknown_flops_are_left_out():
    clock = Clock()
    own = meter.Meter(batch_size=1, clock=clock, wall=clock)
    _run(own, clock, 2)
    assert "time/flops_utilisation" not in own.values()
    assert meter.peak_of(toy.one_device(), toy.CONFIG) is None  # A CPU is in no table.


def test_the_task_counts_before_xla_does():
    task = toy.task(flops_per_example=lambda: 3.0)
    assert meter.flops_of(task, toy.CONFIG, None) == 48.0


def test_xla_counts_a_product_of_matrices():
    f = jax.jit(lambda a, b: a @ b)
    a, b = np.ones((64, 32), np.float32), np.ones((32, 16), np.float32)
    assert meter.flops_of(toy.task(), toy.CONFIG, f, a, b) == 2 * 64 * 32 * 16


def test_a_run_logs_its_times_and_a_restart_goes_on_counting(tmp_path, monkeypatch):
    monkeypatch.setattr(meter.chips, "peak_flops", lambda kind, dtype: 1e9)
    config = dataclasses.replace(toy.CONFIG, steps=4)
    for steps in (4, 8):
        config = dataclasses.replace(config, steps=steps)
        loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=3)
    rows = read_curves(tmp_path)
    names = {name for _, name, _ in rows}
    assert {f"time/{n}" for n in (
        "step", "examples_per_second", "data_wait", "checkpoint_stall", "goodput",
        "flops_utilisation",
    )} <= names
    started = [value for step, name, value in rows if name == meter.STARTED]
    assert len(started) == 1  # The first start is the run's.
    spent = [value for _, name, value in rows if name == meter.PRODUCTIVE]
    assert spent == sorted(spent) and spent[-1] > 0
    assert all(0 <= v <= 1 for _, name, v in rows if name == "time/goodput")


def test_events_that_cannot_be_written_do_not_stop_a_run(tmp_path, caplog):
    events = Events(tmp_path)
    events.scalars(1, {"a": 1.0})

    class Full:
        def write_event(self, event):
            raise OSError(28, "No space left on device")

        flush = close = write_event

    events._writer = Full()
    events.scalars(2, {"a": 2.0})
    assert "No space left" in caplog.text
    events.scalars(3, {"a": 3.0})  # In another file.
    events.close()
    assert read_curves(tmp_path) == [(i, "a", float(i)) for i in (1, 2, 3)]
    assert len(list((tmp_path / "events").iterdir())) == 2
