"""Bands: intervals of single points, and of all points of a curve at once, from replicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study.curves import Curves, Point

LEAST = 20
"""Bootstrap replicates below which a band's width would be a guess."""


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """Intervals along P points.

    Attributes:
      value_P: the estimates.
      low_P, high_P: interval of each point: it holds its own truth with probability `level`.
      all_low_P, all_high_P: band of the curve: it holds *all* truths at once with probability
        `level`.
      critical: half the band's width in standard errors.
      level: e.g. 0.95.
    """

    value_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    all_low_P: np.ndarray
    all_high_P: np.ndarray
    critical: float
    level: float


def band(
    value_P: np.ndarray, replicates_PR: np.ndarray, level: float = 0.95, freedom: float = np.inf
) -> Band:
    """Pointwise intervals and the simultaneous band, from paired, centred replicates.

    The band is value +- critical x standard error, the critical value a quantile of the
    replicates' largest studentised distance along the curve (the sup-t band, Montiel Olea and
    Plagborg-Moller 2019): it uses how points move together and is as narrow as that allows. Of few
    images it is the quantile of Student's t that is as rare as the normal's.

    Args:
      value_P: estimates.
      replicates_PR: stored replicates (P, R), paired along the curve.
      level: of intervals and band.
      freedom: degrees of freedom of the images of a point, see `bootstrap.interval`.

    Raises:
      UserError: when the shapes do not fit or there are fewer than `LEAST` replicates.
    """
    value_P = np.asarray(value_P, np.float64)
    replicates_PR = np.asarray(replicates_PR, np.float64)
    if replicates_PR.ndim != 2 or len(replicates_PR) != len(value_P):
        raise UserError(
            f"{len(value_P)} points and replicates of shape {replicates_PR.shape}: a band needs "
            "one row of replicates per point"
        )
    replicates = replicates_PR.shape[1]
    if replicates < LEAST:
        raise UserError(
            f"a band needs at least {LEAST} bootstrap replicates, there are {replicates}: raise "
            "sweep.replicates"
        )
    ends = [bootstrap.interval(row_R, freedom, level) for row_R in replicates_PR]
    low_P, high_P = np.array(ends).reshape(-1, 2).T
    spread_PR = replicates_PR - value_P[:, None]
    error_P = spread_PR.std(axis=1, ddof=1)
    moving = error_P > 0
    critical = 0.0
    if moving.any():
        largest_R = (np.abs(spread_PR[moving]) / error_P[moving, None]).max(axis=0)
        # The (R + 1) level-th smallest, so that few replicates make it wider and not narrower.
        rank = min(int(np.ceil((replicates + 1) * level)), replicates)
        critical = float(np.sort(largest_R)[rank - 1])
        if freedom < bootstrap.FEW:
            free = bootstrap.least_freedom(largest_R, freedom)
            critical = float(scipy.stats.t.isf(scipy.stats.norm.sf(critical), free))
    half_P = critical * error_P
    return Band(value_P, low_P, high_P, value_P - half_P, value_P + half_P, critical, level)


def of_points(points: Sequence[Point], level: float = 0.95) -> Band | None:
    """The band of a curve's points; None where they hold fewer than `LEAST` replicates.

    Raises `UserError` where points were measured with different numbers of replicates.
    """
    sizes = {p.replicates_R.size for p in points}
    if len(sizes) > 1:
        raise UserError(
            f"points of one curve have {sorted(sizes)} replicates: measure them with one number"
        )
    if not points or max(sizes) < LEAST:
        return None
    return band(
        np.array([p.value for p in points]), np.stack([p.replicates_R for p in points]), level,
        min(p.freedom for p in points),
    )


def of_curves(curves: Curves) -> dict[tuple[str, str], Band]:
    """`of_points` of every curve that has replicates."""
    found = {key: of_points(points) for key, points in curves.items()}
    return {key: one for key, one in found.items() if one is not None}
