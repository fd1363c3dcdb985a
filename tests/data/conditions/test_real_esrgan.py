"""Real-ESRGAN's degradation: what is drawn, and what is done with it against basicsr's functions.

Tests of distributions draw with a fixed seed and ask for a p-value above 1e-4: of ten thousand
seeds of right code one would fail each of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from ldm_scaling.data.conditions import kernels, pixels, real_esrgan
from tests.data.conditions import made

ALARM = 1e-4
# train_realesrgan_x4plus.yml: of a round up, down, scales, sigma of noise, scale of noise.
PUBLISHED = {
    "first": (1.0, 0.2, 0.7, (0.15, 1.5), (1, 30), (0.05, 3.0)),
    "second": (0.8, 0.3, 0.4, (0.3, 1.2), (1, 25), (0.05, 2.5)),
}


@pytest.fixture(scope="module")
def drawn() -> list[real_esrgan.Degradation]:
    rng = np.random.default_rng(0)
    return [real_esrgan.draw(rng, (64, 64)) for _ in range(6_000)]


def even(values, low: float, high: float) -> None:
    values = np.asarray(values)
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > ALARM


def share(happened, expected: float) -> None:
    happened = np.asarray(happened)
    assert stats.binomtest(int(happened.sum()), len(happened), expected).pvalue > ALARM


@pytest.mark.parametrize("which", PUBLISHED)
def test_a_round_is_drawn_from_the_published_ranges_as_often_as_published(drawn, which):
    blur, up, down, scales, gaussian, poisson = PUBLISHED[which]
    rounds = [getattr(d, which) for d in drawn]
    if blur == 1:
        assert kernels.IDENTITY not in {r.kernel for r in rounds}
    else:
        share([r.kernel != kernels.IDENTITY for r in rounds], blur)
    scale = np.array([r.scale for r in rounds])
    share(scale > 1, up)
    share(scale < 1, down)
    even(scale[scale > 1], 1, scales[1])
    even(scale[scale < 1], scales[0], 1)
    modes, counts = np.unique([r.mode for r in rounds], return_counts=True)
    assert modes.tolist() == ["area", "bicubic", "bilinear"]
    assert stats.chisquare(counts).pvalue > ALARM
    share([r.noise == "gaussian" for r in rounds], 0.5)
    even([r.amount for r in rounds if r.noise == "gaussian"], *gaussian)
    even([r.amount for r in rounds if r.noise == "poisson"], *poisson)
    share([r.grey for r in rounds], 0.4)
    even([r.quality for r in rounds], 30, 95)


def test_the_two_orders_are_equally_often_and_rounds_are_independent(drawn):
    share([d.jpeg_last for d in drawn], 0.5)
    share([d.sinc != kernels.IDENTITY for d in drawn], 0.8)
    assert stats.chisquare(np.unique([d.last for d in drawn], return_counts=True)[1]).pvalue > ALARM
    columns = [
        [d.first.scale for d in drawn], [d.second.scale for d in drawn],
        [d.first.quality for d in drawn], [d.second.quality for d in drawn],
        [d.first.grey for d in drawn], [d.second.grey for d in drawn],
        [d.jpeg_last for d in drawn],
    ]  # fmt: skip
    off = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(off).max() < 5 / len(drawn) ** 0.5


def quiet(degradation: real_esrgan.Degradation) -> real_esrgan.Degradation:
    """The same without noise."""
    first, second = (
        dataclasses.replace(r, noise="gaussian", amount=0.0)
        for r in (degradation.first, degradation.second)
    )
    return dataclasses.replace(degradation, first=first, second=second)


def test_without_noise_it_is_what_basicsrs_functions_do(drawn):
    """In the order of `RealESRGANModel.feed_data`; but for JPEG, which the test takes from the
    package (it is compared by itself). Skipped without the `parity` extra, see [parity]."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    util = made.basicsr("utils/img_process_util.py")
    interpolate = torch.nn.functional.interpolate
    picture = made.photograph(96, 128)

    def to_torch(x_HWC):
        return torch.from_numpy(np.ascontiguousarray(x_HWC.transpose(2, 0, 1)[None]))

    def to_numpy(x_BCHW):
        return x_BCHW[0].numpy().transpose(1, 2, 0)

    def blur(x_BCHW, kernel):
        weights = torch.from_numpy(kernel.weights()[None].astype(np.float32))
        small = min(x_BCHW.shape[2:]) <= 10  # torch reflects no further than an image goes
        return to_torch(pixels.blur(to_numpy(x_BCHW), kernel.weights())) if small else (
            util.filter2D(x_BCHW, weights)
        )

    def jpeg(x_BCHW, quality):
        return to_torch(pixels.jpeg(to_numpy(torch.clamp(x_BCHW, 0, 1)), round(quality)))

    for degradation in map(quiet, drawn[:16]):
        first, second = degradation.first, degradation.second
        x = to_torch(util.usm_sharp(pixels.to_float(picture)))
        x = blur(x, first.kernel)
        x = interpolate(
            x, size=(int(96 * first.scale), int(128 * first.scale)), mode=first.mode
        )
        x = jpeg(torch.clamp(x, 0, 1), first.quality)
        x = blur(x, second.kernel)
        x = interpolate(
            x, size=(int(24 * second.scale), int(32 * second.scale)), mode=second.mode
        )
        x = torch.clamp(x, 0, 1)
        if degradation.jpeg_last:
            x = blur(interpolate(x, size=(24, 32), mode=degradation.last), degradation.sinc)
            x = jpeg(x, second.quality)
        else:
            x = jpeg(x, second.quality)
            x = blur(interpolate(x, size=(24, 32), mode=degradation.last), degradation.sinc)
        expected = np.rint(np.clip(to_numpy(x), 0, 1) * 255)
        found = real_esrgan.apply(degradation, picture, np.random.default_rng(0)).astype(float)
        assert found.shape == (24, 32, 3)
        # A value that is rounded the other way before JPEG may change a coefficient.
        assert np.abs(found - expected).mean() < 0.3


def test_an_even_image_stays_even_without_noise(drawn):
    even_image = np.full((64, 64, 3), 128, np.uint8)  # which JPEG has exactly, as zero
    for degradation in map(quiet, drawn[:40]):
        found = real_esrgan.apply(degradation, even_image, np.random.default_rng(0))
        assert np.abs(found.astype(int) - 128).max() <= 1


def test_noise_is_of_the_generator_and_all_else_of_what_was_drawn(drawn):
    picture = made.photograph(64, 64)
    degradation = drawn[0]
    runs = [real_esrgan.apply(degradation, picture, np.random.default_rng(s)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    runs = [
        real_esrgan.apply(quiet(degradation), picture, np.random.default_rng(s)) for s in (0, 1)
    ]
    np.testing.assert_array_equal(*runs)
