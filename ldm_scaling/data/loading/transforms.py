"""From an image's bytes to the pixels that are trained on: decoded, resized, cropped, mirrored.

An image is scaled, its aspect kept, until it just covers the size that is asked for, and what is
too long is cut off, all in one Pillow resize. Each draw is a pure function of the example's key.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.image_folder import BROKEN, orientation, to_rgb
from ldm_scaling.data.loading import draws, sides
from ldm_scaling.data.loading.buckets import Buckets
from ldm_scaling.data.record import Record
from ldm_scaling.errors import UserError

FIELDS = ("image", "caption", "key", "index")
# libjpeg may leave out octaves as long as the image stays this many times the size wanted: resized
# to 64..256 px, photographs are then 44 to 54 dB from full decoding; at 1, 35 to 51.
_GAP = 1.5
# Pillow first averages blocks of whole pixels while three times the size remain: 53 dB or more.
_REDUCING_GAP = 3.0
VERSION = 1  # of the pixels: with another, what was made of pictures is made anew


class Decoded(NamedTuple):
    """An RGB image, of which the picture is the part from 0, 0 to `width`, `height`.

    The two differ by less than a pixel where libjpeg scaled a picture whose sides are no multiple
    of the scale: its last pixels are partly padding.
    """

    image: Image.Image
    width: float
    height: float


class Draw(NamedTuple):
    """How an image is cut and mirrored.

    Attributes:
      place: of the crop on the long side, 0 (top, left) to 1.
      flip: whether it is mirrored.
    """

    place: float = 0.5
    flip: bool = False


CENTRE = Draw()


class Records(Protocol):
    """What `PairSource` reads, as `shards.Records`; picklable."""

    def __len__(self) -> int:
        """How many."""

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at `indices`. Raises `CorruptRecords` naming all that are damaged."""


def decode(data: bytes, at_least: tuple[int, int] = (0, 0)) -> Decoded:
    """The image in a file's bytes as `image_folder.to_rgb` shows it.

    A JPEG that is at least three times as large as need be is decoded smaller, by a power of two,
    which is up to four times as fast; the rest as they are.

    Args:
      data: of a JPEG, PNG, WebP or whatever Pillow reads.
      at_least: (height, width) that the result will be scaled down to cover; 0, 0 decodes in full.
    Raises:
      one of `image_folder.BROKEN`: for an image that is cut short, broken or of an unknown kind.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        plain = image.mode in ("RGB", "L") and not image.has_transparency_data
        if not plain or orientation(image) > 1:
            upright = Image.fromarray(to_rgb(image))
            return Decoded(upright, *upright.size)
        if image.format == "JPEG" and min(at_least) > 0:
            scale = min(height / at_least[0], width / at_least[1]) / _GAP
            drafted = scale >= 2 and image.draft(None, (int(width / scale), int(height / scale)))
            if drafted:
                width, height = drafted[1][2:]  # not whole numbers, other than the image's
        image.load()
        return Decoded(image if image.mode == "RGB" else image.convert("RGB"), width, height)


def fitted(decoded: Decoded, size: tuple[int, int], draw: Draw = CENTRE) -> np.ndarray:
    """The picture at `size`: uint8 (height, width, 3).

    Scaled by Pillow's Lanczos filter to cover it; smaller pictures are enlarged. A picture that has
    the size in one direction is cut at a whole pixel and not filtered.

    Args:
      decoded: see `decode`.
      size: (height, width).
      draw: where it is cut, and whether it is mirrored; the centre and no.
    """
    height, width = size
    scale = min(decoded.width / width, decoded.height / height)
    wide, tall = width * scale, height * scale  # of the part that is seen
    left, top = (decoded.width - wide) * draw.place, (decoded.height - tall) * draw.place
    if scale == 1:
        left, top = round(left), round(top)
    box = (left, top, min(left + wide, decoded.image.width), min(top + tall, decoded.image.height))
    image = decoded.image.resize(
        (width, height), Image.Resampling.LANCZOS, box, reducing_gap=_REDUCING_GAP
    )
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


class PairSource:
    """Images with captions out of prepared shards, as batches of one size.

    `batch` gives those of `fields` that were asked for: "image" uint8 (B, H, W, 3); "caption" and
    "key" arrays of str; "index" int64.

    Keys draw one of an image's captions, the place of the crop and, with `flip`, whether it is
    mirrored: half of the images are, except where the caption drawn names a side or speaks of
    writing (`sides.names_a_side`). Without keys it is the first caption, the centre and no
    mirroring. A record without captions has the empty one.

    Args:
      records: `shards.Records`, or what is like it.
      size: the side of square images or, with `bucket_N`, the table of sizes.
      fields: some of `FIELDS`.
      flip: whether images may be mirrored.
      bucket_N: the bucket of each image, as `Buckets.assign` gives it.
      hash: of what the records hold, for checkpoints: those of another hash are refused.

    Raises:
      UserError: an unknown field.
    """

    def __init__(
        self, records: Records, size: int | Buckets, fields: Sequence[str] = ("image", "caption"),
        flip: bool = False, bucket_N: np.ndarray | None = None, hash: str = "",
    ):
        unknown = sorted(set(fields) - set(FIELDS))
        if unknown or not fields:
            raise UserError(f"pairs have no field {unknown}: use some of {FIELDS}")
        if isinstance(size, Buckets) != (bucket_N is not None):
            raise ValueError("a table of sizes and the bucket of each image go together")
        if bucket_N is not None and len(bucket_N) != len(records):
            raise ValueError(f"{len(bucket_N)} buckets for {len(records)} records")
        self._records, self._fields, self._flip = records, tuple(fields), flip
        self.sizes = size.sizes if isinstance(size, Buckets) else ((int(size), int(size)),)
        self.bucket_N, self.hash = bucket_N, hash
        if min(min(size) for size in self.sizes) < 1:
            raise UserError(f"images of {self.sizes} pixels: sides must be at least 1")

    def __len__(self) -> int:
        return len(self._records)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The pairs at `indices`, stacked; see `source.Source.batch`.

        Raises:
          CorruptRecords: naming all records whose image does not decode.
          ValueError: images of several buckets.
        """
        indices = [int(i) for i in indices]
        records = self._records.read(indices)
        captions, draws_B = self._drawn(records, keys)
        columns = {
            "caption": lambda: np.asarray(captions, np.str_),
            "key": lambda: np.asarray([record.key for record in records], np.str_),
            "index": lambda: np.asarray(indices, np.int64),
            "image": lambda: self._images(indices, records, draws_B),
        }
        return {name: columns[name]() for name in self._fields}

    def _size(self, indices: list[int]) -> tuple[int, int]:
        if self.bucket_N is None:
            return self.sizes[0]
        found = np.unique(self.bucket_N[indices])
        if len(found) != 1:
            raise ValueError(f"a batch of images of the buckets {found.tolist()}")
        return self.sizes[int(found[0])]

    def _drawn(
        self, records: Sequence[Record], keys: np.ndarray | None
    ) -> tuple[list[str], list[Draw]]:
        captions = [record.captions or ("",) for record in records]
        if keys is None:
            return [several[0] for several in captions], [CENTRE] * len(records)
        which, place, flip = (draws.uniform(keys, name) for name in ("caption", "crop", "flip"))
        drawn = [several[int(u * len(several))] for several, u in zip(captions, which)]
        return drawn, [
            Draw(float(p), self._flip and f < 0.5 and not sides.names_a_side(caption))
            for p, f, caption in zip(place, flip, drawn)
        ]

    def _images(
        self, indices: list[int], records: Sequence[Record], draws_B: Sequence[Draw]
    ) -> np.ndarray:
        size = self._size(indices)
        images_BHWC = np.empty((len(records), *size, 3), np.uint8)
        failures: dict[int, str] = {}
        for row, (record, draw) in enumerate(zip(records, draws_B)):
            try:
                images_BHWC[row] = fitted(decode(record.image, size), size, draw)
            except BROKEN as e:
                failures[indices[row]] = f"the image of {record.key} does not decode: {e}"
        if failures:
            raise CorruptRecords(failures)
        return images_BHWC
