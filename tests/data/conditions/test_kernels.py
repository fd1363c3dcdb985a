"""Kernels: closed forms, basicsr's formulas, and what is drawn against the published numbers.

Tests of distributions draw with a fixed seed and ask for a p-value above 1e-4: of ten thousand
seeds of right code one would fail each of them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ldm_scaling.data.conditions import kernels
from tests.data.conditions import made

ALARM = 1e-4
SHAPES = {"gaussian": kernels.gaussian, "plateau": kernels.plateau}


@pytest.fixture(scope="module")
def drawn() -> list[kernels.Kernel]:
    rng = np.random.default_rng(0)
    return [kernels.draw(rng, (0.2, 3.0)) for _ in range(20_000)]


def moments(weights_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (x, y) and covariance about the middle pixel."""
    half = len(weights_KK) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    points = np.stack([x.ravel(), y.ravel()])
    mean = points @ weights_KK.ravel()
    return mean, (points * weights_KK.ravel()) @ points.T - np.outer(mean, mean)


def response(weights_KK: np.ndarray, wx: float, wy: float) -> complex:
    """The Fourier transform at a frequency, radians per pixel."""
    half = len(weights_KK) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return np.sum(weights_KK * np.exp(-1j * (wx * x + wy * y)))


def test_all_weights_sum_to_one_and_are_the_same_turned_half_round(drawn):
    for kernel in (*drawn[:300], kernels.IDENTITY):
        weights_KK = kernel.weights()
        assert weights_KK.shape == (21, 21)
        assert weights_KK.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(weights_KK, weights_KK[::-1, ::-1], atol=1e-12)
        outside = (21 - kernel.size) // 2
        assert not weights_KK[:outside].any() and not weights_KK[:, :outside].any()


@pytest.mark.parametrize("rotation", [0.0, 0.6, -2.2, math.pi / 2])
def test_a_gaussian_has_the_covariance_of_its_sigmas_and_its_rotation(rotation):
    mean, covariance = moments(kernels.gaussian(61, 3.0, 1.2, rotation))
    along = np.array([math.cos(rotation), math.sin(rotation)])
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    assert along @ covariance @ along == pytest.approx(9, rel=1e-3)
    across = np.array([-along[1], along[0]])
    assert across @ covariance @ across == pytest.approx(1.44, rel=1e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_one_sigma_from_the_middle_every_shape_has_its_value(beta):
    for name, share in (("gaussian", math.exp(-0.5)), ("plateau", 0.5)):
        weights_KK = SHAPES[name](21, 4.0, 2.0, 0.0, beta)
        assert weights_KK[10, 14] / weights_KK[10, 10] == pytest.approx(share)
        assert weights_KK[12, 10] / weights_KK[10, 10] == pytest.approx(share)


@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, 2.0])
def test_a_broad_sinc_lets_low_frequencies_through_and_stops_high_ones(cutoff):
    weights_KK = kernels.sinc(301, cutoff)
    for angle in (0.0, 0.5, math.pi / 4):
        for share, expected in ((0.0, 1), (0.5, 1), (0.8, 1), (1.2, 0), (1.4, 0)):
            w = share * cutoff
            found = response(weights_KK, w * math.cos(angle), w * math.sin(angle))
            assert abs(found - expected) < 0.06, (share, angle)
        edge = response(weights_KK, cutoff * math.cos(angle), cutoff * math.sin(angle))
        assert abs(edge - 0.5) < 0.05


@pytest.mark.parametrize("length", [5.0, 13.7, 25.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.9])
def test_motion_is_a_line_of_its_length_and_angle(length, angle):
    weights_KK = kernels.motion(length, angle)
    mean, covariance = moments(weights_KK)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    np.testing.assert_allclose(mean, 0, atol=1e-9)
    # An even line has length^2 / 12; sharing points out by pixels adds up to 1/4.
    assert 0 <= along @ covariance @ along - length**2 / 12 < 0.25 + 0.03 * length
    assert across @ covariance @ across < 0.26
    assert weights_KK.sum() == pytest.approx(1)
    w = np.pi / length  # half way to the first zero of the line's transform, sinc(w length / 2)
    found = response(weights_KK, w * along[0], w * along[1])
    assert abs(found) == pytest.approx(np.sinc(0.5), abs=0.05)


def test_kinds_and_sizes_are_drawn_as_often_as_published(drawn):
    sinc = np.array([k.kind == "sinc" for k in drawn])
    assert stats.binomtest(int(sinc.sum()), len(drawn), 0.1).pvalue > ALARM
    published = {
        "gaussian_iso": 0.45, "gaussian_aniso": 0.25, "generalized_iso": 0.12,
        "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03,
    }  # fmt: skip
    kinds = [k.kind for k in drawn if k.kind != "sinc"]
    counts = [kinds.count(kind) for kind in published]
    assert sum(counts) == len(kinds)
    expected = np.array(list(published.values())) * len(kinds)
    assert stats.chisquare(counts, expected).pvalue > ALARM
    sizes, counts = np.unique([k.size for k in drawn], return_counts=True)
    assert sizes.tolist() == [7, 9, 11, 13, 15, 17, 19, 21]
    assert stats.chisquare(counts).pvalue > ALARM


def test_sigmas_rotations_and_cutoffs_are_even_over_the_published_ranges(drawn):
    def even(values, low, high):
        values = np.asarray(values)
        assert low <= values.min() and values.max() <= high
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > ALARM

    blurs = [k for k in drawn if k.kind != "sinc"]
    skewed = [k for k in blurs if k.kind.endswith("_aniso")]
    even([k.sigma_x for k in blurs], 0.2, 3.0)
    even([k.sigma_y for k in skewed], 0.2, 3.0)
    even([k.rotation for k in skewed], -math.pi, math.pi)
    assert all(k.sigma_x == k.sigma_y for k in blurs if k.kind.endswith("_iso"))
    assert abs(np.corrcoef([k.sigma_x for k in skewed], [k.sigma_y for k in skewed])[0, 1]) < 0.06
    sincs = [k for k in drawn if k.kind == "sinc"]
    even([k.cutoff for k in sincs if k.size < 13], math.pi / 3, math.pi)
    even([k.cutoff for k in sincs if k.size >= 13], math.pi / 5, math.pi)
    for size in kernels.SIZES:  # of 250 draws none would be in the lowest sixth once in 10^19
        lowest = min(k.cutoff for k in sincs if k.size == size)
        assert (lowest < math.pi / 3) == (size >= 13)
    rng = np.random.default_rng(1)
    even([k.sigma_x for k in (kernels.draw(rng, (0.2, 1.5)) for _ in range(3000))
          if k.kind != "sinc"], 0.2, 1.5)  # fmt: skip


def test_half_of_the_betas_are_below_one(drawn):
    for shape, low, high in (("generalized", 0.5, 4.0), ("plateau", 1.0, 2.0)):
        betas = np.array([k.beta for k in drawn if k.kind.startswith(shape)])
        above = betas > 1
        assert stats.binomtest(int(above.sum()), len(betas), 0.5).pvalue > ALARM
        law = stats.uniform(1, high - 1)
        assert stats.kstest(betas[above], law.cdf).pvalue > ALARM
        if low == 1:
            assert (betas[~above] == 1).all()
        else:
            law = stats.uniform(low, 1 - low)
            assert stats.kstest(betas[~above], law.cdf).pvalue > ALARM
    assert all(k.beta == 1 for k in drawn if k.kind.startswith("gaussian"))


def test_the_last_sinc_is_there_four_times_in_five():
    rng = np.random.default_rng(2)
    last = [kernels.draw_final(rng) for _ in range(5000)]
    sincs = [k for k in last if k != kernels.IDENTITY]
    assert {k.kind for k in sincs} == {"sinc"}
    assert stats.binomtest(len(sincs), len(last), 0.8).pvalue > ALARM
    law = stats.uniform(math.pi / 3, math.pi - math.pi / 3)
    assert stats.kstest([k.cutoff for k in sincs], law.cdf).pvalue > ALARM
    assert stats.chisquare(np.unique([k.size for k in sincs], return_counts=True)[1]).pvalue > ALARM


def test_kernels_are_basicsrs(drawn):
    """Every kind, at drawn parameters; skipped without the `parity` extra, see [parity]."""
    peer = made.basicsr("data/degradations.py")
    shapes = {
        "gaussian": peer.bivariate_Gaussian,
        "generalized": peer.bivariate_generalized_Gaussian,
        "plateau": peer.bivariate_plateau,
    }
    for kernel in drawn[:200]:
        shape, _, axes = kernel.kind.partition("_")
        if shape == "sinc":
            with np.errstate(invalid="ignore"):  # in the middle, which it sets afterwards
                expected = peer.circular_lowpass_kernel(kernel.cutoff, kernel.size)
        else:
            beta = () if shape == "gaussian" else (kernel.beta,)
            expected = shapes[shape](
                kernel.size, kernel.sigma_x, kernel.sigma_y, kernel.rotation, *beta,
                isotropic=axes == "iso",
            )
        expected = np.pad(expected, (21 - kernel.size) // 2)
        np.testing.assert_allclose(kernel.weights(), expected, atol=1e-9)
