"""Where a run's wall time goes: step time, throughput, waits, and the share that was of use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import chips, hosts
from ldm_scaling.training.events import TIMED
from ldm_scaling.training.task import Task

log = logging.getLogger(__name__)

STEP, DATA, CHECKPOINT, OTHER = "step", "data", "checkpoint", "other"
# Rows that carry goodput over restarts.
STARTED, PRODUCTIVE = f"{TIMED}started", f"{TIMED}productive_seconds"


class Meter:
    """A stopwatch whose every lap goes to one kind: steps, data, checkpoints or what is between.

    Goodput is the share of the wall time since the run's first start that went into steps which
    count: a restart's lost steps, its start and compilation, waiting for data, validation, pictures
    and checkpoints do not.

    Args:
      batch_size: examples a step.
      started: when the run first started, in seconds of Unix time.
      productive: seconds in steps that count so far.
      flops: of a step, over all devices; None where unknown.
      peak: FLOP/s of all devices; None where unknown.
      clock: gives seconds that are never set, for laps.
      wall: gives Unix time, which survives a restart.
    """

    def __init__(
        self, batch_size: int, started: float | None = None, productive: float = 0.0,
        flops: float | None = None, peak: float | None = None,
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ):
        self._clock, self._wall, self._batch_size = clock, wall, batch_size
        self.flops, self.peak = flops, peak
        self._last = clock()
        self.started = wall() if started is None else started
        self.productive = productive
        self._first = True
        self._clear()

    def _clear(self) -> None:
        self._seconds = dict.fromkeys((STEP, DATA, CHECKPOINT, OTHER), 0.0)
        self._steps = 0

    def lap(self, kind: str) -> None:
        """The time since the last lap was of this kind."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._seconds[kind] += seconds
        if kind == STEP and not self._first:
            self.productive += seconds

    def step(self) -> None:
        """A step is over; its laps were of data and steps."""
        if self._first:  # It compiled.
            self._first = False
            self._seconds[STEP] = self._seconds[DATA] = 0.0
            return
        self._steps += 1

    def wait(self) -> float:
        """The share of the steps' time since the last `values` that went into waiting for data."""
        total = self._seconds[STEP] + self._seconds[DATA]
        return self._seconds[DATA] / total if total else 0.0

    def values(self) -> dict[str, float]:
        """Scalars of the time since the last call, all named `time/...`."""
        out = {
            "data_wait": self.wait(),
            "checkpoint_stall": self._seconds[CHECKPOINT],
            "goodput": self.goodput(),
        }
        if self._steps:
            out["step"] = seconds = (self._seconds[STEP] + self._seconds[DATA]) / self._steps
            out["examples_per_second"] = self._batch_size / seconds if seconds else 0.0
            if self.flops and self.peak and seconds:
                out["flops_utilisation"] = self.flops / seconds / self.peak
        self._clear()
        return {f"{TIMED}{name}": value for name, value in out.items()} | {
            PRODUCTIVE: self.productive
        }

    def goodput(self) -> float:
        """The share of all wall time so far that went into steps which count."""
        total = self._wall() - self.started
        return self.productive / total if total > 0 else 0.0


def peak_of(mesh: Mesh, config: Train) -> float | None:
    """Peak FLOP/s of a mesh in the run's compute type; None for devices that are in no table."""
    kind = mesh.devices.flat[0].device_kind
    peak = chips.peak_flops(kind, hosts.compute_dtype(config.compute_dtype))
    return None if peak is None else peak * mesh.size


def flops_of(task: Task, config: Train, train: Callable, *args: Any) -> float | None:
    """FLOPs of a step over all devices: the task's own count, or XLA's of the lowered step.

    XLA counts a loop's body once and a Pallas call as nothing, and some platforms do not count at
    all: None.
    """
    try:
        if task.flops_per_example is not None:
            return task.flops_per_example() * config.batch_size
        counted = train.lower(*args).cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError, UserError) as e:
        log.info("%s: the FLOPs of a step are not known: %s", task.name, e)
        return None
    return (counted or {}).get("flops")
