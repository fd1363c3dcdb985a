"""A source of images with the condition of each, for the loader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm_scaling.data.conditions.table import Condition
from ldm_scaling.data.loading import draws
from ldm_scaling.data.loading.source import Source, buckets_of, hash_of
from ldm_scaling.errors import UserError

_VERSION = 1  # of what is drawn and done: another is another data set


class ConditionedSource:
    """The examples of a source with "condition", uint8 (B, h, w, 3), and, where the condition has
    a mask, "condition_mask", uint8 (B, H, W, 1), 1 where the image is not seen.

    Each example is done by itself, by the key that the loader draws for it: anew in each epoch, and
    the same whatever the batch, thread, worker process and host. Without keys, in evaluation, the
    key is of `seed`, the source's number and the example's index, so that all models see the same
    conditions, and no two examples of several sources one.

    Args:
      source: gives "image", uint8 (B, H, W, 3), and whatever else is wanted.
      condition: a row of `table.CONDITIONS`.
      crop: the side of a square that is cut out of both, at a random place (the middle without
        keys), once the condition is made, as Real-ESRGAN cuts 256 out of 400: the borders of what
        it filters are then not seen. None keeps all.
      seed: of conditions in evaluation.
      number: of the source, among several that are evaluated together.

    Raises:
      UserError: images, or a crop, that the condition cannot be made of; a crop of bucketed images.
    """

    def __init__(
        self, source: Source, condition: Condition, crop: int | None = None, seed: int = 0,
        number: int = 0,
    ):
        self._source, self._condition, self._crop = source, condition, crop
        self._seed, self._number = seed, number
        if crop is not None:
            condition.check((crop, crop))
            if buckets_of(source) is not None:
                raise UserError(f"a crop of {crop} of images in buckets: leave out one of them")
        self.bucket_N = buckets_of(source)
        inner = getattr(source, "sizes", ())
        for size in inner:
            self._check(size)
        self.sizes = inner if crop is None else ((crop, crop),)
        self.hash = "/".join(
            (hash_of(source) or "", condition.name, str(_VERSION), str(crop or "whole"))
        )

    def __len__(self) -> int:
        return len(self._source)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked; see `source.Source.batch`.

        Raises:
          UserError: as `table.Condition`, or as the source.
        """
        arrays = self._source.batch(indices, keys)
        if "image" not in arrays:
            raise ValueError(f"a condition needs images, and the source gives {sorted(arrays)}")
        self._check(arrays["image"].shape[1:3])
        of = keys
        if of is None:
            numbers = np.asarray(indices, np.int64)
            of = draws.keys(self._seed, self._number, np.zeros_like(numbers), numbers)
        given = [
            self._condition(image, int(key)) for image, key in zip(arrays["image"], of, strict=True)
        ]
        arrays = {**arrays, "condition": np.stack([g.image for g in given])}
        if self._condition.masked:
            arrays["condition_mask"] = np.stack([g.mask for g in given])
        return arrays if self._crop is None else self._cut(arrays, keys)

    def _check(self, size: tuple[int, int]) -> None:
        self._condition.check(size)
        if self._crop is not None and min(size) < self._crop:
            raise UserError(
                f"a crop of {self._crop} of images of {size[0]}x{size[1]} pixels: "
                "use larger images, or a smaller crop"
            )

    def _cut(
        self, arrays: dict[str, np.ndarray], keys: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The same place of image, condition and mask, whole pixels in each."""
        scale, side = self._condition.scale, self._crop // self._condition.scale
        height, width = (n // scale for n in arrays["image"].shape[1:3])
        count = len(arrays["image"])
        u_B, v_B = (
            np.full(count, 0.5) if keys is None else draws.uniform(keys, f"condition {name}")
            for name in ("top", "left")
        )
        top_B = (u_B * (height - side + 1)).astype(int)
        left_B = (v_B * (width - side + 1)).astype(int)

        def cut(images_BHWC: np.ndarray, times: int) -> np.ndarray:
            n = side * times
            return np.stack([
                image[top : top + n, left : left + n]
                for image, top, left in zip(images_BHWC, top_B * times, left_B * times)
            ])

        times = {"image": scale, "condition": 1, "condition_mask": scale}
        return {k: cut(v, times[k]) if k in times else v for k, v in arrays.items()}
