"""FID-infinity: the Fréchet distance that infinitely many generated images would have.

The distance of n images is too large by about c / n, and c differs between models, so that two
models can change places with n. On a line through distances of random subsets over 1 / n, the
intercept is free of that (Chong and Forsyth 2020).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.bootstrap import check_counts
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """A straight line through Fréchet distances over 1 / n.

    Attributes:
      value: its intercept, the distance at infinitely many generated images. The reference stays
        as large as it is. Rounding and chance may leave it slightly negative.
      error: standard error of the intercept by least squares. It tells how well the points lie on
        a line, not how far other images would move it: for that take `infinity_replicates`.
      slope: c, in distance times images.
      sizes: images in each subset.
      distances: Fréchet distance of each.
    """

    value: float
    error: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]

    @property
    def remark(self) -> str:
        """How well the points lie on the line, in words."""
        return (
            f"intercept of a line through {len(self.sizes)} subsets of {self.sizes[0]:,} to "
            f"{self.sizes[-1]:,} images; its standard error is {self.error:.2g}"
        )


def frechet_infinity(
    features_ND: np.ndarray,
    reference: ReferenceStats,
    *,
    smallest: int = 5000,
    points: int = 15,
    seed: int = 0,
) -> Extrapolation:
    """Extrapolates `frechet_from_features` to infinitely many images.

    Args:
      features_ND: features (N, D) of the generated images.
      reference: statistics of the real ones.
      smallest: images in the smallest subset, at most half of N, or the line has nothing to go
        by; the largest has all N, and sizes are evenly spaced in between, as the authors'
        `score_infinity.py` has them. Where it is not well above D the distances leave the line.
      points: how many subsets, each drawn on its own without replacement.
      seed: of the drawing.

    Raises:
      UserError: when N is below twice `smallest`, there are fewer than 3 points, or as
        `frechet_from_features`.
    """
    features_ND = arrays.rows(features_ND, "features")
    n = len(features_ND)
    if not 2 <= smallest <= n / 2 or points < 3:
        raise UserError(
            f"an extrapolation from {points} subsets of {smallest} to {n} images: it needs at "
            "least 3 subsets, and twice the images that the smallest has (at least 2)"
        )
    sizes_P = np.linspace(smallest, n, points).astype(int)
    rng = np.random.default_rng(seed)
    distances_P = [
        frechet_from_features(features_ND[rng.permutation(n)[:size]], reference)
        for size in sizes_P
    ]
    line = scipy.stats.linregress(1.0 / sizes_P, distances_P)
    return Extrapolation(
        value=float(line.intercept),
        error=float(line.intercept_stderr),
        slope=float(line.slope),
        sizes=tuple(sizes_P.tolist()),
        distances=tuple(distances_P),
    )


def infinity_replicates(
    features_ND: np.ndarray,
    reference: ReferenceStats,
    counts_RN: np.ndarray,
    *,
    smallest: int = 5000,
    points: int = 15,
    seed: int = 0,
) -> np.ndarray:
    """Replicates (R,) of `frechet_infinity`: image i counted `counts_RN[r, i]` times.

    A replicate's smallest subset shrinks with the number it counts, so that halves are
    extrapolated over the same span. It costs `points` distances a replicate: an hour or more
    for 2048 dimensions and 100 replicates. `bootstrap.centre` them before storing.

    Raises:
      UserError: as `frechet_infinity`.
    """
    features_ND = arrays.rows(features_ND, "features")
    n = len(features_ND)
    counts_RN = check_counts(counts_RN, n, least=4)
    replicates = []
    for r, counts_N in enumerate(counts_RN):
        drawn_ND = np.repeat(features_ND, counts_N, axis=0)
        part = max(2, smallest * len(drawn_ND) // n)
        whole = frechet_infinity(
            drawn_ND, reference, smallest=part, points=points, seed=seed + 1 + r
        )
        replicates.append(whole.value)
    return np.array(replicates)
