"""Is one model better than another? Both are scored on the same prompts and noise, in pairs.

Pairing takes out what prompts and noise have in common, most of a score's spread. A p-value is
two-sided, for "no difference"; it says nothing of how large the difference is: read the interval.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays, bootstrap


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Model a against model b.

    Attributes:
      difference: a's metric less b's.
      low: lower end of its interval.
      high: upper end.
      p_value: two-sided.
      level: of the interval.
      method: how interval and p-value were found.
    """

    difference: float
    low: float
    high: float
    p_value: float
    level: float
    method: str


def distributions(
    a: float,
    b: float,
    replicates_a_R: np.ndarray,
    replicates_b_R: np.ndarray,
    *,
    freedom: float,
    level: float = 0.95,
) -> Comparison:
    """Compares metrics of whole sets, FID or KID say, by the paired bootstrap.

    The interval is `bootstrap.interval` of the replicates' differences, the p-value `p_of` them.

    Args:
      a: model a's value.
      b: model b's.
      replicates_a_R: raw replicates of a, from the same counts as b's.
      replicates_b_R: raw replicates of b.
      freedom: degrees of freedom of the images of each, their number less that of strata.
      level: of the interval.

    Raises:
      UserError: when the numbers of replicates differ, or one of them or a value is not finite.
    """
    if not np.isfinite([a, b]).all():
        raise UserError(f"scores {a} and {b}: only finite ones can be compared")
    a_R, b_R = (
        arrays.rows(np.asarray(v)[:, None], "bootstrap replicates")[:, 0]
        for v in (replicates_a_R, replicates_b_R)
    )
    if len(a_R) != len(b_R) or len(a_R) < 2:
        raise UserError(
            f"{len(a_R)} and {len(b_R)} replicates: a paired comparison needs as many of both "
            "models, at least 2, from the same counts"
        )
    centred_R = bootstrap.centre(a - b, a_R - b_R)
    low, high = bootstrap.interval(centred_R, freedom, level)
    p_value = p_of(a - b, centred_R, freedom)
    return Comparison(a - b, low, high, p_value, level, "paired bootstrap")


def p_of(difference: float, replicates_R: np.ndarray, freedom: float) -> float:
    """Two-sided p-value of a difference against 0: it over its replicates' standard deviation, as
    Student's t, of the images' degrees of freedom or the replicates' where these are fewer. A share
    of 100 replicates beyond 0 is never small enough to survive a correction for several
    comparisons.

    Raises:
      UserError: with fewer than 2 replicates, or one that is not finite.
    """
    replicates_R = arrays.rows(np.asarray(replicates_R)[:, None], "bootstrap replicates")[:, 0]
    if len(replicates_R) < 2:
        raise UserError(
            f"a p-value needs the spread of at least 2 replicates, there are {len(replicates_R)}"
        )
    error = float(np.std(replicates_R, ddof=1))
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    freedom = bootstrap.least_freedom(replicates_R, freedom)
    return float(2 * scipy.stats.t.sf(abs(difference) / error, freedom))
