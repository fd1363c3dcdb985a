"""What a loader reads from: random access to examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ldm_scaling.errors import UserError


class Source(Protocol):
    """Random access to examples; picklable where worker processes are to read it.

    A source may say more of itself: `hash` (str), a digest of its contents, and `sizes` with
    `bucket_N`, the table of its buckets and the bucket of each example, (N,).
    """

    def __len__(self) -> int:
        """Number of examples."""

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked; all of one bucket where there are buckets.

        Args:
          indices: from 0.
          keys: one uint64 for each, what is random about an example is drawn by; None where nothing
            is to be, in evaluation. A source that draws nothing takes no notice.
        Raises:
          CorruptRecords: naming all of these that cannot be read.
        """


class Zipped:
    """See `zip_sources`."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self.hash = ",".join(hash_of(source) or "" for source in sources).strip(",")
        bucketed = [source for source in sources if buckets_of(source) is not None]
        if len(bucketed) > 1:
            raise ValueError("two of the zipped sources have buckets")
        self.sizes = bucketed[0].sizes if bucketed else ()
        self.bucket_N = bucketed[0].bucket_N if bucketed else None

    def __len__(self) -> int:
        return len(self._sources[0])

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Example i of every source, in one dict."""
        arrays: dict[str, np.ndarray] = {}
        for source in self._sources:
            part = source.batch(indices, keys)
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
    return Zipped(sources)


def hash_of(source: Any) -> str | None:
    """A digest of a source's contents, where it has one."""
    return getattr(source, "hash", None) or None


def buckets_of(source: Any) -> np.ndarray | None:
    """The bucket of each example, where the source has buckets."""
    return getattr(source, "bucket_N", None)
