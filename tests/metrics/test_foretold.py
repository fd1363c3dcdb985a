"""Distances foretold for more images than there are: the excess that differs between sets goes."""

import itertools

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, foretold, kernel
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.metrics.moments import Moments

D, IMAGES = 40, 160
SCALE_D = np.geomspace(3, 0.1, D)
REAL = ReferenceStats(
    Moments(10**5, np.zeros(D), np.diag(SCALE_D**2) * (10**5 - 1)), "planted")


def _set(seed, spread, shift, n):
    """Images of less or more variety than real ones, off by a shift."""
    rng = np.random.default_rng(seed)
    mean_D = np.zeros(D)
    mean_D[0] = shift
    return mean_D + spread * SCALE_D * rng.normal(size=(n, D))


def _foretold(x_ND, images):
    counts_RN = bootstrap.resample_counts(len(x_ND), 30, 0)
    halves = float(bootstrap.frechet_replicates(x_ND, REAL, counts_RN).mean())
    value = frechet_from_features(x_ND, REAL)
    return foretold.foretold(value, halves, len(x_ND), images, REAL)


@pytest.mark.parametrize("n", [32, 80])
def test_sets_of_different_variety_are_foretold_without_their_excess(n):
    """Fewer images than features, and more: the mean over trials, at n, foretold, and at N."""
    at_n, found, at_all = ([] for _ in range(3))
    for spread, shift in ((0.6, 1.0), (0.9, 2.0), (1.2, 0.0)):
        rows = []
        for seed in range(60):
            x_ND = _set(seed, spread, shift, IMAGES)
            rows.append([frechet_from_features(x_ND[:n], REAL), _foretold(x_ND[:n], IMAGES),
                         frechet_from_features(x_ND, REAL)])
        for kept, value in zip((at_n, found, at_all), np.mean(rows, axis=0), strict=True):
            kept.append(value)
    raw, left = np.array(at_n) - at_all, np.array(found) - at_all
    assert (raw > 0).all()
    assert (np.abs(left) < 0.15 * raw).all()
    assert np.ptp(left) < 0.3 * np.ptp(raw)


def test_the_excess_falls_as_images_grow_and_is_the_same_every_time():
    drops = [foretold.excess(REAL, n) for n in (8, 20, 50, 150, 400)]
    assert drops == sorted(drops, reverse=True)
    again = ReferenceStats(REAL.moments, REAL.extractor)
    assert foretold.excess(again, 50) == foretold.excess(REAL, 50)


def test_all_images_foretell_themselves():
    x_ND = _set(0, 0.9, 1.0, 64)
    assert _foretold(x_ND, 64) == frechet_from_features(x_ND, REAL)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="that of as many or more.*asked for 50"):
        foretold.foretold(1.0, 2.0, 60, 50, REAL)
    with pytest.raises(UserError, match="at least 2 images"):
        foretold.excess(REAL, 1)
    still = ReferenceStats(Moments.of(np.ones((10, 4))), "still")
    with pytest.raises(UserError, match="its features do not vary"):
        foretold.foretold(1.0, 2.0, 8, 100, still)


def test_a_biased_squared_mmd_ends_at_the_unbiased_one():
    """Of all halves, and infinitely many images: by the definition of both."""
    n, rng = 6, np.random.default_rng(0)
    x_NE, y_ME = rng.normal(size=(n, 3)), rng.normal(size=(5, 3)) + 1
    halves_RN = np.array([
        [i in half for i in range(n)] for half in itertools.combinations(range(n), n // 2)
    ], int)
    halves = kernel.cmmd_replicates(x_NE, y_ME, halves_RN).mean()
    x_NE, y_ME = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x_NE, y_ME))

    def mean(a, b, diagonal=True):
        k = np.exp(-((a[:, None] - b) ** 2).sum(-1) / 200)
        return k.mean() if diagonal else k[~np.eye(len(k), dtype=bool)].mean()

    own, cross = mean(y_ME, y_ME), mean(x_NE, y_ME)
    value, unbiased = (
        1000 * (mean(x_NE, x_NE, diagonal) + own - 2 * cross) for diagonal in (True, False)
    )
    assert foretold.inverse(value, halves, n, np.inf) == pytest.approx(unbiased, rel=1e-9)
    assert foretold.inverse(value, halves, n, n) == value
