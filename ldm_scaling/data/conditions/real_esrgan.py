"""Real-ESRGAN's degradation: photographs as cameras and the web spoil them, four times smaller.

Sharpened, then blurred, resized, made noisy and compressed, twice, with a sinc filter and the last
resize before or after the second JPEG. All is drawn by itself for each image: the published code,
which draws scale, mode and kind of noise once for a batch, keeps a pool of 180 images to mix them.

Two things are not as in the published code. JPEG is libjpeg's own, at the quality rounded to a
whole number, where the code has an approximation that runs on GPUs (`DiffJPEG`: tables that are not
rounded, colours repeated instead of interpolated). And a resize maps corners onto corners, also
where the code rounds a side down after it has taken the scale as it was.

Source: Wang et al. 2021, "Real-ESRGAN", section 3; the numbers are train_realesrgan_x4plus.yml's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.data.conditions import kernels, pixels
from ldm_scaling.data.conditions.kernels import Kernel

FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Order:
    """What one of the two rounds draws from.

    Attributes:
      blur: how often there is one.
      sigmas: of its kernel, pixels.
      up, down: how often the image is made larger or smaller; else it keeps its size.
      scales: the smallest and the largest.
      gaussian: standard deviations of Gaussian noise, of 255.
      poisson: scales of Poisson noise.
      quality: of JPEG.
    """

    blur: float
    sigmas: tuple[float, float]
    up: float
    down: float
    scales: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]
    quality: tuple[float, float] = (30.0, 95.0)


FIRST = Order(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = Order(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))
GAUSSIAN = 0.5  # how often noise is Gaussian; else Poisson
GREY = 0.4  # and how often the same in all colours


@dataclasses.dataclass(frozen=True)
class Round:
    """What was drawn for one round.

    Attributes:
      kernel: of its blur.
      scale: of its resize; in the second round of the size that the result has.
      mode: of its resize, one of `pixels.MODES`.
      noise: "gaussian" or "poisson".
      amount: of noise: standard deviation of 255, or scale.
      grey: whether noise is the same in all colours.
      quality: of JPEG, not rounded.
    """

    kernel: Kernel
    scale: float
    mode: str
    noise: str
    amount: float
    grey: bool
    quality: float


@dataclasses.dataclass(frozen=True)
class Degradation:
    """What was drawn for one image.

    Attributes:
      first, second: the rounds.
      last: mode of the resize to the final size.
      sinc: kernel of the filter that follows it.
      jpeg_last: whether the second round's JPEG comes after these two, or before.
    """

    first: Round
    second: Round
    last: str
    sinc: Kernel
    jpeg_last: bool


def draw(rng: np.random.Generator, size: tuple[int, int]) -> Degradation:
    """What is done to an image; its size does not matter."""
    del size
    return Degradation(
        _draw_round(rng, FIRST),
        _draw_round(rng, SECOND),
        str(rng.choice(pixels.MODES)),
        kernels.draw_final(rng),
        bool(rng.random() < 0.5),
    )


def apply(degradation: Degradation, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The degraded image, `FACTOR` times smaller.

    Args:
      degradation: see `draw`.
      image_HWC: uint8, RGB; its sides are multiples of `FACTOR`.
      rng: of the noise.

    Returns:
      uint8 (H / FACTOR, W / FACTOR, 3).
    """
    first, second = degradation.first, degradation.second
    height, width = image_HWC.shape[:2]
    size = height // FACTOR, width // FACTOR

    x = pixels.sharpen(pixels.to_float(image_HWC))
    x = _spoiled(x, first, (height, width), rng)
    x = pixels.jpeg(x, round(first.quality))
    x = _spoiled(x, second, size, rng)
    if not degradation.jpeg_last:
        x = pixels.jpeg(x, round(second.quality))
    x = pixels.resize(x, size, degradation.last)
    x = pixels.blur(x, degradation.sinc.weights())
    if degradation.jpeg_last:
        x = pixels.jpeg(x, round(second.quality))
    return pixels.to_uint8(x)


def _spoiled(
    x: np.ndarray, drawn: Round, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Blurred, resized to `drawn.scale` of `size`, made noisy."""
    x = pixels.blur(x, drawn.kernel.weights())
    scaled = tuple(max(1, int(side * drawn.scale)) for side in size)
    if scaled != x.shape[:2]:
        x = pixels.resize(x, scaled, drawn.mode)
    noise = pixels.gaussian_noise if drawn.noise == "gaussian" else pixels.poisson_noise
    return noise(x, drawn.amount, drawn.grey, rng)


def _draw_round(rng: np.random.Generator, order: Order) -> Round:
    kernel = kernels.draw(rng, order.sigmas) if rng.random() < order.blur else kernels.IDENTITY
    way = rng.random()
    if way < order.up:
        scale = rng.uniform(1.0, order.scales[1])
    elif way < order.up + order.down:
        scale = rng.uniform(order.scales[0], 1.0)
    else:
        scale = 1.0
    mode = str(rng.choice(pixels.MODES))
    noise = "gaussian" if rng.random() < GAUSSIAN else "poisson"
    amount = rng.uniform(*(order.gaussian if noise == "gaussian" else order.poisson))
    return Round(
        kernel, scale, mode, noise, amount, bool(rng.random() < GREY), rng.uniform(*order.quality)
    )
