"""Latents and text states from caches, an example at a time, one of its captions drawn by key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm_scaling.data.cache import CacheSource
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import draws
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of

_LATENT = ("mean", "logvar")


class CachedPairs:
    """A source for training: `mean` and `logvar` of an image, the text states of one caption.

    It pickles, as its caches do. Beside the arrays of both caches a batch holds `caption_index`
    (B,) int64, which caption was taken.

    Args:
      latents: record i is image i.
      text: the captions of all images, one after the other; its arrays are given on by their names.
      starts_N: captions of image i are starts_N[i] .. starts_N[i + 1] - 1, at least one; int
        (images + 1,).
      mirrored: latents of the same images, mirrored left to right; by key every second example is
        one of these. None never mirrors.
      names_side: bool (captions,), which of them tell left from right: their images are not
        mirrored. Needed with `mirrored`.
      image_N: int (records of the latents,), which image a record is; None where record i is image
        i. Latents of one shape among several need it.
      told: whether batches hold the states; without them they are not read, and all else is the
        same.

    Attributes:
      hash: of the caches' hashes and of all that decides what is drawn.

    Raises:
      UserError: caches and indices that do not belong together.
    """

    def __init__(
        self, latents: CacheSource, text: CacheSource, starts_N: np.ndarray,
        mirrored: CacheSource | None = None, names_side: np.ndarray | None = None,
        image_N: np.ndarray | None = None, told: bool = True,
    ):
        self._latents, self._text, self._mirrored = latents, text, mirrored
        self._told = told
        self._starts_N = np.asarray(starts_N, np.int64)
        images = len(self._starts_N) - 1
        image_N = np.arange(len(latents)) if image_N is None else np.asarray(image_N, np.int64)
        self._image_N = image_N
        if len(image_N) != len(latents) or ((image_N < 0) | (image_N >= images)).any():
            raise UserError(
                f"{latents.path} has {len(latents)} latents for {len(image_N)} of {images} images: "
                "remove the caches of the data set, and they are made anew"
            )
        if self._starts_N[0] != 0 or self._starts_N[-1] != len(text):
            raise UserError(
                f"{text.path} has the states of {len(text)} captions, the images have "
                f"{self._starts_N[-1]}: remove the caches of the data set, and they are made anew"
            )
        counts_N = np.diff(self._starts_N)
        if (counts_N < 1).any():
            raise UserError(
                f"image {int(np.argmin(counts_N))} has no caption: leave it out when the data set "
                "is prepared"
            )
        names = [{field.name for field in source.fields} for source in (latents, text)]
        if lacking := [name for name in _LATENT if name not in names[0]]:
            raise UserError(f"{latents.path} holds no {lacking[0]}: it is no cache of latents")
        if twice := sorted(names[0] & names[1]):
            raise UserError(f"{latents.path} and {text.path} both hold {twice[0]!r}")
        self._names_side = None if names_side is None else np.asarray(names_side, bool)
        if mirrored is not None:
            if (len(mirrored), mirrored.fields) != (len(latents), latents.fields):
                raise UserError(
                    f"{mirrored.path} does not hold the mirrored images of {latents.path}: "
                    f"{len(mirrored)} records of {mirrored.fields}, not {len(latents)} of "
                    f"{latents.fields}"
                )
            if self._names_side is None or len(self._names_side) != len(text):
                raise UserError(
                    f"{mirrored.path}: mirrored latents need to know of each of the {len(text)} "
                    "captions whether it names a side"
                )

        caches = [source and source.hash for source in (latents, text, mirrored)]
        arrays = [self._starts_N, self._image_N, self._names_side]
        self.hash = sha256_of([*caches, *arrays])

    def __len__(self) -> int:
        return len(self._latents)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked.

        Args:
          indices: of records of the latents.
          keys: uint64 (B,), what is drawn from: the caption, uniformly, and whether the image is
            mirrored. None takes the first caption and mirrors nothing.

        Raises:
          IndexError: an index outside 0..len-1.
          CorruptRecords: naming those whose latents or states are damaged.
          UserError: a cache that is missing or damaged as a whole.
        """
        record_N = np.asarray(indices, np.int64).reshape(-1)
        outside = (record_N < 0) | (record_N >= len(self))
        if outside.any():
            raise IndexError(
                f"{self._latents.path} has 0..{len(self) - 1}; asked for {record_N.tolist()}"
            )
        image_N = self._image_N[record_N]
        caption_N = self._starts_N[image_N]
        mirror_N = np.zeros(len(record_N), bool)
        if keys is not None:
            keys_N = np.asarray(keys, np.uint64)
            count_N = self._starts_N[image_N + 1] - caption_N
            caption_N = caption_N + (draws.uniform(keys_N, "caption") * count_N).astype(np.int64)
            if self._mirrored is not None:
                mirror_N = (draws.uniform(keys_N, "flip") < 0.5) & ~self._names_side[caption_N]
        failures: dict[int, str] = {}
        latents, text = {}, {}
        try:
            latents = self._latents_of(record_N, mirror_N)
        except CorruptRecords as e:
            failures |= e.failures
        try:
            text = self._text.batch(caption_N) if self._told else {}
        except CorruptRecords as e:
            both = zip(record_N.tolist(), caption_N.tolist())
            failures |= {record: e.failures[caption] for record, caption in both
                         if caption in e.failures}
        if failures:
            raise CorruptRecords(failures)
        return {**latents, **text, "caption_index": caption_N}

    def _latents_of(self, record_N: np.ndarray, mirror_N: np.ndarray) -> dict[str, np.ndarray]:
        if not mirror_N.any():
            return self._latents.batch(record_N)
        plain = self._latents.batch(record_N[~mirror_N])
        other = self._mirrored.batch(record_N[mirror_N])
        out = {}
        for name, array in plain.items():
            out[name] = np.empty((len(record_N), *array.shape[1:]), array.dtype)
            out[name][~mirror_N], out[name][mirror_N] = array, other[name]
        return out


class CachedBuckets:
    """Pairs of several shapes as one source: those of each shape after those of the one before.

    Args:
      pairs: of one shape each; None where there is none of it, as sources that are mixed have to
        number the same sizes.
      sizes: (H, W) of the images of each.

    Attributes:
      sizes, bucket_N, hash: see `source.Source`.

    Raises:
      UserError: not as many sizes as pairs.
    """

    def __init__(
        self, pairs: Sequence[CachedPairs | None], sizes: Sequence[tuple[int, int]]
    ):
        if len(pairs) != len(sizes) or not any(pairs):
            raise UserError(f"{len(pairs)} caches of latents for the {len(sizes)} shapes {sizes}")
        self._pairs, self.sizes = list(pairs), tuple((int(h), int(w)) for h, w in sizes)
        lengths = [len(source) if source else 0 for source in pairs]
        self._starts_N = np.cumsum([0, *lengths])
        self.bucket_N = np.repeat(np.arange(len(pairs)), lengths)
        self.hash = sha256_of([self.sizes, *(source and source.hash for source in pairs)])

    def __len__(self) -> int:
        return len(self.bucket_N)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See `CachedPairs.batch`. Raises `ValueError` for indices of several buckets."""
        index_N = np.asarray(indices, np.int64).reshape(-1)
        if ((index_N < 0) | (index_N >= len(self))).any():
            raise IndexError(f"there are examples 0..{len(self) - 1}; asked for {index_N.tolist()}")
        buckets = np.unique(self.bucket_N[index_N])
        if len(buckets) != 1:
            raise ValueError(f"a batch is of one bucket, not of {buckets.tolist()}")
        bucket = int(buckets[0])
        start = int(self._starts_N[bucket])
        try:
            return self._pairs[bucket].batch(index_N - start, keys)
        except CorruptRecords as e:
            raise CorruptRecords({start + i: why for i, why in e.failures.items()}) from e
