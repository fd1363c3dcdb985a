"""The table of conditions: what each task is given of an image, a function of image and key.

A row draws its parameters first, into a small frozen dataclass, and then applies them; both draw
from streams of the example's own key, so that the same image and key give the same condition in
any process, order and batch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ldm_scaling.data.conditions import kernels, masks, pixels, real_esrgan
from ldm_scaling.data.loading import draws
from ldm_scaling.errors import UserError

SMALLEST = 32  # pixels of a side: below it Real-ESRGAN's smallest scale leaves four
_SIDE = 256  # pixels of the side that blurs are given for

Size = tuple[int, int]
Generator = np.random.Generator


class Given(NamedTuple):
    """A condition.

    Attributes:
      image: uint8 (H / scale, W / scale, 3).
      mask: uint8 (H, W, 1), 1 where the image is not seen; None where the task has none.
    """

    image: np.ndarray
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Condition:
    """A row of the table.

    Attributes:
      name: as it is asked for.
      draw: parameters, a frozen dataclass (or None), from a generator and the image's size.
      apply: the condition, from parameters, an image uint8 (H, W, 3) and a generator.
      scale: the condition's sides are so many times smaller than the image's. It is given as small
        as it is: whoever encodes it enlarges it first (bicubic, on the device).
      masked: whether there is a mask.
    """

    name: str
    draw: Callable[[Generator, Size], Any]
    apply: Callable[[Any, np.ndarray, Generator], Given]
    scale: int = 1
    masked: bool = False

    @property
    def channels(self) -> int:
        """Of the condition: colours, and the mask."""
        return 3 + self.masked

    def check(self, size: Size) -> None:
        """Raises `UserError` for images of a (height, width) that it cannot be made of."""
        if min(size) < SMALLEST or any(side % self.scale for side in size):
            raise UserError(
                f"the condition {self.name} of images of {size[0]}x{size[1]} pixels: sides must be "
                f"multiples of {self.scale}, {SMALLEST} at least"
            )

    def parameters(self, key: int, size: Size) -> Any:
        """What is drawn for the example of a 64-bit key; see `draws.keys`."""
        return self.draw(draws.generator(key, f"{self.name} parameters"), size)

    def __call__(self, image_HWC: np.ndarray, key: int) -> Given:
        """The condition of an image, uint8 (H, W, 3), by the example's key.

        Raises:
          UserError: images that are too small or no multiple of `scale`.
          MissingPackageError: OpenCV is not installed.
        """
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise ValueError(f"an image {image_HWC.dtype}{image_HWC.shape}, not uint8 (H, W, 3)")
        size = image_HWC.shape[:2]
        self.check(size)
        rng = draws.generator(key, f"{self.name} pixels")
        return self.apply(self.parameters(key, size), image_HWC, rng)


@dataclasses.dataclass(frozen=True)
class Blur:
    """Out of focus, or shaken.

    Attributes:
      kind: "gaussian" or "motion".
      extent: sigma, or length of the line; pixels.
      angle: of the motion, radians from the x axis.
    """

    kind: str
    extent: float
    angle: float = 0.0

    def weights(self) -> np.ndarray:
        """float64, square, odd."""
        if self.kind == "motion":
            return kernels.motion(self.extent, self.angle)
        return kernels.gaussian(2 * math.ceil(4 * self.extent) + 1, self.extent, self.extent)


@dataclasses.dataclass(frozen=True)
class Jpeg:
    """Compression at a quality of libjpeg's."""

    quality: int


def draw_blur(rng: Generator, size: Size) -> Blur:
    """Gaussian, sigma 1 to 4, or motion, 5 to 25 pixels long, of 256; each as often."""
    unit = min(size) / _SIDE
    if rng.random() < 0.5:
        return Blur("gaussian", unit * rng.uniform(1.0, 4.0))
    return Blur("motion", unit * rng.uniform(5.0, 25.0), rng.uniform(0.0, math.pi))


def draw_jpeg(rng: Generator, size: Size) -> Jpeg:
    """Quality 5 to 30, as Palette is trained with (Saharia et al. 2022, arXiv 2111.05826)."""
    del size
    return Jpeg(int(rng.integers(5, 31)))


def _degraded(drawn: real_esrgan.Degradation, image_HWC: np.ndarray, rng: Generator) -> Given:
    return Given(real_esrgan.apply(drawn, image_HWC, rng))


def _holed(drawn: masks.Hole, image_HWC: np.ndarray, rng: Generator) -> Given:
    del rng
    mask_HWC = drawn.mask(image_HWC.shape[:2])
    return Given(masks.hidden(image_HWC, mask_HWC), mask_HWC)


def _grey(drawn: None, image_HWC: np.ndarray, rng: Generator) -> Given:
    del drawn, rng
    grey_HWC = pixels.to_uint8(pixels.luma(pixels.to_float(image_HWC)))
    return Given(np.repeat(grey_HWC, 3, axis=2))


def _blurred(drawn: Blur, image_HWC: np.ndarray, rng: Generator) -> Given:
    del rng
    return Given(pixels.to_uint8(pixels.blur(pixels.to_float(image_HWC), drawn.weights())))


def _compressed(drawn: Jpeg, image_HWC: np.ndarray, rng: Generator) -> Given:
    del rng
    return Given(pixels.to_uint8(pixels.jpeg(pixels.to_float(image_HWC), drawn.quality)))


def _nothing(rng: Generator, size: Size) -> None:
    del rng, size


CONDITIONS = {
    row.name: row
    for row in (
        Condition("super_resolution", real_esrgan.draw, _degraded, scale=real_esrgan.FACTOR),
        Condition("inpainting", masks.draw, _holed, masked=True),
        Condition("outpainting", masks.draw_border, _holed, masked=True),
        Condition("colourisation", _nothing, _grey),
        Condition("deblurring", draw_blur, _blurred),
        Condition("jpeg_restoration", draw_jpeg, _compressed),
    )
}


def named(name: str) -> Condition:
    """A row of the table. Raises `UserError` naming the nearest for an unknown one."""
    if name in CONDITIONS:
        return CONDITIONS[name]
    near = difflib.get_close_matches(name, CONDITIONS, n=1)
    hint = f": did you mean {near[0]!r}?" if near else f": use one of {', '.join(CONDITIONS)}"
    raise UserError(f"there is no condition {name!r}{hint}")
