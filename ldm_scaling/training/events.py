"""Scalars and pictures of a run: TensorBoard events, PNG files and one CSV of curves.

clu's own writers import TensorFlow, which this project does without, so tensorboardX writes the
event files; clu aggregates the metrics. Of tensorboardX only the writer of files is used: its
`SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever after.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import sys
import time
from collections.abc import Iterator

import numpy as np
from etils import epath

from ldm_scaling import files, pictures
from ldm_scaling.errors import UserError, first_line


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """As if a module were not installed, where it is not imported yet."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


# It imports torch where it can, 200 MB and 2 s of every command, to know tensors by their class.
with _absent("torch"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import directory_check

log = logging.getLogger(__name__)

COLUMNS = ("step", "name", "value")
# What is timed: all that may differ between two runs of one config and seed.
TIMED = "time/"
TRAIN, VALIDATION = "train/loss", "validation/loss"
_FLUSH_SECONDS = 60.0  # at most, until TensorBoard sees a scalar


class Events:
    """A run's record of itself. `curves.csv` holds step, name, value; a resumed run cuts it back.

    TensorBoard's files and the pictures are for looking at: where they cannot be written, the log
    says so and the run goes on. The curves must be written, see `flush`.

    Args:
      directory: the run's folder.
      start: the step that the run goes on from; later rows of an earlier, killed run are dropped.
    Raises:
      UserError: for damaged curves, see `read_curves`.
    """

    def __init__(self, directory: epath.PathLike, start: int = 0):
        self.directory = epath.Path(directory)
        self._rows = [r for r in read_curves(self.directory) if r[0] <= start]
        self._writer: EventsWriter | None = None
        self._files = 0
        self._flushed = time.monotonic()
        self._write(Event(step=start + 1, file_version="brain.Event:2"))
        # Hides what an earlier, killed run showed of later steps.
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def last(self, name: str) -> float | None:
        """The newest value of a scalar, or None."""
        return next((value for _, n, value in reversed(self._rows) if n == name), None)

    def at(self, step: int, prefix: str) -> dict[str, float]:
        """The scalars of a step whose names begin so, by the rest of their names."""
        return {n.removeprefix(prefix): value for s, n, value in self._rows
                if s == step and n.startswith(prefix)}

    def note(self, step: int, name: str, value: float) -> None:
        """Records a scalar in the curves alone."""
        self._rows.append((step, name, float(value)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of a step."""
        for name, value in values.items():
            self.note(step, name, value)
            shown = summary.scalar(name, float(value))
            self._write(Event(step=step, wall_time=time.time(), summary=shown))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Records a uint8 picture, also as `samples/NAME_STEP.png`."""
        shown = summary.image(name, image_HWC, dataformats="HWC")
        self._write(Event(step=step, wall_time=time.time(), summary=shown))
        try:
            pictures.save_png(self.directory / "samples" / f"{name}_{step:07d}.png", image_HWC)
        except (UserError, OSError) as e:
            log.warning("a picture of step %d is not kept: %s", step, e)

    def flush(self) -> None:
        """Writes what is pending. Raises `UserError` where the curves cannot be written."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        writer.writerows(self._rows)
        files.atomic_write_text(self.directory / "curves.csv", out.getvalue())
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as e:
                self._drop(e)

    def close(self) -> None:
        """Flushes and closes; what cannot be written is told in the log."""
        try:
            self.flush()
        except UserError as e:
            log.warning("%s", e)
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as e:
                self._drop(e)

    def _write(self, event: Event) -> None:
        try:
            if self._writer is None:  # Another file after one that failed in the middle.
                folder = str(self.directory / "events")
                directory_check(folder)
                self._writer = EventsWriter(f"{folder}/events", f".{self._files}")
                self._files += 1
            self._writer.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as e:
            self._drop(e)

    def _drop(self, error: OSError) -> None:
        log.warning("TensorBoard's events in %s are not written: %s", self.directory, error)
        self._writer = None


def read_curves(directory: epath.PathLike) -> list[tuple[int, str, float]]:
    """(step, name, value) rows of a run's `curves.csv`; [] when there is none. Raises `UserError`
    when the file is damaged."""
    path = epath.Path(directory) / "curves.csv"
    if not path.exists():
        return []
    try:
        text = path.read_text()
        rows = list(csv.reader(io.StringIO(text)))
        if not text.endswith("\n") or tuple(rows[0]) != COLUMNS:  # The half of a number is one.
            raise ValueError("it is cut short, or no such table")
        return [(int(step), name, float(value)) for step, name, value in rows[1:]]
    except (ValueError, csv.Error, IsADirectoryError) as e:
        raise UserError(
            f"the curves {path} are damaged ({first_line(e)}): restore the file, or delete it to "
            "go on without the losses that it held"
        ) from e
