"""Caches of arrays of fixed shape, one record a picture: text states, latents.

One ArrayRecord file. Record i holds the bytes of picture i's arrays, one after the other; a last
record says in JSON how many there are, their names, types and shapes, and whatever the writer
noted. ArrayRecord keeps a hash of every block and checks it on reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError

_FORMAT = "ldm_scaling cache 1"
_WRITING = "group_size:1,zstd:1"  # one record a block: random access reads no more than it needs
_READING = "readahead_buffer_size:0,max_parallelism:0"  # for random access


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


def rows(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The single examples of batched arrays, in order: what `write` takes."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: array[i] for name, array in batch.items()}


def write(
    path: epath.PathLike,
    arrays: Iterable[Mapping[str, np.ndarray]],
    meta: Mapping[str, Any] | None = None,
) -> int:
    """Writes one record for each item of `arrays`, whole or not at all; returns their number.

    Args:
      path: the file to make, on a local file system.
      arrays: dicts of the same names, types and shapes, picture 0 first.
      meta: plain JSON, given back by `CacheSource.meta`; its "hash" is what `CacheSource` and
        `is_current` compare.

    Raises:
      UserError: the file cannot be written.
      ValueError: no items, or items that differ in names, types or shapes.
    """
    fields: tuple[Field, ...] = ()
    count = 0
    with files.atomic_path(path) as temporary:
        writer = _opened(temporary)
        try:
            for count, item in enumerate(arrays, 1):
                found = tuple(Field(k, str(v.dtype), tuple(v.shape)) for k, v in item.items())
                fields = fields or _plain(found)
                if found != fields:
                    raise ValueError(f"item {count - 1} is {found}; the items before are {fields}")
                record = b"".join(np.ascontiguousarray(v).tobytes() for v in item.values())
                _put(writer, record, path)
            if not count:
                raise ValueError(f"nothing to write into {os.fspath(path)}: no items were given")
            schema = [dataclasses.asdict(field) for field in fields]
            note = {"format": _FORMAT, "count": count, "schema": schema, "meta": dict(meta or {})}
            _put(writer, json.dumps(note, sort_keys=True).encode(), path)
        finally:
            _finish(writer, path)
    return count


def _opened(path: epath.Path) -> ArrayRecordWriter:
    writer = ArrayRecordWriter(os.fspath(path), _WRITING)
    if not writer.ok():
        raise OSError(f"no file can be made in {os.fspath(path.parent)}")
    return writer


def _put(writer: ArrayRecordWriter, record: bytes, path: epath.PathLike) -> None:
    try:
        writer.write(record)
    except RuntimeError as e:  # not around the loop: the items may raise their own
        raise UserError(f"cannot write {os.fspath(path)}: {_first_line(e)}") from e


def _finish(writer: ArrayRecordWriter, path: epath.PathLike) -> None:
    try:
        writer.close()
    except RuntimeError as e:
        raise UserError(f"cannot write {os.fspath(path)}: {_first_line(e)}") from e


def _plain(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    for field in fields:
        if np.dtype(field.dtype).kind not in "fiub":
            raise ValueError(f"array {field.name!r} is {field.dtype}: a cache holds plain numbers")
    if not fields:
        raise ValueError("the items of a cache need at least one array")
    return fields


def is_current(path: epath.PathLike, hash: str) -> bool:
    """Whether `path` is a whole cache with this hash; False where there is none or another's.

    Raises:
      UserError: the file is damaged.
    """
    return epath.Path(path).exists() and CacheSource(path).meta.get("hash") == hash


class CacheSource:
    """Random access to a cache; a source for `loader`. Threads may share it.

    Args:
      path: what `write` made.
      hash: where given, what the cache's meta must have as its "hash".

    Raises:
      UserError: the file is missing, damaged, cut short, or of another hash.
    """

    def __init__(self, path: epath.PathLike, hash: str | None = None):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise UserError(f"the cache {self.path} does not exist: run the stage that makes it")
        try:
            self._reader = ArrayRecordReader(self.path, _READING)
            records = self._reader.num_records() if self._reader.ok() else 0
            note = json.loads(self._reader.read([records - 1])[0]) if records else {}
        except (RuntimeError, ValueError) as e:
            raise self._damaged(_first_line(e)) from e
        if not isinstance(note, dict) or note.get("format") != _FORMAT:
            raise self._damaged("it has no end, or it is no cache")
        if note["count"] != records - 1:
            raise self._damaged(f"it has {records - 1} records instead of {note['count']}")
        self.meta: dict[str, Any] = note["meta"]
        self.fields = tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in note["schema"])
        self._count: int = note["count"]
        if hash is not None and self.meta.get("hash") != hash:
            raise UserError(
                f"the cache {self.path} was made from something else (hash "
                f"{self.meta.get('hash')}, not {hash}): remove it, and it is made anew"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return list(rows([self.batch(indices)])) if len(indices) else []

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The records at `indices`, stacked along a new first axis.

        Raises:
          IndexError: an index outside 0..len-1.
          UserError: a damaged record.
        """
        indices = [int(i) for i in indices]
        if any(not 0 <= i < self._count for i in indices):
            raise IndexError(f"{self.path} has records 0..{self._count - 1}; asked for {indices}")
        try:
            data = b"".join(self._reader.read(indices))
        except RuntimeError as e:
            raise self._damaged(_first_line(e)) from e
        size = sum(field.size for field in self.fields)
        if len(data) != size * len(indices):
            raise self._damaged(f"records of {len(data) // len(indices)} bytes instead of {size}")
        block = np.frombuffer(data, np.uint8).reshape(len(indices), size)
        arrays, start = {}, 0
        for field in self.fields:
            part = block[:, start : start + field.size].copy()
            arrays[field.name] = part.view(field.dtype).reshape(-1, *field.shape)
            start += field.size
        return arrays

    def _damaged(self, how: str) -> UserError:
        return UserError(f"the cache {self.path} is damaged: {how}; remove it, and it is made anew")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0][:120]
