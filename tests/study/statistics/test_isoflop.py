"""Iso-FLOP profiles against the law's own frontier, which is known in closed form."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize

from ldm_scaling.errors import UserError
from ldm_scaling.study.statistics import fits, isoflop
from ldm_scaling.study.statistics.laws import Law


def _runs(law, width=4.0, noise=0.0, shift=1.0, seed=0):
    """Nine sizes about the best one at each of five budgets."""
    rng, out = np.random.default_rng(seed), []
    for flops in np.geomspace(1e18, 1e21, 5):
        best, _ = law.best_split(flops)
        for n in best * shift * np.geomspace(1 / width, width, 9):
            loss = law(np.array([[n, flops / 6 / n]]))[0] * np.exp(rng.normal(0, noise))
            out.append((flops, n, loss))
    return np.array(out).T


def test_best_split_is_the_least_of_the_law():
    law = Law(1.8, (480.0, 2085.0), (0.35, 0.37))
    for flops in (1e18, 1e22):
        found = optimize.minimize_scalar(
            lambda logn, flops=flops: law(np.array([[np.exp(logn), flops / 6 / np.exp(logn)]]))[0],
            bounds=(np.log(1e6), np.log(1e13)), method="bounded", options={"xatol": 1e-10})
        n, d = law.best_split(flops)
        assert n == pytest.approx(np.exp(found.x), rel=1e-4)
        assert 6 * n * d == pytest.approx(flops)


def test_a_flat_law_has_no_best_split_and_a_finite_least():
    flat = Law(0.2, (0.4, 0.4), (1e-4, 1.3e-4))
    assert not flat.has_best(np.array([1e3, 1e6]), 1.0)
    assert 0.2 < flat.least(1e6, 1.0)[0] < 1.1
    steep = Law(1.8, (480.0, 2085.0), (0.35, 0.37))
    assert steep.has_best(1e20)
    assert not dataclasses.replace(steep, exponents=(0.35, -0.1)).has_best(1e20)


def test_a_symmetric_law_gives_its_exponent_at_the_stated_rate():
    """Equal exponents: the best size grows as the root of the budget."""
    law, hit, exponents = Law(1.7, (400.0, 400.0), (0.34, 0.34)), [], []
    for seed in range(60):
        found = isoflop.frontier(*_runs(law, noise=0.003, seed=seed), seed=seed, replicates=150)
        low, high = found.exponent_interval
        hit.append(low <= 0.5 <= high)
        exponents.append(found.exponent)
        assert [p.points for p in found.profiles] == [9] * 5
    assert np.mean(exponents) == pytest.approx(0.5, abs=0.01)
    assert np.mean(hit) >= 0.85
    exact = isoflop.frontier(*_runs(law))
    assert exact.exponent == pytest.approx(0.5, abs=1e-6)
    assert exact.best_size(1e20) == pytest.approx(law.best_split(1e20)[0], rel=1e-3)


def test_best_sizes_have_intervals_and_parabolas_pass_the_points():
    law = Law(1.7, (400.0, 400.0), (0.34, 0.34))
    hit = []
    for seed in range(30):
        found = isoflop.frontier(*_runs(law, noise=0.003, seed=seed), seed=seed, replicates=150)
        for p, (low, high) in zip(found.profiles, found.best_intervals, strict=True):
            hit.append(low <= law.best_split(p.flops)[0] <= high)
            assert low < p.best_size < high and p.best_loss <= p.at(p.size_M).min()
            np.testing.assert_allclose(p.at(p.size_M), p.loss_M, rtol=0.02)
    assert np.mean(hit) >= 0.85
    few = isoflop.profiles(np.full(3, 1e18), np.array([1e6, 2e6, 4e6]), np.array([3.0, 2.0, 3.0]))
    assert few[0].best_size is None and few[0].best_loss is None
    with pytest.raises(UserError, match="has 3 sizes: a parabola needs 4"):
        few[0].at(1e6)


def test_four_sizes_tell_their_noise_badly_and_intervals_are_as_wide():
    law, hit = Law(1.7, (400.0, 400.0), (0.34, 0.34)), []
    for seed in range(100):
        rng, rows = np.random.default_rng(seed), []
        for flops in (1e18, 1e20):
            best, _ = law.best_split(flops)
            for n in best * np.geomspace(1 / 4, 4, 4):
                loss = law(np.array([[n, flops / 6 / n]]))[0] * np.exp(rng.normal(0, 0.003))
                rows.append((flops, n, loss))
        found = isoflop.frontier(*np.array(rows).T, seed=seed, replicates=200)
        for p, (low, high) in zip(found.profiles, found.best_intervals, strict=True):
            hit.append(low <= law.best_split(p.flops)[0] <= high)
    assert np.mean(hit) >= 0.88


def test_unequal_exponents_bias_the_parabola_and_not_approach_3():
    """arXiv 2603.22339: sizes over a wide range move the parabola's least, without any noise."""
    law = Law(1.7, (60.0, 4000.0), (0.22, 0.42))
    flops, size, loss = _runs(law, width=30.0, shift=3.0)
    true, _ = law.best_split(flops.max())
    by_parabola = isoflop.frontier(flops, size, loss).best_size(flops.max())
    fitted = fits.fit(np.stack([size, flops / 6 / size], axis=1), loss)
    by_law, _ = fitted.law.best_split(flops.max())
    assert abs(by_parabola / true - 1) > 0.05
    assert by_law == pytest.approx(true, rel=1e-4)


def test_a_replicate_that_bends_down_is_lowest_at_the_lower_end():
    (profile,) = isoflop.profiles(np.full(5, 1e18), np.geomspace(1e6, 16e6, 5), np.array(
        [2.0, 1.98, 1.99, 2.02, 2.06]))
    x_M = np.log(profile.size_M) - profile.centre
    down = np.stack([-0.01 * x_M**2 + slope * x_M for slope in (0.02, -0.02)])
    first, last = isoflop._moved(profile, down)
    assert (np.exp(first), np.exp(last)) == pytest.approx((1e6, 16e6))
    inside = 0.01 * (x_M - x_M[1]) ** 2
    assert np.exp(isoflop._moved(profile, inside[None])) == pytest.approx(profile.size_M[1])


def test_budgets_within_the_tolerance_do_not_chain():
    flops = 1e18 * 1.03 ** np.arange(6)[::-1]
    found = isoflop.profiles(flops, np.ones(6), np.ones(6), tolerance=0.05)
    assert [p.points for p in found] == [2, 2, 2]
    assert found[0].flops == pytest.approx(1e18 * 1.03**0.5)


def test_a_budget_without_a_least_inside_is_left_out():
    law = Law(1.7, (400.0, 400.0), (0.34, 0.34))
    flops, size, loss = _runs(law)
    edge = size > law.best_split(flops.min())[0] * 1.5  # Cuts the smallest budget's least away.
    kept = edge | (flops > 2 * flops.min())
    found = isoflop.frontier(flops[kept], size[kept], loss[kept])
    assert found.profiles[0].best_size is None
    assert all(p.best_size is not None for p in found.profiles[1:])
    with pytest.raises(UserError, match="1 of 1 training budgets.*need 2"):
        one = flops < 2 * flops.min()
        isoflop.frontier(flops[one], size[one], loss[one])
