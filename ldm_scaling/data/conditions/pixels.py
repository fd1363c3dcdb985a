"""Operations on one image: blur, sharpening, resizing, noise, JPEG.

Images are float32 (H, W, C) in [0, 1], colours in the order red, green, blue. OpenCV does the work;
it is imported when first used. Borders are reflected without their last row, in all filters.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from ldm_scaling.errors import MissingPackageError

MODES = ("area", "bilinear", "bicubic")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R BT.601, as JPEG's


@functools.cache
def opencv() -> ModuleType:
    """The module cv2, on one thread: a loader's threads each take an example of their own.

    Raises:
      MissingPackageError: it is not installed.
    """
    try:
        import cv2
    except ImportError as e:
        raise MissingPackageError(
            "opencv-python-headless", "conditions of images", extra="downstream"
        ) from e
    cv2.setNumThreads(1)
    return cv2


def to_float(image_HWC: np.ndarray) -> np.ndarray:
    """0..255 to [0, 1]."""
    return image_HWC.astype(np.float32) / 255


def to_uint8(image_HWC: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255, rounded; what lies outside is clipped."""
    return np.rint(np.clip(image_HWC, 0, 1) * 255).astype(np.uint8)


def luma(image_HWC: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H, W, 1): how bright it is."""
    return (image_HWC @ _LUMA)[..., None]


def blur(image_HWC: np.ndarray, weights_KK: np.ndarray) -> np.ndarray:
    """Correlation with a kernel; not clipped."""
    cv2 = opencv()
    return cv2.filter2D(
        image_HWC, -1, weights_KK.astype(np.float32), borderType=cv2.BORDER_REFLECT_101
    )


def sharpen(
    image_HWC: np.ndarray, amount: float = 0.5, threshold: float = 10 / 255, side: int = 51
) -> np.ndarray:
    """Unsharp masking, where the image differs from its blur by more than `threshold`.

    Source: Real-ESRGAN section 3.4, `basicsr.utils.usm_sharp`: edges are sharpened before they are
    degraded, through a mask that is blurred itself.

    Args:
      image_HWC: the image.
      amount: of the difference from its blur that is added.
      threshold: below which nothing is, of 1.
      side: of the Gaussian, pixels; its sigma is the one that OpenCV takes for it, 8 for 51.
    """
    cv2 = opencv()

    def blurred(x):
        return cv2.GaussianBlur(x, (side, side), 0, borderType=cv2.BORDER_REFLECT_101)

    residual = image_HWC - blurred(image_HWC)
    mask = blurred((np.abs(residual) > threshold).astype(np.float32))
    sharp = np.clip(image_HWC + amount * residual, 0, 1)
    return mask * sharp + (1 - mask) * image_HWC


def resize(image_HWC: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """The image at (height, width) `size`, as `torch.nn.functional.interpolate` has it: "bilinear"
    and "bicubic" look at the nearest 2x2 and 4x4 pixels however small the image gets, and alias;
    "area" is the mean of all pixels that a new one touches."""
    if mode == "area":
        return _averaged(_averaged(image_HWC, size[0], axis=0), size[1], axis=1)
    cv2 = opencv()
    kind = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[mode]
    return cv2.resize(image_HWC, size[::-1], interpolation=kind)


def gaussian_noise(
    image_HWC: np.ndarray, sigma: float, grey: bool, rng: np.random.Generator
) -> np.ndarray:
    """The image with Gaussian noise, clipped.

    Args:
      image_HWC: the image.
      sigma: standard deviation, of 255.
      grey: the same in all colours.
      rng: of the example.
    """
    height, width, channels = image_HWC.shape
    shape = (height, width, 1 if grey else channels)
    noise = rng.standard_normal(shape, np.float32) * np.float32(sigma / 255)
    return np.clip(image_HWC + noise, 0, 1)


def poisson_noise(
    image_HWC: np.ndarray, scale: float, grey: bool, rng: np.random.Generator
) -> np.ndarray:
    """The image with photons' noise, `scale` times as strong, clipped.

    An image of n different levels is counted with a peak of n photons, rounded up to a power of 2
    (as `skimage.util.random_noise` does).

    Args:
      image_HWC: the image.
      scale: of the noise.
      grey: the same in all colours, of the image's luma.
      rng: of the example.
    """
    levels_HWC = to_uint8(luma(image_HWC) if grey else image_HWC)
    count = np.count_nonzero(np.bincount(levels_HWC.ravel()))
    peak = 2.0 ** np.ceil(np.log2(count))
    mean = to_float(levels_HWC)
    noise = (rng.poisson(mean * peak) / peak - mean) * scale
    return np.clip(image_HWC + noise.astype(np.float32), 0, 1)


def jpeg(image_HWC: np.ndarray, quality: int) -> np.ndarray:
    """The image out of a JPEG file, with colours at half the resolution (4:2:0).

    Args:
      image_HWC: the image; what lies outside [0, 1] is clipped.
      quality: 1 to 100, of libjpeg.
    """
    cv2 = opencv()
    options = [
        cv2.IMWRITE_JPEG_QUALITY, int(quality),
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]  # fmt: skip
    bgr = np.ascontiguousarray(to_uint8(image_HWC)[..., ::-1])
    _, data = cv2.imencode(".jpg", bgr, options)
    return to_float(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def _averaged(image_HWC: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Means of all pixels that each of `count` intervals touches."""
    n = image_HWC.shape[axis]
    i = np.arange(count)
    start, stop = i * n // count, -(-(i + 1) * n // count)
    sums = np.cumsum(image_HWC, axis=axis, dtype=np.float64)
    sums = np.insert(sums, 0, 0, axis=axis)
    totals = np.take(sums, stop, axis=axis) - np.take(sums, start, axis=axis)
    widths = (stop - start).reshape([-1 if a == axis else 1 for a in range(image_HWC.ndim)])
    return (totals / widths).astype(np.float32)
