"""What bytes of an image are stored, so that every decoder shows it as it is meant to be seen."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from ldm_scaling.data import image_folder

_JPEG_QUALITY = 95
# MPO: what some cameras call a JPEG with a preview behind it
# An AVIF's file does not say outright whether it was kept without loss.
_LOSSY = ("JPEG", "MPO", "WEBP")


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """An image, decoded whole.

    Attributes:
      image_HWC: as `image_folder.to_rgb` gives it.
      plain: whether its file shows the same picture in any decoder: upright, still, opaque, RGB
        or grey of 8 bits, a JPEG, PNG or WebP.
      lossy: whether it is a JPEG or WebP that was stored with loss, and is opaque.
    """

    image_HWC: np.ndarray
    plain: bool
    lossy: bool


def decode(data: bytes) -> Decoded:
    """The image in a file's bytes (of an animation the first). Raises `BrokenImage`."""
    if not data:
        raise BrokenImage("its file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # whole: a file that is cut short fails here
            plain = _is_plain(image, data)
            exact = image.format == "WEBP" and b"VP8L" in data  # the chunk of one without loss
            lossy = image.format in _LOSSY and not (exact or image.has_transparency_data)
            image_HWC = image_folder.to_rgb(image)
    except Exception as e:  # Pillow's readers of damaged files raise errors of nearly every type
        known = "cannot identify" not in str(e)
        lines = (str(e) or type(e).__name__).splitlines()
        why = lines[0][:200] if known else "it is no image that Pillow knows"
        raise BrokenImage(why) from e
    if not image_HWC.size:
        raise BrokenImage("it has no pixels")
    return Decoded(image_HWC, plain, lossy)


def reduced(width: int, height: int, side: int | None) -> tuple[int, int]:
    """The size with the short side brought down to `side`; never up, and never below one pixel."""
    short = min(width, height)
    if side is None or short <= side:
        return width, height
    return max(1, round(width * side / short)), max(1, round(height * side / short))


def encode(image_HWC: np.ndarray, lossy: bool, side: int | None = None) -> bytes:
    """An image's file, its short side brought down to `side` with Pillow's Lanczos.

    PNG, without loss; a JPEG of quality 95 and full chroma where `lossy`.
    """
    height, width = image_HWC.shape[:2]
    image, size = Image.fromarray(image_HWC), reduced(width, height, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if lossy:
        image.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP") or image.mode not in ("RGB", "L"):
        return False
    if image.format == "PNG" and data[24] > 8:  # bits a channel; of 16 Pillow drops the lower 8
        return False
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return False
    return not image.has_transparency_data and image_folder.orientation(image) == 1
