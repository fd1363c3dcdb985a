"""Scalars and pictures of a run: TensorBoard events, PNG files and one CSV of curves.

clu's own writers import TensorFlow, which this project does without, so tensorboardX writes the
event files; clu aggregates the metrics.
"""

from __future__ import annotations

import csv
import io

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from ldm_scaling import files, pictures

COLUMNS = ("step", "name", "value")
# What is timed: all that may differ between two runs of one config and seed.
TIMED = "time/"


class Events:
    """A run's record of itself. `curves.csv` holds step, name, value; a resumed run cuts it back.

    Args:
      directory: the run's folder.
      start: the step that the run goes on from; later rows of an earlier, killed run are dropped.
    """

    def __init__(self, directory: epath.PathLike, start: int = 0):
        self.directory = epath.Path(directory)
        self._rows = [r for r in read_curves(self.directory) if r[0] <= start]
        self._writer = SummaryWriter(str(self.directory / "events"), purge_step=start + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of a step."""
        for name, value in values.items():
            self._rows.append((step, name, float(value)))
            self._writer.add_scalar(name, float(value), step)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Records a uint8 picture, also as `samples/NAME_STEP.png`."""
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")
        pictures.save_png(self.directory / "samples" / f"{name}_{step:07d}.png", image_HWC)

    def flush(self) -> None:
        """Writes what is pending."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        writer.writerows(self._rows)
        files.atomic_write_text(self.directory / "curves.csv", out.getvalue())
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._writer.close()


def without_times(rows: list[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """The rows that the config and the seed decide."""
    return [row for row in rows if not row[1].startswith(TIMED)]


def read_curves(directory: epath.PathLike) -> list[tuple[int, str, float]]:
    """(step, name, value) rows of a run's `curves.csv`; [] when there is none."""
    path = epath.Path(directory) / "curves.csv"
    if not path.exists():
        return []
    rows = list(csv.reader(io.StringIO(path.read_text())))[1:]
    return [(int(step), name, float(value)) for step, name, value in rows]
