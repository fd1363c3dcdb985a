"""The sweep's progress bar: share of the work, rows and pictures per second, time left."""

from __future__ import annotations

import collections
import time

from tqdm import tqdm

from ldm_scaling import files

_WINDOW = 20.0


class Progress:
    """Use as a context manager.

    The bar counts GFLOPs, for a row of a large network takes longer than one of a small network;
    what is shown are rows and pictures per second of the last 20 seconds.

    Args:
      total, done: GFLOPs of the whole sweep, and of the records that are there already.
    """

    def __init__(self, total: float, done: float):
        seconds = files.progress_seconds()
        self._live = seconds < 1
        self._bar = tqdm(
            total=total, initial=done, desc="sweep", dynamic_ncols=True, mininterval=seconds,
            maxinterval=max(seconds, 10.0), smoothing=0.05, disable=not files.progress_shown(),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self._what = ""
        self._recent = collections.deque([(time.monotonic(), 0, 0)])

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:  # Which rates would be chosen was a guess.
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def show(self, what: str) -> None:
        """Names what is being measured."""
        self._what = what
        self._bar.set_postfix_str(what, refresh=self._live)

    def update(self, rows: int, images: int, gflops: float) -> None:
        """Counts what is done."""
        now = time.monotonic()
        self._recent.append((now, rows, images))
        while now - self._recent[0][0] > _WINDOW and len(self._recent) > 2:
            self._recent.popleft()
        since = now - self._recent[0][0]
        _, rows_R, images_R = zip(*list(self._recent)[1:])
        if since:
            rate = f"{sum(rows_R) / since:,.0f} rows/s, {sum(images_R) / since:,.1f} images/s"
            self._bar.set_postfix_str(f"{self._what}, {rate}", refresh=False)
        self._bar.update(min(gflops, self._bar.total - self._bar.n))
