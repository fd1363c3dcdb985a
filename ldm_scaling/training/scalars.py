"""A step's metrics, read one step late, so that the device never waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import metrics as clu_metrics

from ldm_scaling.training import nonfinite

STEPS = "steps"


class _Pending(NamedTuple):
    step: int
    values: dict[str, jax.Array]
    state: dict[str, Any]


class Scalars:
    """Averages of metrics over the steps between two logs.

    Args:
      refuse: what to do where one is not finite: `refuse(step, values, state)` raises.
    """

    def __init__(self, refuse: Callable[[int, dict[str, float], dict[str, Any]], None]):
        self._refuse = refuse
        self._pending: _Pending | None = None
        self._averages: dict[str, clu_metrics.Average] = {}
        self.loss = float("nan")

    def push(self, step: int, values: dict[str, jax.Array], state: dict[str, Any]) -> None:
        """Takes a step's metrics, which are not computed yet, and the iterator's state before."""
        self._pending = _Pending(step, values, state)

    def read(self) -> int | None:
        """Waits for the metrics that were pushed last; returns their step, None if there are none.

        Raises what `refuse` raises.
        """
        if self._pending is None:
            return None
        (step, values, state), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if nonfinite.names(values):
            self._refuse(step, values, state)
        for name, value in values.items():
            # On the host: small programs of their own would queue up behind the running step.
            new = clu_metrics.Average(total=np.float32(value), count=np.float32(1))
            before = self._averages.get(name)
            self._averages[name] = new if before is None else before.merge(new)
        self.loss = values["loss"]
        return step

    def totals(self) -> dict[str, float]:
        """Sums since the last log, and under `STEPS` of how many steps; empty right after one."""
        found = {name: float(average.total) for name, average in self._averages.items()}
        return found and {STEPS: float(self._averages["loss"].count)} | found

    def add(self, totals: dict[str, float]) -> None:
        """Adds sums of steps before, of a run that was stopped between two logs; see `totals`. To
        those of one step, so that all are added in their order."""
        steps = np.float32(totals.get(STEPS, 0.0))
        for name, average in self._averages.items():
            before = clu_metrics.Average(total=np.float32(totals.get(name, 0.0)), count=steps)
            self._averages[name] = before.merge(average)

    def averages(self) -> dict[str, float]:
        """The averages since the last call."""
        out = {name: float(average.compute()) for name, average in self._averages.items()}
        self._averages.clear()
        return out
