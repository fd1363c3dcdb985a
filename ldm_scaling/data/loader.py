"""From records to batches: sources with random access, shuffled and sharded by grain.

A *source* has a length and `batch(indices) -> dict of stacked arrays`. A pipeline is a grain
`MapDataset` over batch numbers, each read whole by one thread: the order is a pure function of the
seed and the step, so its state is one number.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ldm_scaling.data import builder as builder_lib
from ldm_scaling.errors import UserError

FIELDS = ("image", "caption", "concept", "index")
_AHEAD = 8  # batches read before they are asked for
_ENDLESS = 2**62  # steps


class Source(Protocol):
    """Random access to examples of equal shapes."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked."""


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
            raise self._damaged(e) from e
        self._count = prepared.builder.spec.count(split)
        if found != self._count:
            raise self._damaged(f"it has {found} records instead of {self._count}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked.

        Raises:
          IndexError: an index outside 0..len-1.
          UserError: a damaged record.
        """
        indices = [int(i) for i in indices]
        if any(not 0 <= i < self._count for i in indices):
            raise IndexError(f"{self._where} has 0..{self._count - 1}; asked for {indices}")
        try:
            records = self._records.__getitems__(indices)
            return {name: _column(name, records) for name in self._fields}
        except (RuntimeError, OSError, ValueError, SyntaxError) as e:  # PIL: broken PNG
            raise self._damaged(e) from e

    def _damaged(self, how: Exception | str) -> UserError:
        first = str(how).split("\n", maxsplit=1)[0][:120]
        return UserError(f"{self._where} is damaged: {first}; {self._remedy}")


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


class _Zipped:
    def __init__(self, sources: Sequence[Source]):
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources[0])

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for source in self._sources:
            part = source.batch(indices)
            if twice := sorted(arrays.keys() & part.keys()):
                raise ValueError(f"two sources give {twice}")
            arrays |= part
        return arrays


def zip_sources(*sources: Source) -> Source:
    """Example i of every source, in one dict; their names must differ.

    Raises:
      UserError: sources of different lengths, or none.
    """
    lengths = [len(source) for source in sources]
    if len(set(lengths)) != 1:
        raise UserError(
            f"the sources have {lengths} examples and must have the same number: "
            "remove the caches of the data set, and they are made anew"
        )
    return _Zipped(sources)


def train_loader(
    source: Source,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    drop_remainder: bool = False,
    threads: int = 2,
) -> grain.DatasetIterator:
    """An endless iterator of batches (dicts of numpy arrays), shuffled anew in each epoch.

    Batch k depends on the seed and k alone. With several hosts each gets an equal slice of it: put
    one after the other, they are the batch that a single host gets. The iterator is grain's:
    `get_state()` is a small dict of JSON, `set_state()` goes on from it exactly, and
    `grain.checkpoint.CheckpointSave(iterator)` saves it with Orbax. `close()` ends its threads.

    Args:
      source: the examples.
      batch_size: of all hosts together.
      seed: of the order.
      process_index: this host.
      process_count: number of hosts.
      drop_remainder: an epoch is a whole number of batches, and what is left over (other examples
        each time) is not seen in it. Otherwise batches run on across epochs, and every example is
        seen once an epoch.
      threads: that read ahead.

    Raises:
      UserError: a batch that hosts cannot share equally or that is larger than the data set.
    """
    count = len(source)
    _check_batch(batch_size, process_index, process_count)
    if batch_size > count:
        raise UserError(
            f"a batch of {batch_size} is larger than the data set of {count} examples: "
            "make the batch smaller or the data set larger"
        )
    order = grain.MapDataset.range(count).shuffle(seed=_mixed(seed))  # another in each epoch
    epoch_size = count - count % batch_size if drop_remainder else count
    own = _share(batch_size, process_index, process_count)

    def read(step: int) -> dict[str, np.ndarray]:
        positions = range(step * batch_size, (step + 1) * batch_size)[own]
        epochs_and_places = (divmod(position, epoch_size) for position in positions)
        return source.batch([order[epoch * count + place] for epoch, place in epochs_and_places])

    return iter(_read_ahead(grain.MapDataset.range(_ENDLESS).map(read), threads))


def eval_batches(
    source: Source,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, in batches of one shape.

    The last batch is filled up with the last example; "mask" (bool, (B,)) is False there. Hosts
    share batches as in `train_loader`.

    Raises:
      UserError: a batch that hosts cannot share equally, or an empty source.
    """
    count = len(source)
    _check_batch(batch_size, process_index, process_count)
    if not count:
        raise UserError("there are no examples to evaluate on: make the data set's split larger")
    own = _share(batch_size, process_index, process_count)

    def read(k: int) -> dict[str, np.ndarray]:
        positions = np.arange(k * batch_size, (k + 1) * batch_size)[own]
        return {**source.batch(np.minimum(positions, count - 1)), "mask": positions < count}

    return _all_of(_read_ahead(grain.MapDataset.range(-(-count // batch_size)).map(read), threads))


def _all_of(batches: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _read_ahead(batches: grain.MapDataset, threads: int) -> grain.IterDataset:
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD)
    )


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"host {process_index} of {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} cannot be shared equally by {process_count} hosts: "
            "use a positive multiple"
        )


def _mixed(seed: int) -> int:
    """32 bits: grain adds the epoch to its seed, and seeds 0 and 1 must not share epochs."""
    return int.from_bytes(hashlib.sha256(f"order {seed}".encode()).digest()[:4], "big")
