"""`Moments`: count, mean and scatter of features, in float64. Shards and hosts simply add."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays

_KIND = "feature moments"


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of a set of feature vectors, a monoid under `merge`.

    Attributes:
      n: how many vectors.
      mean_D: their mean, float64.
      M2_DD: their scatter, the sum of (x - mean)(x - mean)^T, float64. It is a sum about the
        mean and never the raw sum of x x^T, which loses the small variances to cancellation.
    """

    n: int
    mean_D: np.ndarray
    M2_DD: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "mean_D", arrays.freeze(self.mean_D))
        object.__setattr__(self, "M2_DD", arrays.freeze(self.M2_DD))
        d = self.mean_D.size
        if self.n < 0 or self.mean_D.ndim != 1 or self.M2_DD.shape != (d, d):
            raise UserError(
                f"moments need n >= 0, a mean (D,) and a scatter (D, D); got n={self.n}, "
                f"{self.mean_D.shape} and {self.M2_DD.shape}"
            )
        if not (np.isfinite(self.mean_D).all() and np.isfinite(self.M2_DD).all()):
            raise UserError(
                f"moments of {self.n} features are not finite: check the images or the network "
                "they come from"
            )

    @classmethod
    def zero(cls, d: int) -> Moments:
        """Moments of no vectors of width `d`: neutral under `merge`."""
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, features_ND: np.ndarray) -> Moments:
        """Moments of features (N, D), of any float type, summed in float64.

        Raises:
          UserError: when the features are no matrix or not finite.
        """
        features_ND = arrays.rows(features_ND, "features")
        n, d = features_ND.shape
        if n == 0:
            return cls.zero(d)
        mean_D = features_ND.mean(axis=0)
        centred_ND = features_ND - mean_D
        return cls(n, mean_D, centred_ND.T @ centred_ND)

    @property
    def d(self) -> int:
        """Width of the features."""
        return self.mean_D.size

    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D), divisor n - 1 as in every FID code. Needs n >= 2."""
        if self.n < 2:
            raise UserError(
                f"a covariance needs at least 2 images, there is {self.n}: evaluate more images"
            )
        return self.M2_DD / (self.n - 1)

    @functools.cached_property
    def hash(self) -> str:
        """Hash of the values."""
        return arrays.content_hash({"mean_D": self.mean_D, "M2_DD": self.M2_DD}, {"n": self.n})


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan, Golub, LeVeque 1979)."""
    if a.d != b.d:
        raise UserError(f"cannot merge moments of features of width {a.d} and {b.d}")
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n = a.n + b.n
    delta_D = b.mean_D - a.mean_D
    return Moments(
        n,
        (a.n / n) * a.mean_D + (b.n / n) * b.mean_D,
        a.M2_DD + b.M2_DD + np.outer(delta_D, delta_D) * (a.n * b.n / n),
    )


def save(path: epath.PathLike, moments: Moments, extractor: str) -> None:
    """Writes moments to an .npz, whole or not at all.

    Args:
      path: any path `etils.epath` opens.
      moments: what to write.
      extractor: hash of the network, its weights and its input transform that made the features.
    """
    values = {"mean_D": moments.mean_D, "M2_DD": moments.M2_DD}
    arrays.save(path, _KIND, values, {"n": moments.n, "d": moments.d, "extractor": extractor})


def load(path: epath.PathLike, extractor: str) -> Moments:
    """Reads moments written by `save`.

    Raises:
      UserError: when the file is missing, damaged, or of features of another `extractor`.
    """
    values, meta = arrays.load_of(path, _KIND, extractor)
    return Moments(n=meta["n"], **values)
