"""What a run leaves behind when its loss is not finite: which examples it was at."""

from __future__ import annotations

import logging
import math
from typing import Any

from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss, or another metric, was NaN or infinite."""


class DivergedError(UserError):
    """What a task watches left its bounds."""


def names(values: dict[str, float]) -> list[str]:
    """Those of the metrics that are NaN or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def write(
    path: epath.PathLike, step: int, values: dict[str, float], state: dict[str, Any],
    examples: list[dict[str, Any]] | None,
) -> None:
    """Writes a file that names the batch.

    Args:
      path: of the file.
      step: whose metrics are not finite. The parameters of the step before made them.
      values: all metrics of the step.
      state: the data iterator's before the batch: a loader that is set to it gives the batch again.
      examples: of the batch over all processes, where the loader can name them.
    """
    body = {
        "step": step,
        "not_finite": names(values),
        # JSON has no NaN.
        "metrics": {k: v if math.isfinite(v) else str(v) for k, v in values.items()},
        "iterator": state,
        "examples": examples,
    }
    try:
        files.write_json(path, body)
    except UserError as e:  # A full disk: the loss is what must be told.
        log.warning("%s", e)
