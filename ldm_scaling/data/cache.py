"""Caches of arrays of fixed shape, one record an example: text states, latents.

A cache is one ArrayRecord file, or a folder of them:

    cache.json                                schema, counts, meta with its hash, statistics
    shard-00000-of-00012.array_record, ...    each a whole cache of one file

Record i holds the bytes of example i's arrays, one after the other; a last record says in JSON how
many there are, their names, types and shapes, and whatever the writer noted. ArrayRecord keeps a
hash of every block and checks it on reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling.data import array_records
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.open_files import Readers
from ldm_scaling.errors import UserError, first_line

MANIFEST = "cache.json"
MANIFEST_FORMAT = "ldm_scaling cache of shards 1"
_FORMAT = "ldm_scaling cache 1"
# One record a block: random access reads no more than it needs.
_WRITING = {False: "group_size:1,uncompressed", True: "group_size:1,zstd:1"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of each record.

    Attributes:
      name: its key.
      dtype: numpy's name, e.g. "float16".
      shape: without a batch axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def fields_of(schema: Iterable[Mapping[str, Any]]) -> tuple[Field, ...]:
    """The fields that a note's or a manifest's `schema` lists."""
    return tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in schema)


# --- writing ----------------------------------------------------------------------------------


def rows(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The single examples of batched arrays, in order: what `write` takes."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: array[i] for name, array in batch.items()}


def write(
    path: epath.PathLike,
    arrays: Iterable[Mapping[str, np.ndarray]],
    meta: Mapping[str, Any] | None = None,
    compress: bool = False,
) -> int:
    """Writes one record for each item of `arrays`, whole or not at all; returns their number.

    Args:
      path: the file to make, on a local file system.
      arrays: dicts of the same names, types and shapes, example 0 first.
      meta: plain JSON, given back by `CacheSource.meta`; its "hash" is what `CacheSource`
        compares.
      compress: by zstd. Latents lose 2 to 7% of their bytes by it, text states with zeros at the
        padding that share; reading takes two to four times as long.

    Raises:
      UserError: the file cannot be written.
      ValueError: no items, or items that differ in names, types or shapes.
    """
    batches = ({name: np.asarray(v)[None] for name, v in item.items()} for item in arrays)
    return write_file(path, batches, {"meta": dict(meta or {})}, compress)


def write_file(
    path: epath.PathLike,
    batches: Iterable[Mapping[str, np.ndarray]],
    note: Mapping[str, Any],
    compress: bool = False,
) -> int:
    """As `write`, of arrays with a batch axis.

    Args:
      path, compress: see `write`.
      batches: dicts of stacked arrays.
      note: `meta`, and what else the last record shall say. It is read when the batches are
        through, so they may fill it in.
    """
    fields: tuple[Field, ...] = ()
    count = 0
    with array_records.writing(path, _WRITING[compress]) as put:
        for batch in batches:
            found = tuple(Field(k, str(v.dtype), v.shape[1:]) for k, v in batch.items())
            fields = fields or _plain(found)
            if found != fields:
                raise ValueError(f"item {count} is {found}; the items before are {fields}")
            for record in _records(batch):
                put(record)
                count += 1
        if not count:
            raise ValueError(f"nothing to write into {os.fspath(path)}: no items were given")
        schema = [dataclasses.asdict(field) for field in fields]
        last = {**note, "format": _FORMAT, "count": count, "schema": schema}
        put(json.dumps(last, sort_keys=True).encode())
    return count


def _records(batch: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The bytes of each example of a batch."""
    lengths = {len(array) for array in batch.values()}
    if len(lengths) > 1:
        raise ValueError(f"a batch holds arrays of {sorted(lengths)} examples")
    (n,) = lengths
    parts = [np.ascontiguousarray(array).reshape(n, -1).view(np.uint8) for array in batch.values()]
    for row in np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]:
        yield row.tobytes()


def _plain(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    for field in fields:
        if np.dtype(field.dtype).kind not in "fiub":
            raise ValueError(f"array {field.name!r} is {field.dtype}: a cache holds plain numbers")
    if not fields:
        raise ValueError("the items of a cache need at least one array")
    return fields


# --- reading ----------------------------------------------------------------------------------


class CacheFile:
    """A cache of one file, opened and its end checked. Threads may share it.

    Attributes:
      path: of the file.
      note: what its last record says.
      count: records.
      fields: of each.

    Raises:
      UserError: the file is missing, damaged or cut short.
    """

    def __init__(self, path: epath.PathLike):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise UserError(f"the cache {self.path} does not exist: run the stage that makes it")
        try:
            self._reader, records = array_records.opened(self.path, array_records.RANDOM)
            note = json.loads(self._reader.read([records - 1])[0]) if records else {}
        except (RuntimeError, ValueError) as e:
            raise self._damaged(first_line(e)) from e
        if not isinstance(note, dict) or note.get("format") != _FORMAT:
            raise self._damaged("it has no end, or it is no cache")
        if note["count"] != records - 1:
            raise self._damaged(f"it has {records - 1} records instead of {note['count']}")
        self.note: dict[str, Any] = note
        self.count: int = note["count"]
        self.fields = fields_of(note["schema"])
        self._size = sum(field.size for field in self.fields)

    def read(self, index: int) -> bytes:
        """A record. Raises `UserError` when it is damaged."""
        try:
            # Of the reader's three ways the quickest, three to six times as quick as a list.
            (record,) = self._reader.read(index, index + 1)
        except (RuntimeError, ValueError) as e:
            raise self._damaged(first_line(e)) from e
        if len(record) != self._size:
            raise self._damaged(f"record {index} has {len(record)} bytes instead of {self._size}")
        return record

    def _damaged(self, how: str) -> UserError:
        return UserError(
            f"the cache {self.path} is damaged: {how}; remove it, and it is made anew"
        )


class CacheSource:
    """Random access to a cache; a source for `loader`. Threads may share it, and it pickles: a
    worker process opens its own files.

    Args:
      path: the file that `write` made, or the folder of `cache_shards.write_shards`.
      hash: where given, what the cache's meta must have as its "hash".

    Attributes:
      path: as given.
      meta: as the writer gave it.
      fields: the arrays of a record.
      statistics: of all records, where shards were written with some.

    Raises:
      UserError: the cache is missing, not finished, damaged, cut short, or of another hash.
    """

    def __init__(self, path: epath.PathLike, hash: str | None = None):
        self.path, self._hash = os.fspath(path), hash
        if os.path.isdir(self.path):
            note = _read_manifest(self.path)
            self._paths = [os.path.join(self.path, name) for name in note["shards"]]
            self._counts = list(note["shards"].values())
        else:
            file = CacheFile(self.path)
            note, self._paths, self._counts = file.note, [self.path], [file.count]
        self._files = Readers(self._checked)
        self._starts = np.cumsum([0, *self._counts])
        self.meta: dict[str, Any] = note["meta"]
        self.statistics: dict[str, Any] = note.get("statistics", {})
        self.fields = fields_of(note["schema"])
        if hash is not None and self.meta.get("hash") != hash:
            raise UserError(
                f"the cache {self.path} was made from something else (hash "
                f"{self.meta.get('hash')}, not {hash}): remove it, and it is made anew"
            )

    def __reduce__(self):
        return CacheSource, (self.path, self._hash)

    @property
    def hash(self) -> str | None:
        """The meta's, where the writer gave one."""
        return self.meta.get("hash")

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that hold the records, in order."""
        return tuple(self._paths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The records at `indices`, stacked along a new first axis.

        Args:
          indices: of records, in any order.
          keys: not looked at, for nothing is drawn here.

        Raises:
          IndexError: an index outside 0..len-1.
          CorruptRecords: naming all of these that are damaged.
          UserError: a file that is missing or damaged as a whole.
        """
        indices_N = np.asarray(indices, np.int64).reshape(-1)
        if ((indices_N < 0) | (indices_N >= len(self))).any():
            asked = indices_N.tolist()
            raise IndexError(f"{self.path} has records 0..{len(self) - 1}; asked for {asked}")
        n = len(indices_N)
        arrays = {f.name: np.empty((n, *f.shape), f.dtype) for f in self.fields}
        places = [
            (memoryview(arrays[f.name].reshape(-1).view(np.uint8)), f.size)
            for f in self.fields if f.size
        ]  # fmt: skip
        shard_N = np.searchsorted(self._starts, indices_N, side="right") - 1
        local = (indices_N - self._starts[shard_N]).tolist()
        shards, current, file = shard_N.tolist(), -1, None
        failures: dict[int, str] = {}
        for row in np.argsort(shard_N, kind="stable").tolist():
            if shards[row] != current:
                current = shards[row]
                file = self._files[current]
            try:
                record, start = memoryview(file.read(local[row])), 0
            except UserError as e:
                failures[int(indices_N[row])] = str(e)
                continue
            for place, size in places:
                place[row * size : (row + 1) * size] = record[start : start + size]
                start += size
        if failures:
            raise CorruptRecords(failures)
        return arrays

    def _checked(self, shard: int) -> CacheFile:
        file = CacheFile(self._paths[shard])
        have = (file.count, file.fields, file.note["meta"].get("hash"))
        if have != (self._counts[shard], self.fields, self.meta.get("hash")):
            raise UserError(
                f"{file.path} is not the shard that {os.path.join(self.path, MANIFEST)} lists: "
                f"remove the folder {self.path}, and it is made anew"
            )
        return file


def _read_manifest(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise UserError(
            f"the cache {folder} does not exist or is not finished (it has no {MANIFEST}): run the "
            "stage that makes it"
        )
    try:
        with open(path, encoding="utf-8") as file:
            note = json.load(file)
        if note["format"] != MANIFEST_FORMAT or note["count"] != sum(note["shards"].values()):
            raise ValueError(f"it is of the format {note['format']!r}, or its counts do not add up")
        fields_of(note["schema"])
        dict(note["meta"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is damaged: {first_line(e)}; remove it, and the stage that made it writes it "
            "anew"
        ) from e
    return note
