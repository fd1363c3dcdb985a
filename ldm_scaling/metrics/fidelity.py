"""PSNR and SSIM of pictures and what they should be, one number for each pair.

As papers on super-resolution work them out: 8-bit values, no border left out; over the three
colours, or over the luma of ITU-R BT.601 (16 to 235, not rounded), which is what most tables show,
StableSR's among them (its authors, github.com/IceClear/StableSR/issues/45).
"""

from __future__ import annotations

import numpy as np
import scipy

from ldm_scaling.errors import UserError

PEAK = 255.0
# SSIM's window, side and sigma in pixels, and its constants, parts of the peak (Wang et al. 2004).
WINDOW, SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
# Weights of red, green and blue of 0 to 255 in the luma, and its foot.
_LUMA, _FOOT = np.array([65.481, 128.553, 24.966]) / PEAK, 16.0

MOST_PSNR = 100.0
"""dB, what two pictures that are the same count as: no mean takes in what is infinite."""


def psnr(a_NHWC: np.ndarray, b_NHWC: np.ndarray, luma: bool = False) -> np.ndarray:
    """Peak signal-to-noise ratio (N,) in dB, 10 log10(255^2 / mean squared error).

    Infinite where two pictures are the same.

    Args:
      a_NHWC: uint8.
      b_NHWC: uint8, of the same shape.
      luma: of the luma alone.
    """
    _check(a_NHWC, b_NHWC)
    error_N = np.array([
        np.mean(np.square(_values(a, luma) - _values(b, luma))) for a, b in zip(a_NHWC, b_NHWC)
    ])
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(PEAK**2 / error_N)


def ssim(a_NHWC: np.ndarray, b_NHWC: np.ndarray, luma: bool = False) -> np.ndarray:
    """Structural similarity (N,), at most 1 (Wang et al. 2004).

    The mean over all places where a Gaussian window of 11 pixels and sigma 1.5 fits in, and over
    the colours; variances are those of a population.

    Args:
      a_NHWC: uint8.
      b_NHWC: uint8, of the same shape.
      luma: of the luma alone.
    Raises:
      UserError: for pictures smaller than the window.
    """
    _check(a_NHWC, b_NHWC)
    if min(a_NHWC.shape[1:3]) < WINDOW:
        height, width = a_NHWC.shape[1:3]
        raise UserError(
            f"SSIM of pictures of {height}x{width} pixels: its window is of {WINDOW}, give larger "
            "ones"
        )
    return np.array([_ssim(_values(a, luma), _values(b, luma)) for a, b in zip(a_NHWC, b_NHWC)])


def _check(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> None:
    """A mistake of the caller's: whoever reads files says which of them do not fit."""
    for x in (a_NHWC, b_NHWC):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape != a_NHWC.shape:
            raise ValueError(
                f"pictures {a_NHWC.dtype}{a_NHWC.shape} and {b_NHWC.dtype}{b_NHWC.shape}: give two "
                "arrays uint8 (N, H, W, 3) of one shape"
            )


def _values(x_HWC: np.ndarray, luma: bool) -> np.ndarray:
    """float64 (H, W, C), C 1 for the luma."""
    return (x_HWC @ _LUMA + _FOOT)[..., None] if luma else x_HWC.astype(np.float64)


def _window() -> np.ndarray:
    """float64 (11,), of sum 1; the square window is its product with itself."""
    distance = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (distance / SIGMA) ** 2)
    return weights / weights.sum()


def _local_mean(x_HWC: np.ndarray) -> np.ndarray:
    """Means under the window, where it fits in."""
    weights, reach = _window(), WINDOW // 2
    for axis in (0, 1):
        x_HWC = scipy.ndimage.correlate1d(x_HWC, weights, axis=axis)
    return x_HWC[reach:-reach, reach:-reach]


def _ssim(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    c1, c2 = (_K1 * PEAK) ** 2, (_K2 * PEAK) ** 2
    mean_a, mean_b = _local_mean(a_HWC), _local_mean(b_HWC)
    # Of both together, which is all that the formula asks for.
    variances = _local_mean(a_HWC**2 + b_HWC**2) - mean_a**2 - mean_b**2
    covariance = _local_mean(a_HWC * b_HWC) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variances + c2)
    return float(similarity.mean())
