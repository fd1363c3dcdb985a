"""A window of steps under JAX's profiler."""

from __future__ import annotations

import logging

from clu import profiler
from etils import epath

log = logging.getLogger(__name__)


class Profile:
    """Records steps `first` to `last` as a trace for TensorBoard, XProf or Perfetto.

    A run that starts inside the window records what is left of it. A trace that cannot be written
    is told in the log; the run goes on.

    Args:
      directory: gets `plugins/profile/`.
      window: first and last step; () records nothing.
      start: the step that the run goes on from.
    """

    def __init__(self, directory: epath.PathLike, window: tuple[int, ...], start: int = 0):
        self._directory = epath.Path(directory)
        self._first, self._last = (max(window[0], start + 1), window[1]) if window else (0, -1)
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace before the window's first step."""
        if step == self._first <= self._last:
            self._running = self._attempt(profiler.start, str(self._directory))

    def ends(self, step: int) -> bool:
        """Whether this step, once it is done on the devices, is the window's last."""
        return self._running and step == self._last

    def close(self) -> None:
        """Writes the trace, if one runs."""
        if self._running:
            self._running = False
            self._attempt(profiler.stop)

    def _attempt(self, act, *args) -> bool:
        try:
            act(*args)
        except (OSError, RuntimeError) as e:
            log.warning("the profiler's trace in %s failed: %s", self._directory, e)
            return False
        return True
