"""Where a curve of losses is lowest: a cubic in logarithms of the five points about the lowest, and
how far noise moves that place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEAST, NOISE_FROM = 3, 5
"""Points that a place needs, and those that tell it by a cubic, whose rest is noise. Curves are
steeper on one side of the lowest point than on the other: a parabola through three of them is off,
by more than its noise where that is small or points are far apart."""
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

    @property
    def beyond(self) -> float:
        """The first rate that diverged above all that did not; infinite where none did."""
        last = self.rate_N[np.isfinite(self.loss_N)][-1]
        return float(min(self.rate_N[self.rate_N > last], default=math.inf))


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """Where a curve is lowest.

    Attributes:
      rate, loss: the lowest point between the neighbours of the lowest loss.
      low, high: 95% interval of the rate; `low` is 0 and `high` infinite where it is open.
      low_R, high_R: between which the rate lies under each of R draws of noise: both are the
        lowest point, but where the lowest loss is at an end. Beyond it nothing was
        measured, so that the rate is known to lie before its neighbour and no more; beyond the
        highest that did not diverge also before the next.
      edge: whether the lowest loss is at the first or last rate that did not diverge.
    """

    rate: float
    loss: float
    low: float
    high: float
    low_R: np.ndarray
    high_R: np.ndarray
    edge: bool

    @property
    def open(self) -> bool:
        """Whether the interval is open at an end."""
        return self.low == 0 or self.high == math.inf

    @property
    def known(self) -> bool:
        """Whether there is a place: one at an edge is no more than its bound."""
        return not (self.edge and self.open)


def ratio(of: Optimum, to: Optimum) -> tuple[float, float]:
    """95% interval of one best rate over another; 0 or infinite where it is open."""
    with np.errstate(divide="ignore"):
        low_R, high_R = of.low_R / to.high_R, of.high_R / to.low_R
    return _percentile(low_R, 2.5), _percentile(high_R, 97.5)


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
    for curve, (x_K, y_K) in zip(curves, parts, strict=True):
        noise_RK = deviation_R[:, None] * rng.standard_normal((_REPLICATES, len(x_K)))
        y_RK = np.vstack([y_K, y_K + noise_RK])
        x_R, y_R = _lowest(x_K, y_RK)
        low_R, high_R = _bounds(curve, x_K, x_R, np.argmin(y_RK, axis=1))[:, 1:]
        out.append(Optimum(
            math.exp(x_R[0]), math.exp(y_R[0]), math.exp(_percentile(low_R, 2.5)),
            math.exp(_percentile(high_R, 97.5)), np.exp(low_R), np.exp(high_R),
            int(np.argmin(y_K)) in (0, len(x_K) - 1),
        ))
    return out


def _percentile(x_R: np.ndarray, percent: float) -> float:
    """Where infinite numbers come to stand, NumPy's interpolation has none."""
    with np.errstate(invalid="ignore"):
        found = float(np.percentile(x_R, percent))
    return found if math.isfinite(found) else math.copysign(math.inf, percent - 50)


def _bounds(curve: Curve, x_K: np.ndarray, x_R: np.ndarray, at_R: np.ndarray) -> np.ndarray:
    """Logarithms between which the lowest places lie, (2, R)."""
    first_R, last_R = at_R == 0, at_R == len(x_K) - 1
    return np.array([
        np.where(first_R, -math.inf, np.where(last_R, x_K[-2], x_R)),
        np.where(last_R, math.log(curve.beyond), np.where(first_R, x_K[1], x_R)),
    ])


def _logarithms(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    known_N = np.isfinite(curve.loss_N)
    return np.log(curve.rate_N[known_N]), np.log(curve.loss_N[known_N])


def _left(x_K: np.ndarray, y_K: np.ndarray) -> float:
    """Sum of squares that a cubic leaves of five points: of one degree of freedom."""
    about = _about(np.argmin(y_K), len(x_K))
    x, y = x_K[about] - x_K[about].mean(), y_K[about]
    return float(np.sum((y - np.polyval(np.polyfit(x, y, 3), x)) ** 2))


def _about(at: np.ndarray, count: int) -> np.ndarray:
    """Which five of so many points are about the one at a place, (..., 5)."""
    start = np.clip(at - NOISE_FROM // 2, 0, count - NOISE_FROM)
    return start[..., None] + np.arange(NOISE_FROM)


def _lowest(x_K: np.ndarray, y_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest places between the neighbours of the lowest points, and their values: of cubics,
    where there are five points and it has one there, else of parabolas."""
    place_R, value_R = _parabolas(x_K, y_RK)
    if len(x_K) < NOISE_FROM:
        return place_R, value_R
    at_R = np.argmin(y_RK, axis=1)
    about_RM = _about(at_R, len(x_K))
    first_R, middle_R = about_RM[:, 0], x_K[about_RM].mean(axis=1)
    fit_SCM = np.array([
        np.linalg.pinv(np.vander(x_M - x_M.mean(), 4))
        for x_M in np.lib.stride_tricks.sliding_window_view(x_K, NOISE_FROM)
    ])
    y_RM = np.take_along_axis(y_RK, about_RM, axis=1)
    a, b, c, d = np.einsum("rcm,rm->cr", fit_SCM[first_R], y_RM)
    with np.errstate(invalid="ignore", divide="ignore"):  # One that only falls, or rises.
        x = -c / (b + np.sqrt(b**2 - 3 * a * c))
        place, value = x + middle_R, ((a * x + b) * x + c) * x + d
    low, high = x_K[np.maximum(at_R - 1, 0)], x_K[np.minimum(at_R + 1, len(x_K) - 1)]
    inside = (low <= place) & (place <= high)
    return np.where(inside, place, place_R), np.where(inside, value, value_R)


def _parabolas(x_K: np.ndarray, y_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Through the lowest points and their neighbours: lowest places between these, and values."""
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
