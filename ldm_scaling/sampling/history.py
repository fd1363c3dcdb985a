"""Looking back: the x0 of earlier nodes as a polynomial in log-SNR, integrated along a step."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_SERIES_TERMS = 20


def moments(H_N: np.ndarray, count: int) -> np.ndarray:
    """I_j = integral from 0 to 1 of H exp(-H (1 - s)) s^j ds for j < count: (count, N).

    What x0 = s^j along a step adds to x', as a share of alpha'. In the papers' symbols I_0 is
    1 - e^-H, I_1 is phi_2 and I_2 is -2 phi_3. Exact to rounding from H = 0 to infinity.
    """
    H_N = np.asarray(H_N, np.float64)
    I_0 = -np.expm1(-H_N)
    by_parts = [I_0]
    m = np.arange(_SERIES_TERMS)
    small = np.minimum(H_N, 1)
    terms = small[..., None] ** m / np.array([math.factorial(i) for i in m], np.float64)
    out = [I_0]
    for j in range(1, count):
        with np.errstate(divide="ignore", invalid="ignore"):
            by_parts.append(1 - j / H_N * by_parts[-1])
        # The formula above loses all digits as H goes to 0; this series has positive terms only.
        series = small * np.exp(-small) * (terms / (m + j + 1)).sum(-1)
        out.append(np.where(H_N < 1, series, by_parts[-1]))
    return np.stack(out)


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """Differences of the x0 of the nodes behind, per step h, by divided differences.

    Attributes:
        nearer, farther: (N,) 1/r0 = h / h_before and 1/r1 = h / h_before_that; 0 where a step
            does not look back that far.
        share: (N,) r0 / (r0 + r1), 0 where 1/r1 is.
    """

    nearer: np.ndarray
    farther: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, h_N: np.ndarray, order_N: np.ndarray) -> History:
        """For steps h_N of the given orders: 1 looks back at nothing, 2 at one node, 3 at two."""
        def inverse(back: int) -> np.ndarray:
            out = np.zeros_like(h_N)
            k = np.flatnonzero(order_N > back)
            # From pure noise h_before is infinite, and the step looks less far back by itself.
            out[k] = h_N[k] / h_N[k - back]
            return out

        nearer, farther = inverse(1), inverse(2)
        total = nearer + farther
        share = np.divide(farther, total, out=np.zeros_like(total), where=farther > 0)
        return cls(nearer, farther, share)

    def differences(
        self, m0: np.ndarray, m1: np.ndarray, m2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first difference behind, the slope here and half the second derivative."""
        first, before = self.nearer * (m0 - m1), self.farther * (m1 - m2)
        change = self.share * (first - before)
        return first, first + change, self.nearer * change
