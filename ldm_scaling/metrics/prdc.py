"""Precision, recall, density and coverage: do the generated and real images lie among each other?

Around every image a ball reaches to its k-th nearest neighbour of the same set. Distances are
worked out in blocks of rows, never all at once: what is kept in memory is both sets' features in
float64, one block of at most `_ENTRIES` distances, and some 64 neighbours of each image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.bootstrap import check_counts
from ldm_scaling.metrics.frechet import check_widths

_ENTRIES = 2**23
# Squared distances that differ by less than this part of the squared lengths are the same: that is
# rounding of the products.
_SAME = 1e-12


@dataclasses.dataclass(frozen=True)
class Prdc:
    """The four scores: replicates (R,), or a number each; None where they were not asked for.

    Attributes:
      precision: share of generated images in a real image's ball (its edge included).
      recall: share of real images in a generated image's ball (its edge included).
      density: mean number of real images' balls that a generated image is inside, over k.
      coverage: share of real images with a generated image inside their ball.
    """

    precision: float | np.ndarray | None = None
    recall: float | np.ndarray | None = None
    density: float | np.ndarray | None = None
    coverage: float | np.ndarray | None = None


def _blocks(x_ND: np.ndarray, y_MD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances (B, M) of blocks of rows of x to all rows of y."""
    y_M = (y_MD**2).sum(axis=1)
    step = max(1, _ENTRIES // len(y_MD))
    for start in range(0, len(x_ND), step):
        part = slice(start, start + step)
        x_BD = x_ND[part]
        lengths_BM = (x_BD**2).sum(axis=1)[:, None] + y_M
        squared_BM = lengths_BM - 2.0 * (x_BD @ y_MD.T)
        squared_BM[squared_BM <= _SAME * lengths_BM] = 0.0
        yield part, squared_BM


def _neighbours(x_ND: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's `wanted` nearest other rows, nearest first: index (N, L), squared distance."""
    n = len(x_ND)
    index_NL = np.empty((n, wanted), np.int64)
    squared_NL = np.empty((n, wanted))
    for part, squared_BN in _blocks(x_ND, x_ND):
        own_B = np.arange(n)[part]
        squared_BN[np.arange(len(own_B)), own_B] = np.inf
        near_BL = np.argpartition(squared_BN, wanted - 1, axis=1)[:, :wanted]
        near_BL = np.take_along_axis(
            near_BL, np.take_along_axis(squared_BN, near_BL, 1).argsort(axis=1), 1
        )
        index_NL[part] = near_BL
        squared_NL[part] = np.take_along_axis(squared_BN, near_BL, 1)
    return index_NL, squared_NL


def _edge(y_MD: np.ndarray, squared_M: np.ndarray) -> np.ndarray:
    """How far squared distances from the edge of a ball about a row of y are on it (..., M).

    Args:
      y_MD: centres.
      squared_M: squared radii (..., M).
    """
    # A point of the edge is no longer than |y| + r, so both squared are below 3 (y^2 + r^2).
    return 3 * _SAME * ((y_MD**2).sum(axis=1) + squared_M)


def _radii(
    index_NL: np.ndarray, squared_NL: np.ndarray, counts_RN: np.ndarray, k: int
) -> np.ndarray:
    """Squared distance (R, N) to the k-th neighbour among the images counted.

    Further counts of an image itself are neighbours at distance 0. Minus infinity, a ball that
    holds nothing, where the image is not counted.
    """
    radii_RN = np.full(counts_RN.shape, -np.inf)
    for r, counts_N in enumerate(counts_RN):
        total_NL = counts_N[index_NL].cumsum(axis=1) + np.maximum(counts_N - 1, 0)[:, None]
        used_N = counts_N > 0
        if (total_NL[used_N, -1] < k).any():
            raise UserError(
                f"a replicate counts too few images for {k} nearest neighbours: "
                "count at least half of them, or use a smaller k"
            )
        place_N = (total_NL >= k).argmax(axis=1)
        radius_N = np.take_along_axis(squared_NL, place_N[:, None], 1)[:, 0]
        radii_RN[r] = np.where(used_N, np.where(counts_N > k, 0.0, radius_N), -np.inf)
    return radii_RN


def replicates(
    generated_ND: np.ndarray, real_MD: np.ndarray, counts_RN: np.ndarray, k_of: Mapping[str, int]
) -> Prdc:
    """Replicates (R,) of improved precision and recall, density and coverage: generated image i
    counted `counts_RN[r, i]` times, the real side whole, of one round of distances.

    Precision and recall as Kynkäänniemi et al. 2019 (k = 3 there and in torch-fidelity), density
    and coverage as Naeem et al. 2020 (k = 5; their `prdc` package also leaves the edge out of the
    first two). All depend on both numbers of images: keep them equal between models.
    `bootstrap.centre` replicates before storing.

    Args:
      generated_ND: features (N, D) of the generated images.
      real_MD: of the real ones (M, D).
      counts_RN: whole numbers; a row of ones gives the scores themselves.
      k_of: names of the scores that are wanted, and which neighbour their balls reach to.

    Raises:
      UserError: when a side has k images or fewer, a replicate counts too few for k neighbours,
        widths differ or a value is not finite.
    """
    x_ND = arrays.rows(generated_ND, "features of the generated images")
    y_MD = arrays.rows(real_MD, "features of the real images")
    check_widths(x_ND.shape[1], y_MD.shape[1])
    n, m, k = len(x_ND), len(y_MD), max(k_of.values())
    if not 1 <= min(k_of.values()) <= k < min(n, m):
        raise UserError(
            f"{k} nearest neighbours need at least {k + 1} images on either side (k >= 1), there "
            f"are {n} generated and {m} real ones: use more images or a smaller k"
        )
    counts_RN = check_counts(counts_RN, n, least=k + 1)
    # Distances of points near the origin lose fewer digits.
    shift_D = y_MD.mean(axis=0)
    x_ND, y_MD = x_ND - shift_D, y_MD - shift_D
    real_ML = _neighbours(y_MD, k)[1]
    real_M_of = {}
    for name, own in k_of.items():
        radii_M = real_ML[:, own - 1]
        edge_M = _edge(y_MD, radii_M)
        real_M_of[name] = radii_M + edge_M if name == "precision" else radii_M - edge_M
    if "recall" in k_of:
        whole = bool((counts_RN == 1).all())
        near = _neighbours(x_ND, k if whole else min(n - 1, 50 + 4 * k))
        radii_RN = _radii(*near, counts_RN, k_of["recall"])
        radii_RN += _edge(x_ND, radii_RN)

    precise_N, dense_N = np.zeros((2, n))
    recalled_RM = np.zeros((len(counts_RN), m), bool)
    covered_RM = np.zeros((len(counts_RN), m), bool)
    for part, squared_BM in _blocks(x_ND, y_MD):
        if "precision" in k_of:
            precise_N[part] = (squared_BM <= real_M_of["precision"]).any(axis=1)
        if "density" in k_of:
            dense_N[part] = (squared_BM < real_M_of["density"]).sum(axis=1)
        if "coverage" in k_of:
            inside_BM = (squared_BM < real_M_of["coverage"]).astype(np.float32)
            covered_RM |= counts_RN[:, part].astype(np.float32) @ inside_BM > 0
        if "recall" in k_of:
            for r, radii_B in enumerate(radii_RN[:, part]):
                recalled_RM[r] |= (squared_BM <= radii_B[:, None]).any(axis=0)
    total_R = counts_RN.sum(axis=1)
    scores = {
        "precision": counts_RN @ precise_N / total_R,
        "recall": recalled_RM.mean(axis=1),
        "density": counts_RN @ dense_N / (k_of.get("density", k) * total_R),
        "coverage": covered_RM.mean(axis=1),
    }
    return Prdc(**{name: scores[name] for name in k_of})
