"""Holes in images: strokes and boxes to paint in, borders to paint out.

Sizes are those that LaMa has for crops of 256 pixels, in proportion for others.

Source: Suvorov et al. 2022, "Resolution-robust large mask inpainting with Fourier convolutions",
section 2.3, with the numbers of its code's `abl-04-256-mh-dist-web.yaml` (big-lama's) as its
generators take them; borders are the code's `OutpaintingMaskGenerator`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from ldm_scaling.data.conditions import pixels
from ldm_scaling.errors import UserError

GREY = 128  # of what is not seen: 0 where images are in [-1, 1], as in Stable Diffusion's
STROKES = 0.5  # how often a hole is of strokes; else of boxes
_SIDE = 256


class Hole(Protocol):
    """What was drawn: a frozen dataclass of pixels."""

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """uint8 (height, width, 1), 1 where nothing is seen."""


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Lines of a broad brush.

    Attributes:
      segments: of each (x, y, x, y, width).
    """

    segments: tuple[tuple[int, int, int, int, int], ...]

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """As `Hole`."""
        mask_HW = np.zeros(size, np.uint8)
        for x0, y0, x1, y1, width in self.segments:
            pixels.opencv().line(mask_HW, (x0, y0), (x1, y1), 1, width)
        return mask_HW[..., None]


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Rectangles.

    Attributes:
      boxes: of each (top, left, height, width).
    """

    boxes: tuple[tuple[int, int, int, int], ...]

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """As `Hole`."""
        mask_HWC = np.zeros((*size, 1), np.uint8)
        for top, left, height, width in self.boxes:
            mask_HWC[top : top + height, left : left + width] = 1
        return mask_HWC


@dataclasses.dataclass(frozen=True)
class Border:
    """Stripes along an image's sides.

    Attributes:
      top, bottom, left, right: how broad; 0 for none.
    """

    top: int
    bottom: int
    left: int
    right: int

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """As `Hole`."""
        mask_HWC = np.ones((*size, 1), np.uint8)
        mask_HWC[self.top : size[0] - self.bottom, self.left : size[1] - self.right] = 0
        return mask_HWC


def draw(rng: np.random.Generator, size: tuple[int, int]) -> Hole:
    """A hole to be painted in: strokes or boxes, as often one as the other."""
    return (draw_strokes if rng.random() < STROKES else draw_boxes)(rng, size)


def draw_strokes(rng: np.random.Generator, size: tuple[int, int]) -> Strokes:
    """1 to 6 lines of 1 to 5 segments, each 10 to 209 long and 5 to 104 broad (of 256)."""
    height, width = size
    unit = min(size) / _SIDE
    segments = []
    for line in range(rng.integers(1, 7)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        for _ in range(rng.integers(1, 6)):
            # Four directions a radian apart, mirrored in every other line: as published.
            angle = (0.01 + rng.integers(4)) * (-1 if line % 2 == 0 else 1)
            length, broad = unit * rng.integers(10, 210), unit * rng.integers(5, 105)
            to_x = int(np.clip(x + length * math.sin(angle), 0, width))
            to_y = int(np.clip(y + length * math.cos(angle), 0, height))
            segments.append((x, y, to_x, to_y, max(1, round(broad))))
            x, y = to_x, to_y
    return Strokes(tuple(segments))


def draw_boxes(rng: np.random.Generator, size: tuple[int, int]) -> Boxes:
    """1 to 4 boxes with sides of 30 to 150, 10 away from the image's (of 256)."""
    unit = min(size) / _SIDE
    margin = round(10 * unit)

    def box() -> tuple[int, int, int, int]:
        height, width = (max(1, round(unit * rng.integers(30, 151))) for _ in range(2))
        top = int(rng.integers(margin, size[0] - margin - height + 1))
        left = int(rng.integers(margin, size[1] - margin - width + 1))
        return top, left, height, width

    return Boxes(tuple(box() for _ in range(rng.integers(1, 5))))


def draw_border(rng: np.random.Generator, size: tuple[int, int]) -> Border:
    """Stripes of 4% to 25% of the image; each side has one as often as not, and one at least."""
    lengths = (size[0], size[0], size[1], size[1])
    stripes = [max(1, round(length * rng.uniform(0.04, 0.25))) for length in lengths]
    sides = rng.random(4) < 0.5
    if not sides.any():
        sides[rng.integers(4)] = True
    return Border(*(stripe if side else 0 for stripe, side in zip(stripes, sides)))


def hidden(image_HWC: np.ndarray, mask_HWC: np.ndarray) -> np.ndarray:
    """The image, uint8, `GREY` where the mask is 1.

    Raises:
      UserError: a mask of another size, or that is not of 0 and 1.
    """
    if mask_HWC.shape != (*image_HWC.shape[:2], 1):
        raise UserError(
            f"a mask of shape {mask_HWC.shape} for an image of {image_HWC.shape}: "
            f"it should be {(*image_HWC.shape[:2], 1)}"
        )
    if not np.isin(mask_HWC, (0, 1)).all():
        raise UserError(
            f"a mask with values {mask_HWC.min()} to {mask_HWC.max()}: use 1 in the hole, else 0"
        )
    return np.where(mask_HWC, np.uint8(GREY), image_HWC)
