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

LEAST_SIZES = 4
"""Sizes at a budget below which a parabola would have nothing to be wrong about."""

EXACT = 1e-9
"""The `tolerance` of budgets that differ by rounding alone, as those of `Runs.at_budgets` do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """One budget.

    Attributes:
      flops: of training, the mean of its points'.
      size_M, loss_M: its points.
      parabola: (c2, c1, c0) of log loss = c2 x^2 + c1 x + c0, x the log size less their mean; None
        below `LEAST_SIZES` sizes.
    """

    flops: float
    size_M: np.ndarray
    loss_M: np.ndarray
    parabola: tuple[float, float, float] | None

    @property
    def points(self) -> int:
        """How many there are."""
        return len(self.size_M)

    @property
    def centre(self) -> float:
        """Mean log size."""
        return float(np.log(self.size_M).mean())

    @property
    def best_size(self) -> float | None:
        """N at the parabola's least loss; None where it has none inside the sizes measured."""
        if self.parabola is None:
            return None
        place = _vertex(np.array(self.parabola))
        size = np.exp(place + self.centre)
        return float(size) if self.size_M.min() <= size <= self.size_M.max() else None

    @property
    def best_loss(self) -> float | None:
        """The loss there, or None."""
        return None if self.best_size is None else float(self.at(self.best_size))

    def at(self, size: np.ndarray) -> np.ndarray:
        """The parabola's loss at sizes. Raises `UserError` where there is none."""
        if self.parabola is None:
            raise UserError(
                f"a budget of {self.flops:.3g} FLOPs has {self.points} sizes: a parabola needs "
                f"{LEAST_SIZES}"
            )
        return np.exp(np.polyval(self.parabola, np.log(size) - self.centre))


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """The best size against the budget: N = factor x flops^exponent.

    Attributes:
      profiles: one per budget, rising.
      factor, exponent: by least squares on logs of those profiles that have a best size.
      exponent_interval: 95%, of bootstrap replicates.
      best_intervals: 95% of the best size of each profile that has one, in order.
    """

    profiles: tuple[Profile, ...]
    factor: float
    exponent: float
    exponent_interval: tuple[float, float]
    best_intervals: tuple[tuple[float, float], ...]

    def best_size(self, flops: np.ndarray) -> np.ndarray:
        """N with the least loss at budgets, by the power law."""
        return self.factor * np.asarray(flops, np.float64) ** self.exponent


def _vertex(coefficients: np.ndarray) -> np.ndarray:
    """Log size of the least of parabolas c2 x^2 + c1 x + c0 (..., 3); nan where they open
    downwards."""
    c2, c1, _ = np.moveaxis(coefficients, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c2 > 0, -c1 / (2 * c2), np.nan)


def profiles(
    flops: np.ndarray, size: np.ndarray, loss: np.ndarray, *, tolerance: float = 0.05
) -> tuple[Profile, ...]:
    """A parabola of log loss over log N at each budget.

    Args:
      flops: training budgets (N,); those within `tolerance` of the least of them are one.
      size: parameters (N,).
      loss: values (N,) above 0.
      tolerance: relative.

    Raises:
      UserError: when the columns differ in length or hold a value that is not above 0.
    """
    loss_N = np.asarray(loss, np.float64)
    if len(bad_N := loss_N[~(np.isfinite(loss_N) & (loss_N > 0))]):
        raise UserError(f"a loss of {bad_N[0]:.3g}: a profile is of logarithms of losses, which "
                        "are finite and above 0")
    logf_N, logn_N = (np.log(laws.scales(v)[:, 0]) for v in (flops, size))
    logy_N = np.log(loss_N)
    if not len(logf_N) == len(logn_N) == len(logy_N):
        raise UserError("iso-FLOP profiles need one size and one loss per training budget")
    out = []
    for group in _groups(logf_N, np.log1p(tolerance)):
        x_M, y_M = logn_N[group], logy_N[group]
        parabola = None
        if len(np.unique(x_M)) >= LEAST_SIZES:
            coefficients, *_ = np.linalg.lstsq(np.vander(x_M - x_M.mean(), 3), y_M)
            parabola = tuple(map(float, coefficients))
        out.append(Profile(
            float(np.exp(logf_N[group].mean())), np.exp(x_M), np.exp(y_M), parabola))
    return tuple(out)


def frontier(
    flops: np.ndarray, size: np.ndarray, loss: np.ndarray, *, replicates: int = 200,
    tolerance: float = 0.05, seed: int = 0, loss_RN: np.ndarray | None = None,
) -> Frontier:
    """`profiles`, and a power law through their least.

    Args:
      flops, size, loss, tolerance: see `profiles`.
      replicates, seed: of the bootstrap, which draws residuals about each parabola: for points
        that were each trained apart.
      loss_RN: replicates of the losses (R, N), used in place of that: for points that share runs.

    Raises:
      UserError: when fewer than 2 budgets have at least `LEAST_SIZES` sizes about a least loss.
    """
    found = profiles(flops, size, loss, tolerance=tolerance)
    kept = [p for p in found if p.best_size is not None]
    if len(kept) < 2:
        raise UserError(
            f"{len(kept)} of {len(found)} training budgets have {LEAST_SIZES} sizes with the least "
            "loss inside: iso-FLOP profiles need 2; train more sizes at each budget"
        )
    rng = np.random.default_rng(seed)
    if loss_RN is None:
        moved_BR = np.stack([_moved(p, _drawn(p, replicates, rng)) for p in kept])
    else:
        groups = _groups(np.log(flops), np.log1p(tolerance))
        moved_BR = np.stack([
            _moved(p, np.log(loss_RN[:, group])) for p, group in zip(found, groups, strict=True)
            if p.best_size is not None
        ])
    logf_B, logn_B = np.log([(p.flops, p.best_size) for p in kept]).T
    exponent, intercept = np.polyfit(logf_B, logn_B, 1)
    low, high = np.percentile(np.polyfit(logf_B, moved_BR, 1)[0], (2.5, 97.5))
    ends_B2 = np.exp(np.percentile(moved_BR, (2.5, 97.5), axis=1)).T
    return Frontier(found, float(np.exp(intercept)), float(exponent), (float(low), float(high)),
                    tuple((float(a), float(b)) for a, b in ends_B2))


def _drawn(profile: Profile, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Log losses of replicates that draw residuals about the parabola (R, M).

    Their spread is known from as many points as the parabola leaves over, one of 4, so that each
    replicate has its own, as `Scatter.draw` does.
    """
    fit_M = np.log(profile.at(profile.size_M))
    residual_M = np.log(profile.loss_M) - fit_M
    scale_R1 = np.sqrt(len(fit_M) / rng.chisquare(len(fit_M) - 3, (replicates, 1)))
    return fit_M + scale_R1 * rng.choice(residual_M, (replicates, len(fit_M)))


def _moved(profile: Profile, drawn_RM: np.ndarray) -> np.ndarray:
    """Log sizes of the least of replicates' log losses (R,)."""
    x_M = np.log(profile.size_M) - profile.centre
    bend_R, slope_R, _ = found = np.linalg.pinv(np.vander(x_M, 3)) @ drawn_RM.T
    place_R = _vertex(found.T)
    # One that bends down has no least inside: the lower of its ends is the lowest.
    first, last = x_M.min(), x_M.max()
    falls_R = bend_R * (last**2 - first**2) + slope_R * (last - first) < 0
    place_R = np.where(np.isnan(place_R), np.where(falls_R, last, first), place_R)
    return profile.centre + np.clip(place_R, first, last)


def _groups(logf_N: np.ndarray, width: float) -> Sequence[np.ndarray]:
    """Numbers of the points of each budget, budgets rising."""
    order_N = np.argsort(logf_N, kind="stable")
    groups: list[list[int]] = []
    for k in order_N.tolist():
        # From the first: neighbours alone would chain budgets that lie close together into one.
        if groups and logf_N[k] - logf_N[groups[-1][0]] <= width:
            groups[-1].append(k)
        else:
            groups.append([k])
    return [np.array(group) for group in groups]
