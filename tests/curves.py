"""A run's `curves.csv` as tests compare it: what the config and the seed decide."""

from __future__ import annotations

from etils import epath

from ldm_scaling.training import events


def of(directory: epath.PathLike) -> list[tuple[int, str, float]]:
    """The rows without those of times."""
    rows = events.read_curves(directory)
    return [row for row in rows if not row[1].startswith(events.TIMED)]
