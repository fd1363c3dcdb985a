"""Row times: measured seconds of a network's programs, kept in the workdir, so that all records of
a network are of one measurement, whenever they are made."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from ldm_scaling import files

log = logging.getLogger(__name__)

FOLDER = "seconds"
_NAMES = ("row", "picture")


def kept(
    workdir: epath.PathLike, program: Mapping[str, Any], measure: Callable[[], tuple[float, float]]
) -> tuple[float, float]:
    """Seconds of a row and of all else that a picture takes: those that the workdir holds, else
    measured and written. A file that is damaged is measured anew, with a warning.

    Args:
      workdir: where they are kept, one file for each program.
      program: all that decides them, the device too; JSON.
      measure: measures both.
    """
    path = epath.Path(workdir) / FOLDER / f"{files.sha256_of(program)}.json"
    found = _read(path)
    if found is None:
        measured = measure()
        # Of processes that measured at the same time the first is the one that counts.
        found = _read(path) or measured
        if found is measured:
            body = {"program": program, "seconds": dict(zip(_NAMES, measured, strict=True))}
            files.write_json(path, body, sort_keys=True)
    return found


def _read(path: epath.Path) -> tuple[float, float] | None:
    """What a file holds; None where there is none, or it is damaged: it is removed then."""
    try:
        seconds = json.loads(path.read_text())["seconds"]
        row, picture = (float(seconds[name]) for name in _NAMES)
        if not (0 < row < math.inf and 0 <= picture < math.inf):
            raise ValueError(f"{row} and {picture} are no seconds")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        log.warning("%s is damaged (%s): these seconds are measured anew", path, e)
        path.unlink(missing_ok=True)
        return None
    return row, picture
