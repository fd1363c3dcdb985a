"""The order of examples: which example of which source stands where in which batch.

A *stream* is a source, or a bucket of one: examples that may share a batch. It is shuffled and
repeated with epochs of its own: places k n .. (k + 1) n - 1 of a stream of n examples are a
permutation, another for each k. Streams are interleaved by whole numbers, so that everything here
is a pure function of the seed and the position and can be asked for in any order; nothing is kept
but a bucket's members.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import grain
import numpy as np

from ldm_scaling.data.loading import draws
from ldm_scaling.errors import UserError

# Streams of fewer examples are shuffled by a table. grain's shuffle of n numbers permutes a fixed
# block and walks on until it is below n: 3 us an index for a million, 5 ms for five.
SMALL = 8_192
_WHOLE = -1  # the bucket of a source without buckets
Size = tuple[int, int]


def turn(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which of several takes a position, and how many positions it took before.

    The first of m takes every position at which round(n (W - w_0) / W), the number that are left to
    the others after n, does not grow; the others share those in the same way. After any n the count
    of each is within (1 + 1/1 + ... + 1/(m - 1)) / 2 of its share, n w / W, if the weights fall:
    within 1 for two.

    Args:
      position: from 0.
      weights: whole numbers above 0, the largest first.
    """
    before, after, left = position, position + 1, sum(weights)
    for i, weight in enumerate(weights[:-1]):
        others = left - weight
        others_before = (2 * before * others + left) // (2 * left)
        others_after = (2 * after * others + left) // (2 * left)
        if others_before == others_after:
            return i, before - others_before
        before, after, left = others_before, others_after, others
    return len(weights) - 1, before


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Examples of one source that may share a batch.

    Attributes:
      source: its number.
      seed: of the shuffle, 32 bits.
      count: of examples.
      epoch_size: how many of them an epoch shows, `count` unless a remainder is dropped.
      members: their indices, None for 0..count-1.
    """

    source: int
    seed: int
    count: int
    epoch_size: int
    members: np.ndarray | None = None

    def example(self, place: int) -> tuple[int, int]:
        """(epoch, index) of a place."""
        epoch, place = divmod(place, self.epoch_size)
        seed = (self.seed + epoch) % 2**32
        if self.count < SMALL:
            return epoch, self._index(int(_table(self.count, seed)[place]))
        # As MapDataset.shuffle. It computes an index at a time: no permutation is held.
        return epoch, self._index(grain.experimental.index_shuffle(place, self.count - 1, seed, 4))

    def another(self, key: int, attempt: int) -> int:
        """An example in place of one that cannot be read."""
        return self._index(int(draws.mixed(np.uint64(key), attempt)) % self.count)

    def _index(self, member: int) -> int:
        return member if self.members is None else int(self.members[member])


class Examples(NamedTuple):
    """Part of a batch, all from streams of one bucket.

    Attributes:
      streams: one for each source, by its number; None where the source has none in this bucket.
      sources_B: the source of each example.
      epochs_B: the epoch of its stream.
      indices_B: its index in the source.
    """

    streams: tuple[Stream | None, ...]
    sources_B: np.ndarray
    epochs_B: np.ndarray
    indices_B: np.ndarray


class Order:
    """The order of all batches of a run.

    Args:
      counts: examples of each source.
      weights: of each source, above 0; their ratio is what the batches hold.
      batch_size: of all hosts together.
      seed: of the run.
      buckets: for each source None, or the bucket of each example, whole numbers from 0, (N,); all
        sources number the same `sizes`.
      sizes: (height, width) of the buckets.
      drop_remainder: an epoch is a whole number of batches; for one source.

    Raises:
      UserError: a batch that is larger than what there is to fill it.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[Fraction], batch_size: int, seed: int,
        buckets: Sequence[np.ndarray | None], sizes: Sequence[Size] = (),
        drop_remainder: bool = False,
    ):
        if drop_remainder and len(counts) > 1:
            raise ValueError("the epochs of a mixture's sources end at different steps")
        self._size = batch_size
        self._streams: dict[int, tuple[Stream | None, ...]] = {}
        if not all(counts):
            raise UserError(
                f"a batch of {batch_size} is larger than a source of 0 examples: leave it out"
            )
        members = [_members(n, b) for n, b in zip(counts, buckets)]
        # A stream's weight: of its source, times its part of the source.
        parts: dict[int, dict[int, Fraction]] = {}
        for source, of_bucket in enumerate(members):
            for bucket, indices in of_bucket.items():
                n = counts[source] if indices is None else len(indices)
                parts.setdefault(bucket, {})[source] = weights[source] * n / counts[source]
        for bucket, of_source in sorted(parts.items()):
            streams: list[Stream | None] = [None] * len(counts)
            for source in of_source:
                indices = members[source][bucket]
                n = counts[source] if indices is None else len(indices)
                left = n % batch_size if drop_remainder else 0
                name = [] if len(counts) == 1 and indices is None else [source, bucket]
                streams[source] = Stream(source, _seed(seed, *name), n, max(n - left, 1), indices)
            self._streams[bucket] = tuple(streams)
            total = sum(stream.count for stream in streams if stream)
            if len(counts) == 1 and batch_size > total:
                what = (
                    "the data set" if bucket == _WHOLE
                    else "the bucket of {} x {} pixels".format(*sizes[bucket])
                )
                raise UserError(
                    f"a batch of {batch_size} is larger than {what} of {total} examples: "
                    "make the batch smaller or the data set larger"
                )
        self._buckets = _falling({b: sum(of.values()) for b, of in parts.items()})
        self._shares = {b: _falling(of) for b, of in parts.items()}

    def counts(self) -> dict[int, list[int]]:
        """Examples of each source in each bucket; bucket -1 is that of sources without buckets."""
        return {b: [s.count if s else 0 for s in of] for b, of in self._streams.items()}

    def examples(self, step: int, own: slice) -> Examples:
        """The examples `own` of batch `step`, counted from 0."""
        which, number = turn(step, self._buckets.weights)
        bucket = self._buckets.names[which]
        streams, shares = self._streams[bucket], self._shares[bucket]
        rows = []
        for position in range(number * self._size, (number + 1) * self._size)[own]:
            which, place = turn(position, shares.weights)
            source = shares.names[which]
            rows.append((source, *streams[source].example(place)))
        return Examples(streams, *np.asarray(rows, np.int64).reshape(-1, 3).T)


@functools.lru_cache(maxsize=256)
def _table(count: int, seed: int) -> np.ndarray:
    keys = draws.mixed(np.uint64(draws.seed_of("shuffle", seed)), np.arange(count))
    return np.argsort(keys, kind="stable").astype(np.int32)


class _Shares(NamedTuple):
    names: tuple[int, ...]
    weights: tuple[int, ...]


def _falling(parts: dict[int, Fraction]) -> _Shares:
    """Weights as whole numbers of the same ratio, the largest first."""
    scale = functools.reduce(math.lcm, (part.denominator for part in parts.values()))
    ordered = sorted(parts, key=lambda name: (-parts[name], name))
    whole = [int(parts[name] * scale) for name in ordered]
    divisor = math.gcd(*whole)
    return _Shares(tuple(ordered), tuple(weight // divisor for weight in whole))


def _members(count: int, bucket_N: np.ndarray | None) -> dict[int, np.ndarray | None]:
    if bucket_N is None:
        return {_WHOLE: None}
    # Four bytes an example, where they do.
    kind = np.uint32 if count <= 2**32 else np.uint64
    order = np.argsort(bucket_N, kind="stable").astype(kind)
    found, starts = np.unique(bucket_N[order], return_index=True)
    return {int(b): part for b, part in zip(found, np.split(order, starts[1:]))}


def _seed(*parts: int) -> int:
    """32 bits: the epoch is added to it, and seeds 0 and 1 must not share epochs."""
    text = " ".join(["order", *map(str, parts)]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
