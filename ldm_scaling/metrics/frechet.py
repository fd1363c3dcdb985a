"""Fréchet distance between Gaussians fitted to features: |m1 - m2|^2 + tr(C1 + C2 - 2 root).

It is a "FID" only on the features of the 2015-12-05 Inception graph. On any other network name it
for that network; values of two networks, or of two sample sizes, cannot be compared: the fitted
covariance of n images inflates the distance by about 1/n.

The root's trace, tr (C1 C2)^{1/2}, is the sum of singular values of R1^T R2 for any R with
R R^T = C. With R1 = L from a pivoted Cholesky factorisation they are the roots of the eigenvalues
of L^T C2 L: no square root of a matrix is formed and no unsymmetric eigenvalue problem is solved.
Pivoting puts the large directions first, and on a matrix graded in that way the symmetric
eigenvalue solver finds small eigenvalues to nearly their own precision. Where the product is
singular nevertheless, rounding of the size of eps would be lifted to 1e-8 by the root: then the
singular values are taken, which need none.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import scipy

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.moments import Moments

_EPS = np.finfo(np.float64).eps
# Below this part of the largest eigenvalue of L^T C2 L, which is graded, an eigenvalue may be
# rounding alone; one of a product of features, which is not, has lost digits that a root needs.
_SINGULAR = 100 * _EPS
_SINGULAR_UNGRADED = 1e-9
# What makes a side.
_MOMENTS = "moments.Moments.of(features)"
_REFERENCE = "frechet.ReferenceStats(moments, extractor)"


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """R with C[order][:, order] = R R^T for a covariance C, of C's rank to rounding.

    Attributes:
      order_D: the order of pivots.
      root_DR: R, float64; lower trapezoidal where `triangular`.
      triangular: whether it is.
    """

    order_D: np.ndarray
    root_DR: np.ndarray
    triangular: bool

    @property
    def rank(self) -> int:
        """Rank of C to rounding."""
        return self.root_DR.shape[1]

    @functools.cached_property
    def plain_DR(self) -> np.ndarray:
        """R in C's own order of rows."""
        plain_DR = np.empty(self.root_DR.shape)
        plain_DR[self.order_D] = self.root_DR
        return plain_DR


@arrays.one_blas_thread()
def factorise(covariance_DD: np.ndarray) -> Factor:
    """Pivoted Cholesky factor of a positive semi-definite matrix (Higham 1990; LAPACK dpstrf).

    A matrix that is not semi-definite beyond rounding in float64, such as statistics that were
    stored in float32, gets its root from eigenvectors instead, negative eigenvalues as 0.
    """
    d = len(covariance_DD)
    diagonal_D = np.diagonal(covariance_DD)
    tolerance = d * _EPS * max(diagonal_D.max(), 0.0)
    lower_DD, pivots_D, rank, _ = scipy.linalg.lapack.dpstrf(
        covariance_DD.T, tol=tolerance, lower=1
    )
    order_D = pivots_D - 1
    root_DR = np.triu(lower_DD.T[:rank]).T
    left_D = diagonal_D[order_D] - np.einsum("dr,dr->d", root_DR, root_DR)
    if np.abs(left_D).max() <= 10 * tolerance:
        return Factor(order_D, root_DR, True)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    kept_D = values_D > d * _EPS * values_D[-1]
    return Factor(np.arange(d), vectors_DD[:, kept_D] * np.sqrt(values_D[kept_D]), False)


@arrays.one_blas_thread()
def _sum_of_singular_values(matrix: np.ndarray) -> float:
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    values = np.linalg.eigvalsh(wide @ wide.T)
    if len(values) and values[0] > _SINGULAR_UNGRADED * values[-1]:
        return float(np.sqrt(values).sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


@arrays.one_blas_thread()
def _overlap(a: Factor, covariance_DD: np.ndarray) -> float | None:
    """tr (C1 C2)^{1/2} from C1's factor and C2, or None where their product is singular."""
    if a.rank == 0:
        return 0.0
    c_DD = covariance_DD.take(a.order_D, axis=0).take(a.order_D, axis=1)
    if a.triangular and a.rank == len(c_DD):
        # Half the work of two products: c is symmetric, so its transpose is it in Fortran's order.
        m_RR, _ = scipy.linalg.lapack.dsygst(c_DD.T, a.root_DR, itype=2, lower=1, overwrite_a=1)
    else:
        m_RR = a.root_DR.T @ (c_DD @ a.root_DR)
    values_R = scipy.linalg.eigvalsh(
        m_RR, lower=True, driver="ev", overwrite_a=True, check_finite=False
    )
    if values_R[0] <= _SINGULAR * values_R[-1]:
        return None
    return float(np.sqrt(values_R).sum())


def _distance(delta_D: np.ndarray, trace_a: float, trace_b: float, overlap: float) -> float:
    """The four terms. Mathematically >= 0, so what rounding leaves below 0 is clipped to 0."""
    return max(0.0, float(delta_D @ delta_D + trace_a + trace_b - 2.0 * overlap))


def _require(kind: type, given: object, made: str) -> None:
    """Raises `UserError` unless a side is of a type, naming what makes it."""
    if not isinstance(given, kind):
        raise UserError(
            f"a side of this Fréchet distance is a {kind.__name__}, not a {type(given).__name__}: "
            f"{made} makes one"
        )


def check_widths(a: int, b: int) -> None:
    """Raises `UserError` unless two feature widths are equal."""
    if a != b:
        raise UserError(
            f"features of width {a} cannot be compared with features of width {b}: "
            "both sides need the same feature network"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStats:
    """The side of the distance that stays, with what many comparisons share worked out once.

    Attributes:
      moments: moments of the reference features, n >= 2.
      extractor: hash of the network, its weights and its input transform that made them.
      counted: False for a published file that does not say how many images it is of;
        `moments.n` then only stands for the divisor of its scatter.
    """

    moments: Moments
    extractor: str
    counted: bool = True

    def __post_init__(self):
        self.moments.covariance()  # Raises where there are too few images.

    @functools.cached_property
    def factor(self) -> Factor:
        """Factor of the covariance."""
        return factorise(self.moments.covariance())

    @property
    def root_DR(self) -> np.ndarray:
        """R with R R^T = covariance; (D, rank)."""
        return self.factor.plain_DR

    @functools.cached_property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float(np.trace(self.moments.covariance()))

    @property
    def hash(self) -> str:
        """Hash of the statistics, the feature network included."""
        said = [self.extractor, self.moments.hash]
        return files.sha256_of(said if self.counted else [*said, "count unknown"])


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of the Gaussians with these moments, in float64.

    Real and exact to rounding whatever the covariances' rank, where `sqrtm` and `eigvals` of
    C1 C2 are not (Dowson and Landau 1982 for the distance; Heusel et al. 2017, eq. 6, for its
    use). Symmetric; 0 for equal moments; negative rounding is clipped to 0.

    Raises:
      UserError: when a side has fewer than 2 images, is no `Moments`, or the widths differ.
    """
    for side in (a, b):
        _require(Moments, side, _MOMENTS)
    check_widths(a.d, b.d)
    # The side with fewer images is factorised: its rank is the smaller one, and the product's.
    few, many = sorted((a, b), key=lambda moments: moments.n)
    return frechet_from_moments(many, ReferenceStats(few, ""))


def frechet_from_moments(moments: Moments, reference: ReferenceStats) -> float:
    """`frechet_distance` of moments from a reference whose factor is worked out once.

    Raises:
      UserError: when there are fewer than 2 images, the widths differ, or a side is of another
        type.
    """
    _require(Moments, moments, _MOMENTS)
    _require(ReferenceStats, reference, _REFERENCE)
    check_widths(moments.d, reference.moments.d)
    covariance_DD = moments.covariance()
    # Of no more images than dimensions the product is singular, and their own factor is smaller.
    overlap = _overlap(reference.factor, covariance_DD) if moments.n > moments.d else None
    if overlap is None:
        product = factorise(covariance_DD).plain_DR.T @ reference.root_DR
        overlap = _sum_of_singular_values(product)
    delta_D = moments.mean_D - reference.moments.mean_D
    return _distance(delta_D, np.trace(covariance_DD), reference.trace, overlap)


def frechet_from_features(features_ND: np.ndarray, reference: ReferenceStats) -> float:
    """`frechet_distance` of features (N, D) from a reference whose factor is worked out once.

    With no more images than dimensions no D x D problem is solved: X the centred features,
    R R^T = C2, the singular values are those of X R / sqrt(N - 1), of rank N - 1 at most.

    Raises:
      UserError: when there are fewer than 2 images, the widths differ, a value is not finite or
        the reference is no `ReferenceStats`.
    """
    _require(ReferenceStats, reference, _REFERENCE)
    features_ND = arrays.rows(features_ND, "features")
    n, d = features_ND.shape
    check_widths(d, reference.moments.d)
    if n < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images, there is {n}: evaluate more")
    if n > d:
        return frechet_from_moments(Moments.of(features_ND), reference)
    mean_D = features_ND.mean(axis=0)
    scaled_ND = (features_ND - mean_D) / np.sqrt(n - 1)
    # Centred rows are one too many. Reflected so that the first becomes their sum, 0, they keep
    # their singular values without it.
    full_ND = scaled_ND[1:] - scaled_ND[0] / (np.sqrt(n) + 1)
    overlap = _sum_of_singular_values(full_ND @ reference.root_DR)
    trace = float((scaled_ND**2).sum())
    return _distance(mean_D - reference.moments.mean_D, trace, reference.trace, overlap)
