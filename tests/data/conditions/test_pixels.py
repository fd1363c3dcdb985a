"""Operations on pixels: identities, and the peers that they stand for."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from ldm_scaling.data.conditions import kernels, pixels
from tests.data.conditions import made


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return pixels.to_float(made.photograph(96, 128))


def test_blurring_is_scipys_correlation_with_mirrored_borders(picture):
    rng = np.random.default_rng(0)
    weights_KK = rng.random((21, 21))  # of no symmetry
    weights_KK /= weights_KK.sum()
    expected = scipy.ndimage.correlate(
        picture.astype(np.float64), weights_KK[..., None], mode="mirror"
    )
    np.testing.assert_allclose(pixels.blur(picture, weights_KK), expected, atol=2e-6)


def test_the_identity_blurs_nothing(picture):
    np.testing.assert_allclose(
        pixels.blur(picture, kernels.IDENTITY.weights()), picture, atol=1e-6
    )


def test_sharpening_leaves_what_is_even_or_faint_and_steepens_edges():
    even = np.full((64, 64, 3), 0.4, np.float32)
    np.testing.assert_allclose(pixels.sharpen(even), even, atol=1e-6)
    faint = even.copy()
    faint[:, 32:] += 9 / 255  # 10 of 255 is the threshold
    np.testing.assert_allclose(pixels.sharpen(faint), faint, atol=1e-6)
    edge = even.copy()
    edge[:, 32:] = 0.6
    sharp = pixels.sharpen(edge)
    assert sharp[32, 31, 0] < 0.4 - 0.02 and sharp[32, 32, 0] > 0.6 + 0.02
    np.testing.assert_allclose(sharp.mean(), edge.mean(), atol=1e-4)  # as the edge is symmetric
    np.testing.assert_allclose(pixels.sharpen(edge, amount=0.0), edge, atol=1e-6)


def test_sharpening_is_basicsrs(picture):
    """Skipped without the `parity` extra, see [parity]."""
    peer = made.basicsr("utils/img_process_util.py")
    np.testing.assert_allclose(pixels.sharpen(picture), peer.usm_sharp(picture), atol=1e-6)


@pytest.mark.parametrize("mode", pixels.MODES)
@pytest.mark.parametrize("size", [(31, 40), (96, 50), (14, 19), (141, 190), (96, 128), (1, 2)])
def test_resizing_is_torchs_interpolation(picture, mode, size):
    torch = pytest.importorskip("torch")
    x_BCHW = torch.from_numpy(picture.transpose(2, 0, 1)[None])
    expected = torch.nn.functional.interpolate(x_BCHW, size=size, mode=mode)
    found = pixels.resize(picture, size, mode)
    np.testing.assert_allclose(found, expected[0].numpy().transpose(1, 2, 0), atol=2e-5)


def test_the_mean_is_kept_by_areas_of_whole_pixels(picture):
    small = pixels.resize(picture, (24, 32), "area")
    np.testing.assert_allclose(small.mean(axis=(0, 1)), picture.mean(axis=(0, 1)), atol=1e-5)


@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_its_deviation_and_no_mean(grey):
    """Each assertion is at five standard errors: one false alarm in a million."""
    image = np.full((256, 256, 3), 0.5, np.float32)
    noise = pixels.gaussian_noise(image, 20.0, grey, np.random.default_rng(0)) - image
    n = noise[..., 0].size if grey else noise.size
    sigma = 20 / 255
    assert abs(noise.mean()) < 5 * sigma / n**0.5
    assert noise.std() == pytest.approx(sigma, rel=5 / (2 * n) ** 0.5)
    across = np.corrcoef(noise.reshape(-1, 3).T)[0, 1]
    assert across == pytest.approx(1) if grey else abs(across) < 5 / 256


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_has_the_variance_of_photons_and_no_mean(grey):
    """Of an image of three levels, which are counted with a peak of four; five standard errors."""
    levels = np.array([51, 102, 153], np.uint8)
    rows = np.repeat(levels, 128)[:, None, None]
    image = pixels.to_float(np.broadcast_to(rows, (384, 512, 3)).copy())
    scale = 0.1  # so that nothing is clipped
    noise = pixels.poisson_noise(image, scale, grey, np.random.default_rng(0)) - image
    for i, level in enumerate(levels / 255):
        part = noise[128 * i : 128 * (i + 1)]
        n = part[..., 0].size if grey else part.size
        variance = level / 4 * scale**2
        assert abs(part.mean()) < 5 * (variance / n) ** 0.5
        # A Poisson count of mean m has kurtosis 3 + 1/m.
        spread = ((2 + 1 / (4 * level)) / n) ** 0.5
        assert part.var() == pytest.approx(variance, rel=5 * spread)
    across = np.corrcoef(noise.reshape(-1, 3).T)[0, 1]
    if grey:
        assert across == pytest.approx(1, abs=1e-4)
    else:
        assert abs(across) < 5 / noise[..., 0].size ** 0.5


@pytest.mark.parametrize("quality", [5, 30, 60, 95])
def test_jpeg_is_pillows(picture, quality):
    """Another build of libjpeg, told to halve the colours' resolution."""
    file = io.BytesIO()
    Image.fromarray(pixels.to_uint8(picture)).save(file, "JPEG", quality=quality, subsampling=2)
    expected = np.asarray(Image.open(file).convert("RGB"))
    found = pixels.to_uint8(pixels.jpeg(picture, quality))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_better_quality_is_nearer_to_the_image_and_clips_what_is_outside(picture):
    errors = [made.psnr(pixels.jpeg(picture, q), picture) for q in (5, 15, 30, 60, 95)]
    assert errors == sorted(errors) and errors[-1] > errors[0] + 5
    wild = picture * 3 - 1
    np.testing.assert_array_equal(pixels.jpeg(wild, 50), pixels.jpeg(np.clip(wild, 0, 1), 50))


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_spoils_as_much_as_basicsrs_approximation(picture, quality):
    """Which neither rounds tables nor interpolates colours, and turns tables over: errors are of
    the same size. Skipped without the `parity` extra, see [parity]."""
    torch = pytest.importorskip("torch")
    module = made.diff_jpeg()
    grey = np.repeat(pixels.luma(picture), 3, axis=2)
    x_BCHW = torch.from_numpy(grey.transpose(2, 0, 1)[None].copy())
    with torch.no_grad():
        expected = module.DiffJPEG(differentiable=False)(x_BCHW, quality)[0].numpy()
    theirs = made.psnr(expected.transpose(1, 2, 0), grey)
    assert made.psnr(pixels.jpeg(grey, quality), grey) == pytest.approx(theirs, abs=0.5)
