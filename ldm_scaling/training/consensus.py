"""What several processes must decide alike."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def everyone(*values: float) -> np.ndarray:
    """The values of every process, float64 (P, V). All must ask, at the same step.

    With several processes it waits for the devices: for steps at which the host waits anyhow.
    """
    own = np.asarray(values, np.float64)
    if jax.process_count() == 1:
        return own[None]
    # As bytes: devices have no float64.
    gathered = multihost_utils.process_allgather(own.view(np.uint8))
    return np.ascontiguousarray(gathered).view(np.float64).reshape(-1, len(own))


def anyone(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process. All must ask, at the same step."""
    return tuple(bool(column.any()) for column in everyone(*map(float, flags)).T)
