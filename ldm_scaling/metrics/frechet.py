"""Fréchet distance between Gaussians fitted to features: |m1 - m2|^2 + tr(C1 + C2 - 2 root).

It is a "FID" only on the features of the 2015-12-05 Inception graph. On any other network name it
for that network; values of two networks, or of two sample sizes, cannot be compared: the fitted
covariance of n images inflates the distance by about 1/n.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.moments import Moments


@arrays.one_blas_thread()
def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    # Null eigenvalues come out as some eps * largest, of either sign, and a root would lift them to
    # 1e-8: below the rank tolerance of numpy's `matrix_rank` they count as 0.
    tolerance = len(values_D) * np.finfo(np.float64).eps * values_D[-1]
    values_D = np.where(values_D > tolerance, values_D, 0.0)
    return (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T


@arrays.one_blas_thread()
def _nuclear_norm(matrix: np.ndarray) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def _distance(delta_D: np.ndarray, trace_a: float, trace_b: float, nuclear: float) -> float:
    """The four terms. Mathematically >= 0, so what rounding leaves below 0 is clipped to 0."""
    return max(0.0, float(delta_D @ delta_D + trace_a + trace_b - 2.0 * nuclear))


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
    """

    moments: Moments
    extractor: str

    def __post_init__(self):
        self.moments.covariance()  # Raises where there are too few images.

    @functools.cached_property
    def root_DD(self) -> np.ndarray:
        """Symmetric square root of the covariance."""
        return arrays.freeze(_root(self.moments.covariance()))

    @functools.cached_property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float(np.trace(self.moments.covariance()))

    @property
    def hash(self) -> str:
        """Hash of the statistics, the feature network included."""
        return files.sha256_of([self.extractor, self.moments.hash])


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of the Gaussians with these moments, in float64.

    tr (C1 C2)^{1/2} is taken as the nuclear norm of C1^{1/2} C2^{1/2} with roots by `eigh`: it
    stays real and exact to rounding when a covariance has less than full rank, where `sqrtm` of
    C1 C2 does not (Dowson and Landau 1982 for the distance; Heusel et al. 2017, eq. 6, for its
    use). Symmetric; 0 for equal moments; negative rounding is clipped to 0.

    Raises:
      UserError: when a side has fewer than 2 images or the widths differ.
    """
    check_widths(a.d, b.d)
    cov_a, cov_b = a.covariance(), b.covariance()
    nuclear = _nuclear_norm(_root(cov_a) @ _root(cov_b))
    return _distance(a.mean_D - b.mean_D, np.trace(cov_a), np.trace(cov_b), nuclear)


def frechet_from_features(features_ND: np.ndarray, reference: ReferenceStats) -> float:
    """`frechet_distance` of features (N, D) from a reference, without a D x D root per call.

    With X the centred features, C1 = X^T X / (N - 1) and the nuclear norm of C1^{1/2} C2^{1/2}
    is that of X C2^{1/2} / sqrt(N - 1): an N x D matrix, no more than rank N - 1.

    Raises:
      UserError: when there are fewer than 2 images, the widths differ or a value is not finite.
    """
    features_ND = arrays.rows(features_ND, "features")
    n, d = features_ND.shape
    check_widths(d, reference.moments.d)
    if n < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images, there is {n}: evaluate more")
    mean_D = features_ND.mean(axis=0)
    scaled_ND = (features_ND - mean_D) / np.sqrt(n - 1)
    nuclear = _nuclear_norm(scaled_ND @ reference.root_DD)
    trace = float((scaled_ND**2).sum())
    return _distance(mean_D - reference.moments.mean_D, trace, reference.trace, nuclear)
