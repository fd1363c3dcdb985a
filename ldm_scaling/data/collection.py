"""Collections of image-text pairs as they are found: what every reader in `sources` gives.

A collection is a list of *parts* (a tar, a row group, some files of a folder), in a fixed order,
each small enough to be read, examined and written by one worker. `prepare` turns it into shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

# The numeric columns that are kept, under any of the names that img2dataset's users have for them.
SCORES = {
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics_score", "AESTHETIC_SCORE"),
    "watermark": ("watermark", "pwatermark", "watermark_score", "WATERMARK"),
}
# Columns that hold captions, the first that is there; each holds texts, in a list or alone.
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "TEXT", "prompt", "description")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image with its captions, as found.

    Attributes:
      key: its name, once in a collection and the same in every reading.
      image: the bytes of its file; empty where `error` says why there are none.
      captions: none or several, Unicode, stripped, without empty ones.
      group: what must not lie in both splits (a subject, a photograph); the key if empty.
      scores: name in `SCORES` to its number, where the collection has it.
      error: why this pair cannot be used: a file that is missing, a caption in an unknown encoding.
    """

    key: str
    image: bytes
    captions: tuple[str, ...] = ()
    group: str = ""
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""

    def score(self, name: str) -> float:
        """A score, NaN where the collection has none."""
        return self.scores.get(name, math.nan)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a collection, small to send to a worker.

    Attributes:
      name: of the part in messages, once in a collection.
      path: of the file or folder that it is in.
      start, stop: which of its rows, files or records; `stop` None is the end.
      fingerprint: hash of all that decides its pairs, where its files are known by themselves: a
        preparation that goes on examines those parts anew that have another. Empty: it goes on
        only while the whole collection's is the same.
    """

    name: str
    path: str
    start: int = 0
    stop: int | None = None
    fingerprint: str = ""


class Collection(Protocol):
    """A collection of pairs; picklable, so that workers may read its parts.

    Four methods more are used where there are such: `share(part)` gives a collection that reads
    that part alone, for a process that would list everything to do so; `left_out()` how many files
    are not read, by suffix; `holds(place)` whether what is written in a folder would be taken for
    its own; `groups()` the groups of all pairs that it may have, where names alone tell them.
    """

    name: str
    """KIND:PATH, as it is asked for."""

    def parts(self) -> Sequence[Part]:
        """Its parts, in order; the same in every call while the files are.

        Raises `UserError` for a path that is missing or holds nothing of the kind.
        """

    def read(self, part: Part) -> Iterator[Pair]:
        """The pairs of a part, in order.

        What is wrong with a single pair is its `error`. Raises `UserError` naming the file for what
        is wrong with a whole part: a broken tar, a parquet file without the columns.
        """

    def fingerprint(self) -> str:
        """Hash of the names, sizes and times of change of its files, and of how they are read.

        The same hash stands for the same parts and pairs. Raises `UserError` as `parts`.
        """
