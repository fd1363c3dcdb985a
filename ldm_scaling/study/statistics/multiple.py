"""Many comparisons at once: p-values that keep their meaning however many there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy

from ldm_scaling.errors import UserError


def _checked(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    p_K = np.asarray(p_values, np.float64)
    if p_K.ndim != 1 or not ((p_K >= 0) & (p_K <= 1)).all():
        raise UserError(f"p-values are a list of numbers between 0 and 1, got {p_K.tolist()}")
    return p_K


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p-values (K,), in the order given: family-wise error (Holm 1979).

    Calling those at or below a level different makes even one false call with at most that
    probability, however the comparisons depend on each other.
    """
    p_K = _checked(p_values)
    order_K = np.argsort(p_K, kind="stable")
    stepped_K = p_K[order_K] * np.arange(len(p_K), 0, -1)
    adjusted_K = np.empty_like(p_K)
    adjusted_K[order_K] = np.minimum(np.maximum.accumulate(stepped_K), 1.0)
    return adjusted_K


def benjamini_hochberg(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p-values (K,), in the order given: false discovery rate (Benjamini, Hochberg 1995).

    Among those at or below a level the expected share of false calls is at most that level, for
    comparisons that are independent or depend positively on each other.
    """
    p_K = _checked(p_values)
    return scipy.stats.false_discovery_control(p_K, method="bh") if len(p_K) else p_K
