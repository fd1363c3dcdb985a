"""FID-infinity takes the bias out, and is the line that it says."""

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_distance, frechet_from_features
from ldm_scaling.metrics.infinity import frechet_infinity, infinity_replicates
from ldm_scaling.metrics.moments import Moments

D = 12
SCALE_D = np.arange(1, D + 1.0) ** -0.5


def _gaussian(mean, scale, n=10**6):
    return Moments(n, np.full(D, mean), np.diag((scale * SCALE_D) ** 2) * (n - 1))


REFERENCE = ReferenceStats(_gaussian(0.0, 1.0), "net")
EXACT = frechet_distance(_gaussian(0.1, 1.1), REFERENCE.moments)



def _features(rng, n):
    return 0.1 + 1.1 * rng.normal(size=(n, D)) * SCALE_D


def test_it_is_the_intercept_of_its_own_points_and_has_no_bias():
    rng = np.random.default_rng(0)
    plain, found = [], []
    for trial in range(60):
        x = _features(rng, 400)
        line = frechet_infinity(x, REFERENCE, smallest=100, seed=trial)
        plain.append(frechet_from_features(x, REFERENCE))
        found.append(line.value)
    assert line.sizes[0] == 100 and line.sizes[-1] == 400 and len(line.sizes) == 15
    assert line.distances[-1] == pytest.approx(plain[-1])
    inverse = 1 / np.array(line.sizes)
    (slope, intercept), covariance = np.polyfit(inverse, line.distances, 1, cov=True)
    assert (line.slope, line.value) == pytest.approx((slope, intercept), rel=1e-6)
    assert line.error == pytest.approx(np.sqrt(covariance[1, 1]), rel=1e-6)
    # The distance itself is too large by many standard errors, the intercept is not.
    error = np.std(plain) / np.sqrt(60)
    assert np.mean(plain) > EXACT + 10 * error
    assert np.mean(found) == pytest.approx(EXACT, abs=4 * np.std(found) / np.sqrt(60))


def test_replicates_spread_as_the_value_does():
    rng = np.random.default_rng(1)
    values = [frechet_infinity(_features(rng, 300), REFERENCE, smallest=75, points=6, seed=s).value
              for s in range(60)]
    x = _features(rng, 300)
    counts_RN = bootstrap.resample_counts(300, 60, 0)
    drawn_R = infinity_replicates(x, REFERENCE, counts_RN, smallest=75, points=6)
    # Halves also draw subsets anew: on the safe side, and not endless.
    assert 0.8 * np.std(values) < drawn_R.std() < 2.5 * np.std(values)


def test_mistakes_say_what_is_wrong():
    x = _features(np.random.default_rng(2), 50)
    with pytest.raises(UserError, match="15 subsets of 5000 to 50 images"):
        frechet_infinity(x, REFERENCE)
    # Sizes from nearly all images to all: a line without a length.
    with pytest.raises(UserError, match="15 subsets of 26 to 50 images.*twice the images"):
        frechet_infinity(x, REFERENCE, smallest=26)
    least = frechet_infinity(x, REFERENCE, smallest=25)
    assert "subsets of 25 to 50 images" in least.remark and f"{least.error:.2g}" in least.remark
    odd = bootstrap.resample_counts(51, 2, 0)  # Of halves, rounded down, as well.
    assert len(infinity_replicates(_features(np.random.default_rng(3), 51), REFERENCE, odd,
                                   smallest=25, points=3)) == 2
    with pytest.raises(UserError, match="at least 3 subsets"):
        frechet_infinity(x, REFERENCE, smallest=10, points=2)
    with pytest.raises(UserError, match="not finite"):
        frechet_infinity(np.full((50, D), np.nan), REFERENCE, smallest=10)
