"""What happens to samples behind the sampler: decoded, turned into features, and scored.

One thread takes latents as they end, while the device goes on with the next. What it holds is
bounded by the queue and by the configurations under way, not by the sweep.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable

import numpy as np

from ldm_scaling.sampling.lanes import Finished

_QUEUE = 4


@dataclasses.dataclass
class _Gathered:
    """A configuration's samples so far."""

    features_ND: np.ndarray
    images_NHWC: np.ndarray
    missing: int


class Behind:
    """Use as a context manager; on a clean exit everything that was put has been written.

    Args:
      decode: `decode(latents_JHWC, configuration_J, places_J) -> uint8 pictures`; places are among
        the configuration's samples.
      features: `features(pictures, places_J) -> (J, D)`.
      write: `write(configuration, pictures, features_ND)`, called when a configuration is whole.
      samples: N, the samples of every configuration.
      batch_size: how many latents are decoded at a time.
      keep: how many of a configuration's first pictures `write` gets.

    An error in the thread is raised by the next `put`, or on exit.
    """

    def __init__(
        self, decode: Callable, features: Callable, write: Callable, samples: int,
        batch_size: int, keep: int,
    ):
        self._decode, self._features, self._write = decode, features, write
        self._samples, self._batch_size, self._keep = samples, batch_size, min(keep, samples)
        self._gathered: dict[int, _Gathered] = {}
        self._pool: list[tuple[int, int, np.ndarray]] = []
        self._queue: queue.Queue[Finished | None] = queue.Queue(_QUEUE)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            self._stopped.set()
        self._hand_over(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, finished: Finished) -> None:
        """Hands samples over; waits while the queue is full."""
        self._raise()
        if len(finished.position):
            self._hand_over(finished)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _hand_over(self, item: Finished | None) -> None:
        while self._thread.is_alive():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while (finished := self._queue.get()) is not None and not self._stopped.is_set():
                self._pool += zip(
                    finished.configuration.tolist(), finished.position.tolist(),
                    finished.latents_JHWC,
                )
                while len(self._pool) >= self._batch_size:
                    self._take(self._batch_size)
            if not self._stopped.is_set():
                self._take(self._batch_size)
        except BaseException as e:
            self._error = e

    def _take(self, count: int) -> None:
        """Decodes and gathers the first of the pool; writes what is whole."""
        some, self._pool = self._pool[:count], self._pool[count:]
        if not some:
            return
        configurations = [i for i, _, _ in some]
        places_J = np.array([n for _, n, _ in some])
        images_JHWC = self._decode(np.stack([z for _, _, z in some]), configurations, places_J)
        features_JD = self._features(images_JHWC, places_J)
        for (i, n, _), image, row in zip(some, images_JHWC, features_JD):
            if i not in self._gathered:
                self._gathered[i] = _Gathered(
                    np.zeros((self._samples, len(row)), row.dtype),
                    np.zeros((self._keep, *image.shape), np.uint8), self._samples,
                )
            gathered = self._gathered[i]
            gathered.features_ND[n] = row
            if n < self._keep:
                gathered.images_NHWC[n] = image
            gathered.missing -= 1
            if not gathered.missing:
                del self._gathered[i]
                self._write(i, gathered.images_NHWC, gathered.features_ND)
