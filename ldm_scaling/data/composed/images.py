"""The composed pictures of `builder` as a source."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from ldm_scaling.data.composed import builder as builder_lib
from ldm_scaling.errors import UserError, first_line

FIELDS = ("image", "caption", "concept", "index")


class ImageSource:
    """The pictures and captions of a split, by position (which is the `index` of each).

    `batch` gives those of `fields` that were asked for: "image" uint8 (B, H, W, 3); "caption" and
    "concept" arrays of str; "index" int64.
    """

    def __init__(self, prepared: builder_lib.Prepared, split: str, fields: Sequence[str]):
        self._where = f"the {split} split of {prepared.path}"
        self._fields = tuple(fields)
        self._remedy = f"remove the folder {prepared.path} and run again"
        try:
            self._records = prepared.builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
            found = len(self._records)
        except (RuntimeError, OSError) as e:
            raise self._damaged(first_line(e)) from e
        self._count = prepared.builder.spec.count(split)
        self.hash = f"{prepared.hash}/{split}"
        if found != self._count:
            raise self._damaged(f"it has {found} records instead of {self._count}")

        self._made_of = (
            prepared.builder.spec, prepared.path, prepared.hash, split, self._fields
        )  # fmt: skip

    def __reduce__(self):
        return _opened, self._made_of

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked; nothing about them is random.

        Raises:
          IndexError: an index outside 0..len-1.
          UserError: a damaged record.
        """
        del keys
        indices = [int(i) for i in indices]
        if any(not 0 <= i < self._count for i in indices):
            raise IndexError(f"{self._where} has 0..{self._count - 1}; asked for {indices}")
        try:
            records = self._records.__getitems__(indices)
            return {name: _column(name, records) for name in self._fields}
        except (RuntimeError, OSError, ValueError, SyntaxError) as e:  # PIL: broken PNG
            raise self._damaged(first_line(e)) from e

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self._where} is damaged: {how}; {self._remedy}")


def image_source(
    prepared: builder_lib.Prepared, split: str, fields: Sequence[str] = ("image", "caption")
) -> ImageSource:
    """Random access to a split of a prepared data set.

    Args:
      prepared: see `builder.prepare`.
      split: "train" or "validation".
      fields: some of `FIELDS`.

    Raises:
      UserError: an unknown split or field, or a damaged data set.
    """
    splits = sorted(prepared.builder.info.splits)
    if split not in splits:
        raise UserError(f"the data set has no split {split!r}: use one of {splits}")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown or not fields:
        raise UserError(f"the data set has no field {unknown}: use some of {FIELDS}")
    return ImageSource(prepared, split, fields)


def _column(name: str, records: Sequence[dict]) -> np.ndarray:
    values = [record[name] for record in records]
    if name == "image":
        return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in values])
    if name == "index":
        return np.asarray(values, np.int64)
    return np.asarray([value.decode() for value in values])


def _opened(
    spec: builder_lib.ComposedSpec, path: epath.Path, hash: str, split: str, fields: Sequence[str]
) -> ImageSource:
    """A source in another process: TFDS's builder pickles only without arguments of its own."""
    builder = builder_lib.OpenmojiComposed(spec, path.parent.parent.parent)
    return ImageSource(builder_lib.Prepared(builder, path, hash), split, fields)
