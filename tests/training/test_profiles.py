"""Profiles of averages, against EDM2's published numbers, quadrature and brute force."""

import numpy as np
import pytest
import scipy

from ldm_scaling.training import profiles

TRACKED = (0.05, 0.1)


@pytest.mark.parametrize("length, gamma", [(0.05, 16.97), (0.10, 6.94)])  # EDM2, section 3.1
def test_published_exponents(length, gamma):
    assert profiles.gamma_of(length) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("length", [0.005, 0.03, 0.15, 0.285])
def test_a_length_is_the_relative_deviation_of_its_profile(length):
    gamma = profiles.gamma_of(length)
    moments = [scipy.integrate.quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), 0, 1)[0]
               for k in range(3)]
    assert moments[0] == pytest.approx(1)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("a, b", [((3, 6.94), (10, 16.97)), ((10, 2.0), (4, 6.94)),
                                  ((5, 1.0), (5, 6.94))])
def test_inner_products_are_integrals(a, b):
    def product(tau):
        return np.prod([(g + 1) * tau**g / t ** (g + 1) for t, g in (a, b)])

    wanted, _ = scipy.integrate.quad(product, 0, min(a[0], b[0]))
    assert profiles.inner(*a, *b) == pytest.approx(wanted, rel=1e-6)


def _mix(length, count, tracked=TRACKED):
    steps = np.repeat(np.arange(1, count + 1), len(tracked)) / count
    gammas = np.tile([profiles.gamma_of(n) for n in tracked], count)
    return profiles.solve(steps, gammas, 1.0, profiles.gamma_of(length))


def test_a_tracked_average_is_itself():
    mix = _mix(0.1, 8)
    np.testing.assert_allclose(mix.weight_I, [*[0] * 15, 1], atol=1e-4)
    assert mix.residual < 1e-4


def test_two_averages_and_few_snapshots_give_most_lengths():
    """As EDM2 finds (section 3.2): lengths about the tracked ones need few snapshots, and twice as
    many snapshots are several times as near."""
    for length in (0.04, 0.07, 0.12, 0.15, 0.2):
        few, many = _mix(length, 16).residual, _mix(length, 32).residual
        assert many < few / 2.5 and few < 0.025, length
    assert _mix(0.12, 16, (0.1,)).residual > 3 * _mix(0.12, 16).residual
    assert _mix(0.01, 16).residual > 0.3


@pytest.mark.parametrize("count, tracked", [
    (16, (0.1, 0.1001)), (16, (0.03, 0.05, 0.1, 0.15, 0.2)), (100, TRACKED),
    (65, (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.14, 0.2)),
])
def test_rounding_is_in_what_is_told(count, tracked):
    """Parameters that move by 2% of their size as powers of time, of which averages are known:
    float32 ones are summed to others, and these are off by no more than the residual says."""
    rng = np.random.default_rng(0)
    first_N, power_N = rng.uniform(0.5, 2, 500), rng.uniform(1, 8, 500)

    def average(step, length):
        gamma = profiles.gamma_of(length)
        return first_N * (1 + 0.02 * step**power_N * (gamma + 1) / (gamma + 1 + power_N))

    kept = [average(step, n).astype(np.float32)
            for step in np.arange(1, count + 1) / count for n in tracked]
    made = 0
    for length in (0.01, 0.02, 0.03, 0.045, 0.14, 0.2, 0.25):
        mix = _mix(length, count, tracked)
        if mix.residual > 0.1:
            continue
        wanted, made = average(1.0, length), made + 1
        moved = np.sqrt(np.mean((1.02 * first_N - wanted) ** 2))
        off = np.sqrt(np.mean((mix.weight_I @ np.array(kept, np.float64) - wanted) ** 2))
        assert off < mix.residual * moved, length
    assert made > 1


@pytest.mark.parametrize("length", [0.03, 0.07, 0.2])
def test_no_other_weights_that_sum_to_one_are_nearer(length):
    steps, gammas = np.repeat(np.arange(1, 9) / 8, 2), np.tile(
        [profiles.gamma_of(n) for n in TRACKED], 8)
    mix = profiles.solve(steps, gammas, 1.0, profiles.gamma_of(length))
    assert mix.weight_I.sum() == pytest.approx(1, abs=1e-12)
    tau = (np.arange(20_000) + 0.5) / 20_000

    def profile(step, gamma):
        return np.where(tau <= step, (gamma + 1) * tau**gamma / step ** (gamma + 1), 0.0)

    parts = np.stack([profile(*pair) for pair in zip(steps, gammas, strict=True)])
    wanted = profile(1.0, profiles.gamma_of(length))

    def off(weight_I):
        return np.sqrt(np.mean((weight_I @ parts - wanted) ** 2) / np.mean(wanted**2))

    assert off(mix.weight_I) == pytest.approx(mix.residual, rel=0.01)
    rng = np.random.default_rng(0)
    for _ in range(20):
        away = rng.normal(size=16)
        assert off(mix.weight_I + 1e-2 * (away - away.mean())) > mix.residual


@pytest.mark.parametrize("ramp", [False, True])
def test_the_length_of_an_exponential_average(ramp):
    """Of a long run that of a decay alone, 1 / (1 - decay) steps; with the ramp of a short one."""
    decay, steps = 0.999, 100_000
    if not ramp:
        found = profiles.exponential(decay, ramp, steps)
        assert found * steps == pytest.approx(np.sqrt(decay) / (1 - decay), rel=1e-3)
        return
    # (1 + t) / (10 + t) is 1 - 9 / t: a power function of exponent 8.
    found = profiles.gamma_of(profiles.exponential(decay, ramp, 2_000))
    assert found == pytest.approx(8, rel=0.01)
    assert profiles.exponential(0.0, False, 100) == 0.0
