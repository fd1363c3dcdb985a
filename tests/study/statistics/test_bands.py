"""Intervals of points and of whole curves hold the truth at the stated rate."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import curves
from ldm_scaling.study.statistics import bands
from tests.study import fake_records as fake

FD = "fd_effnetlite0"


def _study(rng, points, correlated, replicates=200):
    """An estimate of `points` zeros and its replicates, which scatter about it as it does."""
    def noise(n):
        own = rng.normal(size=(points, n))
        return (0.8 * rng.normal(size=n) + 0.6 * own if correlated else own) * scale[:, None]

    scale = np.linspace(0.5, 3, points)
    value_P = noise(1)[:, 0]
    return value_P, value_P[:, None] + noise(replicates)


@pytest.mark.parametrize("correlated", [False, True])
def test_points_and_curves_are_covered_at_the_stated_rate(correlated):
    rng, single, whole, naive = np.random.default_rng(0), [], [], []
    for _ in range(800):
        found = bands.band(*_study(rng, 6, correlated))
        inside = (found.low_P <= 0) & (found.high_P >= 0)
        single.append(inside.mean())
        naive.append(inside.all())
        whole.append(((found.all_low_P <= 0) & (found.all_high_P >= 0)).all())
    assert np.mean(single) == pytest.approx(0.95, abs=0.015)
    assert np.mean(whole) == pytest.approx(0.95, abs=0.02)
    assert np.mean(naive) < 0.9  # Intervals of points are no band.


@pytest.mark.parametrize("n", [8, 20])
def test_bands_of_few_images_know_that_these_are_few(n):
    rng, single, whole = np.random.default_rng(2), [], []
    for trial in range(400):
        values_PN = 0.8 * rng.normal(size=n) + 0.6 * rng.normal(size=(6, n))
        counts_RN = bootstrap.resample_counts(n, 200, trial)
        stored = [bootstrap.centre(v.mean(), bootstrap.mean_replicates(v, counts_RN))
                  for v in values_PN]
        found = bands.band(values_PN.mean(axis=1), np.stack(stored), freedom=n - 1)
        single.append(((found.low_P <= 0) & (found.high_P >= 0)).mean())
        whole.append(((found.all_low_P <= 0) & (found.all_high_P >= 0)).all())
    assert np.mean(single) == pytest.approx(0.95, abs=0.02)
    assert np.mean(whole) > 0.87  # Percentiles of 8: 0.79.


def test_a_band_of_points_that_move_together_is_narrower():
    rng = np.random.default_rng(1)
    critical = [np.mean([bands.band(*_study(rng, 6, c)).critical for _ in range(100)])
                for c in (False, True)]
    assert 1.96 < critical[1] < critical[0] < 2.8


def test_bands_of_records_curves_hold_the_truth():
    truth, hit = fake.Truth(), []
    for seed in range(60):
        records = fake.make(truth, models=("c8", "c24"), samplers=("ddim",), seed=seed)
        for key, band in bands.of_curves(curves.quality_curves(records, FD)).items():
            points = curves.quality_curves(records, FD)[key]
            true_P = [truth.distance(p.model, p.sampler, p.steps, p.guidance) for p in points]
            hit.append(((band.all_low_P <= true_P) & (true_P <= band.all_high_P)).all())
            assert band.level == 0.95 and band.value_P.tolist() == [p.value for p in points]
    assert np.mean(hit) >= 0.89  # 120 curves; two standard errors below 0.95 is 0.91.


def test_points_without_spread_have_no_width():
    found = bands.band(np.zeros(2), np.stack([np.zeros(50), np.arange(50) - 24.5]))
    assert found.all_low_P[0] == found.all_high_P[0] == 0
    assert found.all_high_P[1] > 20


def test_mistakes_are_named():
    with pytest.raises(UserError, match="at least 20 bootstrap replicates, there are 5"):
        bands.band(np.zeros(2), np.zeros((2, 5)))
    with pytest.raises(UserError, match="one row of replicates per point"):
        bands.band(np.zeros(2), np.zeros((3, 50)))
    assert bands.of_curves(curves.quality_curves(fake.make(replicates=0), FD)) == {}
