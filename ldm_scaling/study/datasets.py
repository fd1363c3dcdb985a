"""A study's pictures and captions, prepared: composed ones, or collections turned into shards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ldm_scaling import files
from ldm_scaling.data import shards
from ldm_scaling.data.composed import builder, openmoji
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import loader, sides, transforms
from ldm_scaling.data.loading.buckets import Buckets
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.data.loading.transforms import PairSource
from ldm_scaling.data.record import Record
from ldm_scaling.errors import UserError


class Dataset(Protocol):
    """One source of pairs, prepared.

    Attributes:
      hash: of all pictures and captions.
      about: what it is, in a sentence of a report.
      attribution: what its licence wants said; empty where that is not known.
      total: pictures of both splits, those too that are not taken.
    """

    hash: str
    about: str
    attribution: str
    total: int

    def hash_of(self, split: str) -> str:
        """The same of one split, whatever the other holds."""

    def count(self, split: str) -> int:
        """Pictures of a split."""

    def images(
        self, split: str, fields: Sequence[str], flip: bool = False, side: int | None = None
    ) -> Source:
        """Square pictures and what belongs to them: some of `image`, `caption`, `index`; of
        another side than the config's, where one is given."""

    def bucketed(self, split: str, buckets: Buckets, at_least: int, flip: bool) -> Source:
        """Pictures (`image`) in the sizes of a table, see `Buckets.assign`."""

    def groups(self, split: str, index: Sequence[int]) -> np.ndarray:
        """What pictures have in common with others, such as a subject: str (N,)."""

    def captions(self, split: str) -> Captions:
        """All captions of a split."""


@dataclasses.dataclass(frozen=True, eq=False)
class Captions(Sequence):
    """The captions of a split's pictures, one picture's after the other's; read when asked for.

    Attributes:
      starts_N: those of picture i are starts_N[i] .. starts_N[i + 1] - 1; each has at least one.
      hash: of all of them.
      read: pictures' numbers -> the captions of each.
    """

    starts_N: np.ndarray
    hash: str
    read: Callable[[Sequence[int]], list[Sequence[str]]] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return int(self.starts_N[-1])

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return self[slice(index, index + 1)][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("captions are read in order")
        if start >= stop:
            return []
        first, last = np.searchsorted(self.starts_N, [start, stop - 1], side="right") - 1
        several = self.read(range(int(first), int(last) + 1))
        flat = [caption for captions in several for caption in captions]
        offset = int(self.starts_N[first])
        return flat[start - offset : stop - offset]

    def name_sides(self) -> np.ndarray:
        """Which of them would be false of the mirrored picture, bool (captions,)."""
        out = np.zeros(len(self), bool)
        with files.progress(len(self), "captions that name a side", "caption") as bar:
            for start in range(0, len(self), 4096):
                part = self[start : start + 4096]
                out[start : start + len(part)] = [sides.names_a_side(text) for text in part]
                bar.update(len(part))
        return out


# --- composed pictures ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """Pictograms composed into captioned pictures; see `Dataset`."""

    prepared: builder.Prepared
    attribution: str = openmoji.ATTRIBUTION

    @property
    def hash(self) -> str:
        """See `Dataset`."""
        return self.prepared.hash

    def hash_of(self, split: str) -> str:
        """See `Dataset`; both splits are made of one spec."""
        return self.hash

    @property
    def about(self) -> str:
        """See `Dataset`."""
        return self.prepared.builder.spec.about

    @property
    def total(self) -> int:
        """See `Dataset`."""
        return sum(map(self.count, shards.SPLITS))

    def count(self, split: str) -> int:
        """See `Dataset`."""
        return self.prepared.builder.spec.count(split)

    def images(
        self, split: str, fields: Sequence[str], flip: bool = False, side: int | None = None
    ) -> Source:
        """See `Dataset`; the config knows that these are not mirrored."""
        del flip
        if side not in (None, self.prepared.builder.spec.side):
            raise ValueError("composed pictures have one side")
        return loader.image_source(self.prepared, split, fields)

    def bucketed(self, split: str, buckets: Buckets, at_least: int, flip: bool) -> Source:
        """See `Dataset`; the config knows that these are square."""
        raise ValueError("composed pictures are square")

    def groups(self, split: str, index: Sequence[int]) -> np.ndarray:
        """See `Dataset`: the concepts in a picture."""
        return loader.image_source(self.prepared, split, ("concept",)).batch(index)["concept"]

    def captions(self, split: str) -> Captions:
        """See `Dataset`."""
        source = loader.image_source(self.prepared, split, ("caption",))

        def read(index: Sequence[int]) -> list[Sequence[str]]:
            return [(caption,) for caption in source.batch(index)["caption"].tolist()]

        return Captions(np.arange(len(source) + 1), f"{self.hash}/{split}", read)


# --- collections ------------------------------------------------------------------------------


class _Chosen:
    """Some of `shards.Records`, by their numbers."""

    def __init__(self, records: shards.Records, index_N: np.ndarray):
        self._records, self._index_N = records, index_N

    def __len__(self) -> int:
        return len(self._index_N)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """See `shards.Records.read`; numbers are those of the choice."""
        wanted = self._index_N[np.asarray(indices, np.int64)]
        try:
            return self._records.read(wanted)
        except CorruptRecords as e:
            place = dict(zip(wanted.tolist(), map(int, indices)))
            raise CorruptRecords({place[i]: why for i, why in e.failures.items()}) from e


@dataclasses.dataclass(frozen=True, eq=False)
class Collected:
    """A prepared collection, or as much of it as a config takes; see `Dataset`.

    Attributes:
      shards: all of it.
      side: of square pictures.
      most: split to how many pictures are taken, evenly spaced; 0 is all.
    """

    shards: shards.Shards
    side: int
    most: dict[str, int]
    attribution: str = ""

    @property
    def hash(self) -> str:
        """See `Dataset`."""
        return self._hash({split: self.count(split) for split in shards.SPLITS})

    def hash_of(self, split: str) -> str:
        """See `Dataset`."""
        every = {other: self.shards.count(other) for other in shards.SPLITS}
        return self._hash({**every, split: self.count(split)})

    def _hash(self, counts: dict[str, int]) -> str:
        version = [] if transforms.VERSION == 1 else [transforms.VERSION]
        return files.sha256_of([self.shards.hash, list(counts.values()), *version])

    @property
    def about(self) -> str:
        """See `Dataset`."""
        return (
            f"{self.shards.manifest.get('source', self.shards.name)}: {self.count('train'):,} "
            f"pictures for training and {self.count('validation'):,} for validation."
        )

    @property
    def total(self) -> int:
        """See `Dataset`."""
        return sum(map(self.shards.count, shards.SPLITS))

    def count(self, split: str) -> int:
        """See `Dataset`."""
        return len(self._index(split))

    def _index(self, split: str) -> np.ndarray:
        have, most = self.shards.count(split), self.most[split]
        if not most or have <= most:
            return np.arange(have)
        return np.arange(most) * have // most

    def _records(self, split: str) -> _Chosen:
        return _Chosen(self.shards.records(split), self._index(split))

    def images(
        self, split: str, fields: Sequence[str], flip: bool = False, side: int | None = None
    ) -> Source:
        """See `Dataset`."""
        return PairSource(
            self._records(split), side or self.side, fields, flip,
            hash=f"{self.hash_of(split)}/{split}",
        )

    def bucketed(self, split: str, buckets: Buckets, at_least: int, flip: bool) -> Source:
        """See `Dataset`."""
        bucket_N = buckets.assign(self.shards.sizes(split)[self._index(split)], at_least)
        return PairSource(
            self._records(split), buckets, ("image",), flip, bucket_N,
            f"{self.hash_of(split)}/{split}",
        )

    def groups(self, split: str, index: Sequence[int]) -> np.ndarray:
        """See `Dataset`."""
        return np.asarray([record.group for record in self._records(split).read(index)], np.str_)

    def captions(self, split: str) -> Captions:
        """See `Dataset`. A picture without captions has the empty one."""
        records = self._records(split)
        counts_N = np.maximum(self.shards.captions(split)[self._index(split)], 1)

        def read(index: Sequence[int]) -> list[Sequence[str]]:
            try:
                return [record.captions or ("",) for record in records.read(index)]
            except CorruptRecords as e:
                raise UserError(
                    f"a caption cannot be read: {e}; remove {os.fspath(self.shards.path)} and "
                    "prepare it anew, or copy it again"
                ) from e

        return Captions(
            np.concatenate([[0], np.cumsum(counts_N)]), f"{self.hash_of(split)}/{split}", read
        )


# --- several ----------------------------------------------------------------------------------


def mixed(sources_: Sequence[Source], weights: Sequence[float]) -> Source | Mixture:
    """What a loader takes: the one source, or several by weights, by their sizes if none."""
    if len(sources_) == 1:
        return sources_[0]
    return Mixture(sources_, weights or [len(source) for source in sources_])


class Joined:
    """Several sources one after the other, for evaluation; their arrays have the same names."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = list(parts)
        self._starts_N = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts_N[-1])

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See `Source.batch`."""
        index_N = np.asarray(indices, np.int64)
        part_N = np.searchsorted(self._starts_N, index_N, side="right") - 1
        found: dict[str, list] = {}
        for part in np.unique(part_N).tolist():
            places = np.flatnonzero(part_N == part)
            own = None if keys is None else keys[places]
            arrays = self._parts[part].batch(index_N[places] - self._starts_N[part], own)
            for name, array in arrays.items():
                found.setdefault(name, []).append((places, array))
        order = {k: np.concatenate([places for places, _ in v]) for k, v in found.items()}
        return {
            k: np.concatenate([array for _, array in v])[np.argsort(order[k])]
            for k, v in found.items()
        }
