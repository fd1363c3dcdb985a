"""Iso-FLOP profiles: for each training budget the size with the least loss, by a parabola.

Hoffmann et al. 2022, approach 2. The parabola is an approximation: where sizes are spread widely,
or not about the least loss, and the two exponents of the law differ, its answers are biased even
without noise (arXiv 2603.22339). Compare them with approach 3's, `Law.best_split`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.study.statistics import laws


@dataclasses.dataclass(frozen=True)
class Profile:
    """One budget.

    Attributes:
      flops: of training, the mean of its points'.
      points: how many.
      best_size: N at the parabola's least loss; None where it has none inside the sizes measured.
      best_loss: the loss there, or None.
    """

    flops: float
    points: int
    best_size: float | None
    best_loss: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """The best size against the budget: N = factor x flops^exponent.

    Attributes:
      profiles: one per budget, rising.
      factor, exponent: by least squares on logs of those profiles that have a best size.
      exponent_interval: 95%, from bootstrap replicates that draw residuals about each parabola.
    """

    profiles: tuple[Profile, ...]
    factor: float
    exponent: float
    exponent_interval: tuple[float, float]

    def best_size(self, flops: np.ndarray) -> np.ndarray:
        """N with the least loss at budgets, by the power law."""
        return self.factor * np.asarray(flops, np.float64) ** self.exponent


def _vertex(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log size, loss) of parabolas c2 x^2 + c1 x + c0 (..., 3); nan where they open downwards."""
    c2, c1, c0 = np.moveaxis(coefficients, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
    return place, c0 + c1 * place / 2


def frontier(
    flops: np.ndarray, size: np.ndarray, loss: np.ndarray, *, replicates: int = 200,
    tolerance: float = 0.05, seed: int = 0,
) -> Frontier:
    """Fits a parabola to log loss over log N at each budget, and a power law to their least.

    Args:
      flops: training budgets (N,); those within `tolerance` of each other are one.
      size: parameters (N,).
      loss: values (N,) above 0.
      replicates, seed: of the bootstrap.
      tolerance: relative.

    Raises:
      UserError: when fewer than 2 budgets have at least 4 sizes about a least loss.
    """
    logf_N, logn_N, logy_N = (
        np.log(laws.scales(np.asarray(v, np.float64))[:, 0]) for v in (flops, size, loss)
    )
    if not len(logf_N) == len(logn_N) == len(logy_N):
        raise UserError("iso-FLOP profiles need one size and one loss per training budget")
    rng, profiles, kept, moved = np.random.default_rng(seed), [], [], []
    for group in _groups(logf_N, np.log1p(tolerance)):
        x_M, y_M = logn_N[group], logy_N[group]
        if len(np.unique(x_M)) < 4:
            profiles.append(Profile(float(np.exp(logf_N[group].mean())), len(group), None, None))
            continue
        centre = x_M.mean()
        design = np.vander(x_M - centre, 3)
        coefficients, *_ = np.linalg.lstsq(design, y_M)
        place, least = _vertex(coefficients)
        inside = bool(x_M.min() - centre <= place <= x_M.max() - centre)
        flops_here = float(logf_N[group].mean())
        profiles.append(Profile(
            float(np.exp(flops_here)), len(group),
            float(np.exp(place + centre)) if inside else None,
            float(np.exp(least)) if inside else None,
        ))
        if inside:
            residual_M = y_M - design @ coefficients
            residual_M *= np.sqrt(len(x_M) / (len(x_M) - 3))
            drawn_RM = design @ coefficients + rng.choice(residual_M, (replicates, len(x_M)))
            places_R, _ = _vertex((np.linalg.pinv(design) @ drawn_RM.T).T)
            # A replicate without a least inside says that it lies at the edge, or beyond.
            edges = (x_M.min() - centre, x_M.max() - centre)
            moved.append(centre + np.clip(np.where(np.isnan(places_R), edges[1], places_R), *edges))
            kept.append((flops_here, place + centre))
    if len(kept) < 2:
        raise UserError(
            f"{len(kept)} of {len(profiles)} training budgets have 4 sizes with the least loss "
            "inside: iso-FLOP profiles need 2; train more sizes at each budget"
        )
    f_B, n_B = np.array(kept).T
    exponent, intercept = np.polyfit(f_B, n_B, 1)
    slopes_R = np.polyfit(f_B, np.stack(moved), 1)[0]
    low, high = np.percentile(slopes_R, (2.5, 97.5))
    return Frontier(tuple(profiles), float(np.exp(intercept)), float(exponent),
                    (float(low), float(high)))


def _groups(logf_N: np.ndarray, width: float) -> Sequence[np.ndarray]:
    """Numbers of the points of each budget, budgets rising."""
    order_N = np.argsort(logf_N, kind="stable")
    cuts = np.flatnonzero(np.diff(logf_N[order_N]) > width) + 1
    return np.split(order_N, cuts)
