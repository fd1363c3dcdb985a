"""A study's pictures and captions, prepared: composed ones, or collections turned into shards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Data
from ldm_scaling.data import shards, sources
from ldm_scaling.data.composed import builder, openmoji
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import loader, sides
from ldm_scaling.data.loading.buckets import Buckets
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.data.loading.transforms import PairSource
from ldm_scaling.data.preparing import prepare
from ldm_scaling.data.record import Record
from ldm_scaling.errors import UserError

# A source of this kind is prepared already, and used where it lies.
SHARDS = "shards"


class Dataset(Protocol):
    """One source of pairs, prepared.

    Attributes:
      hash: of all pictures and captions.
      about: what it is, in a sentence of a report.
      attribution: what its licence wants said; empty where that is not known.
    """

    hash: str
    about: str
    attribution: str

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

    def first(self, index: Sequence[int]) -> list[str]:
        """The first caption of pictures."""
        return [captions[0] for captions in self.read(index)]

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

    @property
    def about(self) -> str:
        """See `Dataset`."""
        spec = self.prepared.builder.spec
        return (
            f"OpenMoji pictograms composed into {spec.side} x {spec.side} pictures with captions "
            f"that are true by construction: {spec.train:,} for training and "
            f"{spec.validation:,} for validation, which share no concept."
        )

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
        return files.sha256_of([self.shards.hash, [self.count(s) for s in shards.SPLITS]])

    @property
    def about(self) -> str:
        """See `Dataset`."""
        return (
            f"{self.shards.manifest.get('source', self.shards.name)}: {self.count('train'):,} "
            f"pictures for training and {self.count('validation'):,} for validation."
        )

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
            self._records(split), side or self.side, fields, flip, hash=f"{self.hash}/{split}"
        )

    def bucketed(self, split: str, buckets: Buckets, at_least: int, flip: bool) -> Source:
        """See `Dataset`."""
        bucket_N = buckets.assign(self.shards.sizes(split)[self._index(split)], at_least)
        return PairSource(
            self._records(split), buckets, ("image",), flip, bucket_N, f"{self.hash}/{split}"
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
            np.concatenate([[0], np.cumsum(counts_N)]), f"{self.hash}/{split}", read
        )


# --- from a config ----------------------------------------------------------------------------


def _is_shards(source: str) -> bool:
    return source.startswith(f"{SHARDS}:")


def resolved(data: Data, root: epath.PathLike) -> Data:
    """The settings with the hash of prepared shards, where all sources are such.

    Args:
      data: the settings.
      root: where collections are prepared; those that are need no longer be there themselves.
    Raises:
      UserError: for shards that are missing or damaged, or of another hash than is wanted, and for
        a collection that is not there.
    """
    if data.composed:
        return data
    raw = [source for source in data.sources if not _is_shards(source)]
    for source in raw:
        if not _prepared(folder_of(data, source, root)):
            sources.collection(source, source_options(data))
    if raw and data.hash:
        raise UserError(
            f"config: data.hash={data.hash!r} is of prepared shards, but data.source="
            f"{data.source!r} is prepared by this study: leave out the hash"
        )
    if raw:
        return data
    found = [shards.open(source.partition(":")[2]).hash for source in data.sources]
    have = found[0] if len(found) == 1 else files.sha256_of(found)
    if data.hash not in ("", have):
        raise UserError(
            f"the shards {data.source} have the hash {have}, but the config wants those of "
            f"{data.hash}: restore them, or leave out data.hash and choose another --workdir"
        )
    return dataclasses.replace(data, hash=have)


def _prepared(folder: epath.Path) -> bool:
    return (folder / shards.MANIFEST).exists()


def source_options(data: Data) -> sources.Options:
    """How the files of a collection are read."""
    p = data.prepare
    columns = {"aesthetic": p.aesthetic_column, "watermark": p.watermark_column}
    return sources.Options(
        caption_columns=p.caption_columns, caption_encoding=p.caption_encoding,
        score_columns={k: v for k, v in columns.items() if v}, captions=p.captions,
    )


def prepare_options(data: Data) -> prepare.Options:
    """How a collection becomes shards."""
    p = data.prepare
    return prepare.Options(
        filters=prepare.Filters(
            min_side=(data.side if p.min_side == -1 else p.min_side) or None,
            max_aspect=p.max_aspect or None,
            max_pixels=p.max_pixels or None,
            min_caption=p.min_caption,
            max_caption=p.max_caption or None,
            captions=p.captions,
            min_aesthetic=p.min_aesthetic or None,
            max_watermark=None if p.max_watermark >= 1 else p.max_watermark,
        ),
        duplicates=prepare.Duplicates(p.exact, None if p.perceptual < 0 else p.perceptual),
        validation_share=p.validation_share,
        salt=str(data.seed) if data.seed else "",
        store_side=p.store_side or None,
        tile=p.tile or None,
        limit=p.limit or None,
        skip_broken=p.skip_broken,
    )


def folder_of(data: Data, source: str, root: epath.PathLike) -> epath.Path:
    """Where a source's shards lie: its own folder, or one below `root`."""
    if _is_shards(source):
        return epath.Path(source.partition(":")[2]).expanduser()
    kind = source.partition(":")[0]
    name = files.sha256_of([source, dataclasses.asdict(data.prepare), data.seed, data.side])
    return epath.Path(root) / f"{kind}_{name[:8]}"


def make(
    data: Data, source: str, root: epath.PathLike, runner: str | None = None,
    pipeline_options: Sequence[str] = (),
) -> shards.Shards:
    """The shards of one source, made below `root` or found.

    Args:
      data: how.
      source: KIND:PATH.
      root: see `resolved`.
      runner, pipeline_options: see `prepare.run`.
    """
    folder = folder_of(data, source, root)
    if _is_shards(source) or _prepared(folder):
        return shards.open(folder)
    return prepare_into(data, source, folder, runner, pipeline_options)


def prepare_into(
    data: Data, source: str, folder: epath.PathLike, runner: str | None = None,
    pipeline_options: Sequence[str] = (),
) -> shards.Shards:
    """A collection's shards in a folder: made, gone on with, or found, see `prepare.run`."""
    collection = sources.collection(source, source_options(data))
    options = prepare_options(data)
    if source.startswith("photos:"):  # None has a caption.
        filters = dataclasses.replace(options.filters, captions=False)
        options = dataclasses.replace(options, filters=filters)
    return prepare.run(collection, folder, options, runner, pipeline_options)


def of(data: Data, root: epath.PathLike) -> tuple[Dataset, ...]:
    """The data sets of a config, made below `root` if need be.

    Raises:
      UserError: for data that cannot be read or prepared.
      MissingPackageError: for a package that a source needs.
    """
    if data.composed:
        spec = builder.ComposedSpec(
            data.side, data.train_pictures, data.validation_pictures, data.seed
        )
        return (Composed(builder.prepare(root, spec)),)
    most = {"train": data.train_pictures, "validation": data.validation_pictures}
    return tuple(
        Collected(make(data, source, root), data.side, most)
        for source in data.sources
    )


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
