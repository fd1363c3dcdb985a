"""Corrections for many comparisons: their worked definitions, and the rates that they promise."""

import numpy as np
import pytest
from scipy import stats

from ldm_scaling.errors import UserError
from ldm_scaling.study.statistics import multiple


def test_holm_by_hand():
    """Four p-values; the smallest is multiplied by 4, the next by 3, and none falls below it."""
    assert multiple.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, 0.02])


def test_order_is_kept_and_nothing_is_made_smaller():
    p_K = np.random.default_rng(0).uniform(size=50) ** 3
    shuffled_K = np.random.default_rng(1).permutation(50)
    for correct in (multiple.holm, multiple.benjamini_hochberg):
        adjusted_K = correct(p_K)
        assert (adjusted_K >= p_K).all() and (adjusted_K <= 1).all()
        np.testing.assert_allclose(correct(p_K[shuffled_K]), adjusted_K[shuffled_K])
    assert (multiple.benjamini_hochberg(p_K) <= multiple.holm(p_K)).all()


@pytest.mark.parametrize("p_values", [[], [0.2]])
def test_none_and_one_stay_as_they_are(p_values):
    assert multiple.holm(p_values).tolist() == p_values
    assert multiple.benjamini_hochberg(p_values).tolist() == p_values


def test_error_rates_are_kept():
    """20 comparisons, 12 of nothing: Holm errs in few families, BH in a small share of calls."""
    rng, families = np.random.default_rng(2), 2000
    z = rng.normal(size=(families, 20))
    z[:, 12:] += 3.2
    p = 2 * stats.norm.sf(np.abs(z))
    called = np.stack([multiple.holm(row) for row in p]) <= 0.05
    assert called[:, :12].any(axis=1).mean() <= 0.055
    assert called[:, 12:].mean() > 0.4
    found = np.stack([multiple.benjamini_hochberg(row) for row in p]) <= 0.05
    false = found[:, :12].sum(axis=1) / np.maximum(found.sum(axis=1), 1)
    assert false.mean() <= 0.05
    assert found[:, 12:].mean() > called[:, 12:].mean()


def test_what_is_no_probability_is_refused():
    with pytest.raises(UserError, match="between 0 and 1"):
        multiple.holm([0.1, 1.2])
    with pytest.raises(UserError, match="between 0 and 1"):
        multiple.benjamini_hochberg([float("nan")])
