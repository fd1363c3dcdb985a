"""Small pictures: a study's own, reduced, and their latents beside those of the large ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ldm_scaling import files
from ldm_scaling.data.cache import CacheSource
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source, hash_of, zip_sources
from ldm_scaling.study import datasets
from ldm_scaling.study.caches import Caches
from ldm_scaling.study.datasets import Dataset


def reduced(image_NHWC: np.ndarray, factor: int) -> np.ndarray:
    """uint8 pictures of sides `factor` times smaller: each pixel the mean of those that it covers.
    """
    n, height, width, deep = image_NHWC.shape
    parts = image_NHWC.reshape(n, height // factor, factor, width // factor, factor, deep)
    return np.rint(parts.mean((2, 4), dtype=np.float32)).astype(np.uint8)


class _Images:
    """A source of pictures, reduced."""

    def __init__(self, source: Source, factor: int):
        self._source, self._factor = source, factor
        self.hash = files.sha256_of([hash_of(source), factor])

    def __len__(self) -> int:
        return len(self._source)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See `Source.batch`."""
        found = self._source.batch(indices, keys)
        return found | {"image": reduced(found["image"], self._factor)}


class _Pictures:
    """A data set whose pictures are reduced; all else is the data set's own."""

    def __init__(self, dataset: Dataset, factor: int):
        self._dataset, self._factor = dataset, factor
        self.hash = files.sha256_of([dataset.hash, "reduced", factor])

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def hash_of(self, split: str) -> str:
        """See `Dataset.hash_of`."""
        return files.sha256_of([self._dataset.hash_of(split), "reduced", self._factor])

    def images(self, split: str, fields: Sequence[str], *more: object) -> Source:
        """See `Dataset.images`."""
        found = self._dataset.images(split, fields, *more)
        return _Images(found, self._factor) if "image" in fields else found


class _Low:
    """Pairs of small pictures as a second stage takes them: latents by other names, no captions."""

    def __init__(self, pairs: Source):
        self._pairs = pairs
        self.hash = files.sha256_of(["low", hash_of(pairs)])

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`low_mean` and `low_logvar`, mirrored where the large pictures with these keys are."""
        found = self._pairs.batch(indices, keys)
        return {"low_mean": found["mean"], "low_logvar": found["logvar"]}


@dataclasses.dataclass(frozen=True, eq=False)
class SmallCaches(Caches):
    """The caches of a study's small pictures; captions' states are those of the large ones.

    Attributes:
      large: the caches of the study.
    """

    large: Caches | None = None

    def states(self, number: int, split: str) -> CacheSource:
        """See `Caches.states`."""
        return self.large.states(number, split)

    def both(self) -> Source | Mixture:
        """What second stages are trained on: `mean`, `logvar`, `context`, `low_mean`, `low_logvar`.
        """
        return datasets.mixed(
            [
                zip_sources(self.large.pairs(number), _Low(self.pairs(number, told=False)))
                for number in range(len(self.datasets))
            ],
            self.data.weights,
        )


def caches_of(large: Caches, factor: int) -> SmallCaches:
    """The caches of pictures `factor` times smaller, in a folder of their own."""
    fields = {f.name: getattr(large, f.name) for f in dataclasses.fields(Caches)}
    fields["data"] = dataclasses.replace(large.data, side=large.data.side // factor)
    fields["datasets"] = tuple(_Pictures(d, factor) for d in large.datasets)
    if not large.shared:  # Among other studies' names tell what made them.
        fields["folder"] = large.folder / f"small_{factor}"
    return SmallCaches(**fields, large=large)
