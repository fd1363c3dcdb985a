"""A study's caches: latents and text states of each of its data sets, made when first asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_scaling import files
from ldm_scaling.config import Data
from ldm_scaling.data.cache import CacheSource
from ldm_scaling.data.cached_pairs import CachedBuckets, CachedPairs
from ldm_scaling.data.loading import buckets as buckets_lib
from ldm_scaling.data.loading import sides
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.models.text_encoder import TextEncoder
from ldm_scaling.parallel import processes
from ldm_scaling.study import caching, datasets
from ldm_scaling.study.datasets import Dataset
from ldm_scaling.study.encoders import LatentEncoder, TextStates

Size = tuple[int, int]


class _First:
    """The text states of pictures' first captions."""

    def __init__(self, text: CacheSource, starts_N: np.ndarray):
        self._text, self._starts_N = text, starts_N

    def __len__(self) -> int:
        return len(self._starts_N) - 1

    def batch(self, indices: Sequence[int], keys: None = None) -> dict[str, np.ndarray]:
        """See `Source.batch`."""
        return self._text.batch(self._starts_N[np.asarray(indices, np.int64)])


def _sides_of(text: CacheSource) -> epath.Path:
    """Where it is kept which of the captions name a side."""
    return epath.Path(text.path) / f"names_side_{sides.VERSION}.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class Caches:
    """What the frozen encoders make of a study's data sets.

    Attributes:
      folder: where caches lie.
      shared: whether other studies' lie there too: names hold hashes then.
      data: the config's.
      datasets: prepared.
      autoencoder: gives the encoder of pictures.
      text: the encoder of captions.
      embedder: makes sentence embeddings, which pictures' captions are scored by.
      mesh: of this process's devices.
      step: gives what the sides of pictures are multiples of: all networks halve them.
      least: pictures that a bucket of another aspect needs: a batch.
      process_index, process_count: of those that make the caches together.
    """

    folder: epath.Path
    shared: bool
    data: Data
    datasets: tuple[Dataset, ...]
    autoencoder: Callable[[], LatentEncoder]
    text: Callable[[], TextStates]
    embedder: Callable[[], TextEncoder]
    mesh: Mesh
    step: Callable[[], int]
    least: int
    process_index: int = 0
    process_count: int = 1

    @functools.cached_property
    def buckets(self) -> buckets_lib.Buckets | None:
        """The sizes that are trained at; None where that is the square alone."""
        if self.data.max_aspect == 1:
            return None
        return buckets_lib.table(self.data.side, self.step(), self.data.max_aspect)

    # One data set.

    @functools.cache  # noqa: B019  One object a run.
    def states(self, number: int, split: str) -> CacheSource:
        """`context` (L, D) and `embedding` (E,) of all captions of a data set's split."""
        captions, dtype = self.datasets[number].captions(split), self.data.text_dtype
        made = caching.cache_text(
            self._folder(
                "text", split, number, self.text().hash, self.embedder().hash, captions.hash,
                *([] if dtype == "float16" else [dtype]),
            ),
            captions, self.text(), self.mesh, embedder=self.embedder(), dtype=dtype,
            what=f"text states, {self._what(number, split)}", **self._share(),
        )
        if self.data.flip and split == "train":
            together = self.process_count > 1
            with processes.lead_first("sides") if together else contextlib.nullcontext():
                path = _sides_of(made)
                if not path.exists():
                    with files.atomic_path(path) as temporary, temporary.open("wb") as out:
                        np.save(out, captions.name_sides())
        return made

    @functools.cache  # noqa: B019
    def latents(self, number: int, split: str, mirrored: bool = False) -> CacheSource:
        """The posterior's `mean` and `logvar` of a split's square pictures."""
        dataset, encoder = self.datasets[number], self.autoencoder()
        return caching.cache_latents(
            self._folder(
                "latents", split, number, encoder.hash, dataset.hash_of(split), self.data.side,
                self.data.latent_dtype, mirrored=mirrored,
            ),
            dataset.images(split, ("image",)), encoder, self.mesh, dataset.hash_of(split),
            mirrored=mirrored, dtype=self.data.latent_dtype,
            what=f"latents, {self._what(number, split, mirrored)}", **self._share(),
        )

    @functools.cache  # noqa: B019
    def latent_buckets(self, number: int, mirrored: bool = False) -> dict[Size, CacheSource]:
        """The same of the training pictures in each of the sizes that are trained at."""
        dataset, encoder = self.datasets[number], self.autoencoder()
        images = dataset.bucketed("train", self.buckets, self.least, flip=False)
        parts = [
            (np.flatnonzero(images.bucket_N == bucket), size)
            for bucket, size in enumerate(images.sizes)
        ]
        return caching.cache_latent_buckets(
            self._folder(
                "buckets", "train", number, encoder.hash, dataset.hash_of("train"), images.sizes,
                images.bucket_N, self.data.latent_dtype, mirrored=mirrored,
            ),
            images, encoder, self.mesh,
            files.sha256_of([dataset.hash_of("train"), images.sizes]), parts,
            mirrored=mirrored, dtype=self.data.latent_dtype,
            what=f"latents, {self._what(number, 'train', mirrored)}", **self._share(),
        )

    def _folder(
        self, kind: str, split: str, number: int, *decides: object, mirrored: bool = False
    ) -> epath.Path:
        """Where a cache lies; among other studies' its name tells all that decides it."""
        if self.shared:
            return self.folder / f"{kind}_{files.sha256_of([*decides, mirrored])}_{split}"
        name = split if len(self.datasets) == 1 else f"{split}_{number}"
        return self.folder / kind / f"{name}{'_mirrored' if mirrored else ''}"

    def _what(self, number: int, split: str, mirrored: bool = False) -> str:
        of = f" of {self.data.sources[number]}" if len(self.datasets) > 1 else ""
        return f"{split}{of}{', mirrored' if mirrored else ''}"

    def _share(self) -> dict[str, int]:
        return {"process_index": self.process_index, "process_count": self.process_count}

    # All data sets.

    def make(self, splits: Sequence[str]) -> list[str]:
        """Makes what is missing of all caches; returns their folders."""
        out = []
        for number in range(len(self.datasets)):
            for split in splits:
                out += [self.states(number, split), *self._all_latents(number, split)]
        return [os.fspath(cache.path) for cache in out]

    def _all_latents(self, number: int, split: str) -> list[CacheSource]:
        mirrors = (False, True) if self.data.flip and split == "train" else (False,)
        if split == "train" and self.buckets is not None:
            return [c for m in mirrors for c in self.latent_buckets(number, m).values()]
        return [self.latents(number, split, m) for m in mirrors]

    def make_states(self, splits: Sequence[str]) -> None:
        """Makes what is missing of the text states."""
        for number in range(len(self.datasets)):
            for split in splits:
                self.states(number, split)

    @functools.cached_property
    def statistics(self) -> caching.LatentStatistics:
        """Of all training latents."""
        every = range(len(self.datasets))
        return caching.latent_statistics(*(c for n in every for c in self._all_latents(n, "train")))

    def first_states(self, split: str) -> Source:
        """`context` and `embedding` of the first caption of each picture of all data sets."""
        return datasets.Joined([
            _First(self.states(number, split), dataset.captions(split).starts_N)
            for number, dataset in enumerate(self.datasets)
        ])

    def posteriors(self, split: str) -> Source:
        """`mean` and `logvar` of each square picture of all data sets."""
        return datasets.Joined([self.latents(n, split) for n in range(len(self.datasets))])

    def training(self) -> Source | Mixture:
        """What text-to-image networks are trained on: `mean`, `logvar`, `context`."""
        return datasets.mixed(
            [self.pairs(number) for number in range(len(self.datasets))], self.data.weights
        )

    def pairs(self, number: int, told: bool = True) -> Source:
        """The same of one data set; unless `told`, without reading text states."""
        captions, text = self.datasets[number].captions("train"), self.states(number, "train")
        names_side = None
        if self.data.flip:
            with _sides_of(text).open("rb") as file:
                names_side = np.load(file)

        def pairs(latents, mirrored, image_N=None):
            return CachedPairs(
                latents, text, captions.starts_N, mirrored, names_side, image_N, told)

        flip = self.data.flip
        if self.buckets is None:
            mirrored = self.latents(number, "train", True) if flip else None
            return pairs(self.latents(number, "train"), mirrored)
        images = self.datasets[number].bucketed("train", self.buckets, self.least, flip=False)
        plain = self.latent_buckets(number)
        mirrored = self.latent_buckets(number, True) if flip else {}
        return CachedBuckets(
            [
                pairs(plain[size], mirrored.get(size), np.flatnonzero(images.bucket_N == bucket))
                if size in plain else None
                for bucket, size in enumerate(images.sizes)
            ],
            images.sizes,
        )
