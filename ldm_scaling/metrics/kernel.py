"""Kernel distances between two sets of features: KID and CMMD, both a squared MMD.

Every one is made of sums a^T K b with K never held whole: tiles of 1024 x 1024 kernel values are
worked out, summed under all weights at once and dropped. What is kept in memory is the features
in float64, one tile, and one row of weights per subset or replicate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.bootstrap import check_counts
from ldm_scaling.metrics.frechet import check_widths
from ldm_scaling.metrics.similarity import unit_rows

_TILE = 1024
_SUBSET = 1000
_SIGMA = 10.0
_SCALE = 1000.0

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kid:
    """A kernel inception distance.

    Attributes:
      value: mean of the unbiased squared MMD over subsets; may be slightly negative.
      std: its standard deviation over subsets (divisor `subsets`), as the field reports it.
      subsets: how many.
      subset_size: images of either side in each.
    """

    value: float
    std: float
    subsets: int
    subset_size: int


def polynomial(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3, (N, M): the kernel of KID (Binkowski et al. 2018, section 4)."""
    k_NM = x_ND @ y_MD.T
    k_NM /= x_ND.shape[1]
    k_NM += 1.0
    return k_NM * k_NM * k_NM


def gaussian(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1, (N, M), sigma = 10: the kernel of CMMD.

    The -1 cancels in a biased MMD, and without it no digits are lost to values all next to 1.
    """
    k_NM = x_ND @ y_MD.T
    k_NM *= 2.0
    k_NM -= (x_ND**2).sum(axis=1)[:, None]
    k_NM -= (y_MD**2).sum(axis=1)
    np.minimum(k_NM, 0.0, out=k_NM)
    return np.expm1(k_NM / (2.0 * _SIGMA**2))


def _sums(
    kernel: Kernel, x_ND: np.ndarray, a_RN: np.ndarray, y_MD: np.ndarray, b_RM: np.ndarray
) -> np.ndarray:
    """Sum over i, j of a[r, i] k(x_i, y_j) b[r, j], (R,), or with b (1, M) for every r."""
    total_R = np.zeros(len(a_RN))
    same = x_ND is y_MD and a_RN is b_RM
    for i in range(0, len(x_ND), _TILE):
        x, a = x_ND[i : i + _TILE], a_RN[:, i : i + _TILE]
        for j in range(i if same else 0, len(y_MD), _TILE):
            tile = kernel(x, y_MD[j : j + _TILE])
            sums_R = ((a @ tile) * b_RM[:, j : j + _TILE]).sum(axis=1)
            total_R += 2.0 * sums_R if same and j > i else sums_R
    return total_R


def _diagonal(x_ND: np.ndarray) -> np.ndarray:
    """`polynomial` of each row with itself, (N,)."""
    return ((x_ND**2).sum(axis=1) / x_ND.shape[1] + 1.0) ** 3


def _unbiased(
    x_ND: np.ndarray, a_RN: np.ndarray, y_MD: np.ndarray, b_RM: np.ndarray
) -> np.ndarray:
    """Unbiased squared MMD (R,) of sets that count row i a[r, i] times, under `polynomial`."""
    n_R, m_R = a_RN.sum(axis=1), b_RM.sum(axis=1)
    own_x = _sums(polynomial, x_ND, a_RN, x_ND, a_RN) - a_RN @ _diagonal(x_ND)
    own_y = _sums(polynomial, y_MD, b_RM, y_MD, b_RM) - b_RM @ _diagonal(y_MD)
    cross = _sums(polynomial, x_ND, a_RN, y_MD, b_RM)
    return own_x / (n_R * (n_R - 1)) + own_y / (m_R * (m_R - 1)) - 2.0 * cross / (n_R * m_R)


def _both(generated_ND: np.ndarray, real_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x_ND = arrays.rows(generated_ND, "features of the generated images")
    y_MD = arrays.rows(real_MD, "features of the real images")
    check_widths(x_ND.shape[1], y_MD.shape[1])
    if not len(x_ND) or not len(y_MD):
        raise UserError(
            f"there are {len(x_ND)} generated and {len(y_MD)} real images: a distance needs both"
        )
    return x_ND, y_MD


def _subset_size(asked: int | None, n: int, m: int) -> int:
    size = min(_SUBSET, n, m) if asked is None else asked
    if size < 2:
        raise UserError(
            f"KID needs subsets of at least 2 images; there are {n} generated and {m} real ones: "
            "evaluate more images"
        )
    if size > min(n, m):
        raise UserError(
            f"KID subsets of {size} images cannot be drawn from {n} generated and {m} real ones: "
            f"use a subset size of at most {min(n, m)}, or more images"
        )
    return size


def kid(
    generated_ND: np.ndarray,
    real_MD: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 2020,
) -> Kid:
    """Kernel inception distance (Binkowski et al. 2018), mean over random subsets.

    Subsets are drawn as torch-fidelity 0.4 draws them (`metric_kid.py`: numpy's frozen
    `RandomState`, generated images first, its default seed), so the value is its value in float64.

    Args:
      generated_ND: Inception pool features (N, 2048), or those of any network.
      real_MD: of the real images (M, 2048).
      subsets: how many.
      subset_size: images of either side in each; by default 1000, or all where there are fewer.
      seed: of the drawing.

    Raises:
      UserError: when widths differ, a value is not finite, there are fewer than 2 images, or
        `subset_size` is more than there are.
    """
    x_ND, y_MD = _both(generated_ND, real_MD)
    n, m = len(x_ND), len(y_MD)
    size = _subset_size(subset_size, n, m)
    if subsets < 1:
        raise UserError(f"KID needs at least 1 subset, got {subsets}")
    rng = np.random.RandomState(seed)
    draws = [
        (rng.choice(n, size, replace=False), rng.choice(m, size, replace=False))
        for _ in range(subsets)
    ]
    if n * n + m * m + 2 * n * m <= subsets * (2 * size) ** 2:
        # All pairs, once: cheaper than the pairs of every subset.
        a_SN, b_SM = np.zeros((subsets, n)), np.zeros((subsets, m))
        for s, (i, j) in enumerate(draws):
            a_SN[s, i], b_SM[s, j] = 1.0, 1.0
        values_S = _unbiased(x_ND, a_SN, y_MD, b_SM)
    else:
        one = np.ones((1, size))
        values_S = np.array([_unbiased(x_ND[i], one, y_MD[j], one)[0] for i, j in draws])
    return Kid(float(values_S.mean()), float(values_S.std()), subsets, size)


def kid_replicates(
    generated_ND: np.ndarray, real_MD: np.ndarray, counts_RN: np.ndarray, *,
    whole: Kid | None = None, **options: int,
) -> np.ndarray:
    """Replicates (R,) of `kid` with the same options: generated image i counted `counts[r, i]`.

    `whole` is what `kid` gave with them, where that is known: it is worked out otherwise.

    A replicate is the unbiased squared MMD over all pairs, which the mean over subsets estimates,
    plus what is left to the drawing of subsets: a normal number of deviation std / sqrt(subsets).
    Those of two models are drawn independently, which makes intervals of their differences
    somewhat too wide, never too narrow. `bootstrap.centre` them before storing.

    Raises:
      UserError: as `kid`, and when a replicate counts fewer than 2 images.
    """
    x_ND, y_MD = _both(generated_ND, real_MD)
    a_RN = check_counts(counts_RN, len(x_ND), least=2).astype(np.float64)
    whole = whole or kid(x_ND, y_MD, **options)
    values_R = _unbiased(x_ND, a_RN, y_MD, np.ones((1, len(y_MD))))
    rng = np.random.default_rng(int(files.sha256_of(x_ND.tobytes()), 16))
    return values_R + rng.normal(0.0, whole.std / np.sqrt(whole.subsets), len(values_R))


def cmmd_replicates(
    generated_NE: np.ndarray, real_ME: np.ndarray, counts_RN: np.ndarray
) -> np.ndarray:
    """Replicates (R,) of CMMD (Jayasumana et al. 2024): 1000 times the biased squared MMD of CLIP
    embeddings, generated image i counted `counts_RN[r, i]` times.

    Gaussian kernel of sigma 10 on embeddings scaled to length 1, as the authors' `distance.py`;
    theirs are of CLIP ViT-L/14 at 336 pixels.

    Args:
      generated_NE: embeddings (N, E), of unit length or not.
      real_ME: of the real images (M, E).
      counts_RN: whole numbers; a row of ones gives the score itself.

    Raises:
      UserError: when widths differ, a value is not finite, a side is empty or a row is zero.
    """
    x_NE, y_ME = _both(generated_NE, real_ME)
    x_NE = unit_rows(x_NE, "embeddings of the generated images")
    y_ME = unit_rows(y_ME, "embeddings of the real images")
    a_RN = check_counts(counts_RN, len(x_NE), least=1).astype(np.float64)
    a_RN /= a_RN.sum(axis=1, keepdims=True)
    b_1M = np.full((1, len(y_ME)), 1.0 / len(y_ME))
    own_x = _sums(gaussian, x_NE, a_RN, x_NE, a_RN)
    own_y = _sums(gaussian, y_ME, b_1M, y_ME, b_1M)
    return _SCALE * (own_x + own_y - 2.0 * _sums(gaussian, x_NE, a_RN, y_ME, b_1M))
