"""From sources to batches: shuffled, mixed and shared out by hosts, read ahead by grain.

A pipeline is a grain `MapDataset` over batch numbers, each read whole by one thread or one worker
process: what is in a batch is a pure function of the seed and its number, see `order`, so that the
state of a loader is one number and the figures that it holds for.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from absl import flags

from ldm_scaling.data.composed.images import FIELDS, ImageSource, image_source
from ldm_scaling.data.loading import reader
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.order import Order
from ldm_scaling.data.loading.source import Source, buckets_of, hash_of, zip_sources
from ldm_scaling.errors import UserError

__all__ = [
    "FIELDS", "ImageSource", "Loader", "Mixture", "Source", "image_source", "train_loader",
    "zip_sources",
]

log = logging.getLogger(__name__)

_AHEAD = 8  # batches read before they are asked for
_ENDLESS = 2**62  # steps
_VERSION = 1  # of the order: another is another order
# A share of fewer examples than these says little: one in the first batch is no sign of many.
_JUDGED = 1_000
_LISTED = 10


class Loader(grain.DatasetIterator):
    """An endless iterator of a host's batches, dicts of numpy arrays; `train_loader` makes it.

    `get_state()` is a small dict of JSON, `set_state()` goes on from it exactly, on any number of
    hosts, threads and worker processes; `grain.checkpoint.CheckpointSave(iterator)` saves it with
    Orbax. `close()` ends what reads ahead; as a context manager the same.

    Attributes:
      corrupt: (source's number, index) to why, of examples that could not be read so far.
    """

    def __init__(
        self, read: reader.Reader, state: dict[str, Any], max_corrupt: float, threads: int,
        workers: int,
    ):
        super().__init__()
        self._reader, self._facts, self._max_corrupt = read, state, max_corrupt
        self._threads, self._workers = threads, workers
        self._step, self._batches, self._ended = 0, None, False
        self._read = np.zeros(len(read.sources), np.int64)
        self._failed = np.zeros(len(read.sources), np.int64)
        self.corrupt: dict[tuple[int, int], str] = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: more examples of a source are corrupt than may be, or as the source.
        """
        self.start_prefetch()
        try:
            arrays, note = next(self._batches)
        except RuntimeError as e:
            if not self._workers or "terminated unexpectedly" not in str(e):
                raise
            raise UserError(
                f"a worker process that reads data ended ({e.args[0].split('.')[0]}): it may have "
                "run out of memory or of /dev/shm; use fewer workers, or 0, which reads in threads"
            ) from e
        self._count(reader.Note.from_json(note))
        self._step += 1
        return arrays

    def start_prefetch(self) -> None:
        """Begins to read ahead. Raises `ValueError` after `close`."""
        if self._ended:
            raise ValueError("this loader was closed: make another")
        if self._batches is None:
            steps = grain.MapDataset.range(self._step, _ENDLESS)
            self._batches = iter(_read_ahead(steps.map(self._reader), self._threads, self._workers))
            # Whatever happens to this object: worker processes end before the interpreter does.
            self._end = weakref.finalize(self, self._batches.close)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to give the batch after the last one that was taken."""
        return {**self._facts, "step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
          UserError: naming both values where the batch size, the seed, the sources or their weights
            are others than the state's: the order of examples would be another.
        """
        for name, value in self._facts.items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint's data order has {name}={state.get(name)}, this run's has "
                    f"{name}={value}: set it back, or start anew in another --workdir"
                )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise UserError(f"the checkpoint's data order is at step {step!r}: it is damaged")
        self._stop()
        self._step = step

    def examples(self, state: dict[str, Any]) -> list[dict[str, int]]:
        """The whole batch that `set_state(state)` would give next, of all hosts, in order.

        Each example by its source's number, the epoch of its stream and its index in the source; a
        corrupt one's replacement is in the log of the host that read it.
        """
        step = state.get("step", state.get("next_index"))
        found = self._reader.order.examples(step, slice(None))
        columns = (found.sources_B, found.epochs_B, found.indices_B)
        return [
            {"source": source, "epoch": epoch, "index": index}
            for source, epoch, index in zip(*(column.tolist() for column in columns))
        ]

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        self._stop()
        self._ended = True

    def _stop(self) -> None:
        if self._batches is not None:
            self._end()
            self._batches = None

    def _count(self, note: reader.Note) -> None:
        self._read += note.read
        for source, index, why in note.failures:
            self._failed[source] += 1
            if (source, index) not in self.corrupt:
                self.corrupt[source, index] = why
                log.warning("left out a corrupt example, number %d of %s: %s", index,
                            self._name(source), why)
        for source in {failure.source for failure in note.failures}:
            read, failed = int(self._read[source]), int(self._failed[source])
            if note.hopeless or failed > self._max_corrupt * max(read, _JUDGED):
                raise UserError(self._too_many(source, read, failed))

    def _too_many(self, source: int, read: int, failed: int) -> str:
        listed = [why for (s, _), why in self.corrupt.items() if s == source]
        more = f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        return (
            f"{failed} of {read} examples read of {self._name(source)} are corrupt, more than the "
            f"share {self._max_corrupt:g} that may be: {'; '.join(listed[:_LISTED])}{more}; "
            "remove its folder and prepare it anew, or raise data.max_corrupt"
        )

    def _name(self, source: int) -> str:
        return "the data set" if len(self._read) == 1 else f"source {source}"


def train_loader(
    source: Source | Mixture,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    drop_remainder: bool = False,
    threads: int = 2,
    workers: int = 0,
    max_corrupt: float = 0.01,
) -> Loader:
    """An endless iterator of batches (dicts of numpy arrays), shuffled anew in each epoch.

    Batch k depends on the seed and k alone. With several hosts each gets an equal slice of it: put
    one after the other, they are the batch that a single host gets. A mixture's sources have epochs
    of their own, and so do the buckets of a source that has them: then each batch is of one bucket,
    and the buckets take turns in proportion to their sizes.

    An example that cannot be read is counted, named in the log and replaced by another, the same
    whatever the number of hosts and workers.

    Args:
      source: the examples, or several sources with weights.
      batch_size: of all hosts together.
      seed: of the order, and of what is random about examples.
      process_index: this host.
      process_count: number of hosts.
      drop_remainder: an epoch is a whole number of batches, and what is left over (other examples
        each time) is not seen in it. Otherwise batches run on across epochs, and every example is
        seen once an epoch. For a single source.
      threads: that read ahead; of each worker, where there are workers.
      workers: processes that read ahead, and give batches through shared memory; 0 reads in the
        threads of this process. For decoding in Python on several cores; sources must pickle.
      max_corrupt: share of a source's examples read on this host (of 1,000 at least) that may be
        corrupt; beyond it the iterator stops with the list.

    Raises:
      UserError: a batch that hosts cannot share equally or that is larger than the data set.
    """
    _check_batch(batch_size, process_index, process_count)
    if not 0 <= max_corrupt <= 1 or workers < 0 or threads < 0:
        raise UserError(
            f"max_corrupt={max_corrupt}, workers={workers}, threads={threads}: a share of 0 to 1, "
            "and numbers of 0 or more"
        )
    mixed = isinstance(source, Mixture)
    sources = tuple(source.sources) if mixed else (source,)
    weights = source.shares() if mixed else (Fraction(1),)
    sizes = _sizes(sources)
    order = Order(
        [len(s) for s in sources], weights, batch_size, seed, [buckets_of(s) for s in sources],
        sizes, drop_remainder,
    )
    own = _share(batch_size, process_index, process_count)
    facts = {
        "version": _VERSION,
        "batch_size": batch_size,
        "seed": seed,
        "drop_remainder": drop_remainder,
        "counts": [len(s) for s in sources],
        "hashes": [hash_of(s) or "" for s in sources],
        "weights": [str(weight) for weight in weights],
        "buckets": {
            "{}x{}".format(*sizes[bucket]): counts
            for bucket, counts in order.counts().items() if bucket >= 0
        },
    }
    return Loader(reader.Reader(sources, order, own, seed), facts, max_corrupt, threads, workers)


def _read_ahead(batches: grain.MapDataset, threads: int, workers: int = 0) -> grain.IterDataset:
    ahead = -(-_AHEAD // max(workers, 1)) if workers else _AHEAD
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    batches = batches.to_iter_dataset(options)
    if not workers:
        return batches
    if not flags.FLAGS.is_parsed():  # grain's workers ask for one, see google/grain issue 1355
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
        worker_init_fn=reader.start_worker,
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


def _sizes(sources: Sequence[Source]) -> tuple[tuple[int, int], ...]:
    """The table that the sources' buckets are numbered by; () where they have none."""
    tables = {s.sizes if buckets_of(s) is not None else () for s in sources}
    if len(tables) > 1:
        raise UserError(
            "the sources of a mixture have different buckets, or some have none: give all the same"
        )
    return tables.pop()
