"""Where a curve of losses is lowest: a parabola in logarithms through the lowest point and its two
neighbours, and how far noise moves that place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEAST, NOISE_FROM = 3, 5
"""Points that a parabola needs, and those that tell noise: what a cubic through them leaves. Curves
are steeper on one side of the lowest point than on the other, which a cubic allows for."""
_REPLICATES = 4000


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Losses by learning rate.

    Attributes:
      rate_N: ascending.
      loss_N: of each; NaN where training diverged.
    """

    rate_N: np.ndarray
    loss_N: np.ndarray

    @property
    def known(self) -> int:
        """How many losses are finite."""
        return int(np.isfinite(self.loss_N).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """Where a curve is lowest.

    Attributes:
      rate, loss: the parabola's lowest point, between the neighbours.
      low, high: 95% interval of the rate, within the rates that did not diverge.
      rate_R: the same rate under each of R draws of noise.
      edge: whether the lowest lies at the first or last rate that did not diverge: the best may be
        beyond it.
      cut: whether the interval ends there.
    """

    rate: float
    loss: float
    low: float
    high: float
    rate_R: np.ndarray
    edge: bool
    cut: bool


def optima(curves: Sequence[Curve], seed: int = 0) -> list[Optimum]:
    """The lowest place of each of several curves of one experiment.

    Noise is what cubics through five points about the lowest leave of all curves' logarithms,
    together. Each replicate adds as much to every point, and looks for the lowest again. That much
    is itself known from one degree of freedom a curve, so each replicate has its own, as
    `Scatter.draw` does: intervals have Student's tails. A curve that is there twice counts once.

    Args:
      curves: each with 3 finite losses at least, some with 5.
      seed: of the replicates.
    Raises:
      ValueError: for a curve with fewer, or where none has 5.
    """
    if any(c.known < LEAST for c in curves) or all(c.known < NOISE_FROM for c in curves):
        raise ValueError(f"{[c.known for c in curves]} finite losses: 3 each are needed, 5 of some")
    parts = [_logarithms(c) for c in curves]
    told = {(x_K.tobytes(), y_K.tobytes()): _left(x_K, y_K)
            for x_K, y_K in parts if len(x_K) >= NOISE_FROM}
    rng = np.random.default_rng(seed)
    deviation_R = np.sqrt(sum(told.values()) / rng.chisquare(len(told), _REPLICATES))
    out = []
    for x_K, y_K in parts:
        noise_RK = deviation_R[:, None] * rng.standard_normal((_REPLICATES, len(x_K)))
        (x, *x_R), (y, *_) = _lowest(x_K, np.vstack([y_K, y_K + noise_RK]))
        low, high = np.exp(np.percentile(x_R, (2.5, 97.5)))
        best, ends = x_K[np.argmin(y_K)], np.exp(x_K[[0, -1]])
        out.append(Optimum(
            math.exp(x), math.exp(y), float(low), float(high), np.exp(x_R),
            bool(best in (x_K[0], x_K[-1])),
            bool(np.isclose(low, ends[0]) or np.isclose(high, ends[1])),
        ))
    return out


def _logarithms(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    known_N = np.isfinite(curve.loss_N)
    return np.log(curve.rate_N[known_N]), np.log(curve.loss_N[known_N])


def _left(x_K: np.ndarray, y_K: np.ndarray) -> float:
    """Sum of squares that a cubic leaves of five points: of one degree of freedom."""
    start = int(np.clip(np.argmin(y_K) - NOISE_FROM // 2, 0, len(x_K) - NOISE_FROM))
    about = slice(start, start + NOISE_FROM)
    x, y = x_K[about] - x_K[about].mean(), y_K[about]
    return float(np.sum((y - np.polyval(np.polyfit(x, y, 3), x)) ** 2))


def _lowest(x_K: np.ndarray, y_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parabolas' lowest places between the neighbours of the lowest points, and their values."""
    rows = np.arange(len(y_RK))
    at_R = np.clip(np.argmin(y_RK, axis=1), 1, len(x_K) - 2)
    (x0, x1, x2), (y0, y1, y2) = (
        [a[at_R + k] if a.ndim == 1 else a[rows, at_R + k] for k in (-1, 0, 1)]
        for a in (x_K, y_RK)
    )
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (second - first) / (x2 - x0)
    # At an end of the curve three points may bend downwards: the end is the lowest.
    opens = bend > 0
    place = (x0 + x1) / 2 - first / (2 * np.where(opens, bend, 1.0))
    place = np.where(opens, np.clip(place, x0, x2), np.where(y0 < y2, x0, x2))
    return place, y0 + (place - x0) * (first + bend * (place - x1))
