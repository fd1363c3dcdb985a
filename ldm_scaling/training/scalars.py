"""A step's metrics, read one step late, so that the device never waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import metrics as clu_metrics

from ldm_scaling.training import nonfinite


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

    def averages(self) -> dict[str, float]:
        """The averages since the last call."""
        out = {name: float(average.compute()) for name, average in self._averages.items()}
        self._averages.clear()
        return out
