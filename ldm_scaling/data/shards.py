"""Prepared data sets: ArrayRecord shards of images with captions, read in any order.

A prepared folder holds, for a data set NAME,

    NAME-train.array_record-00000-of-00012 ...   records, see `record`; one part's in each
    NAME-validation.array_record-...
    index_train.npz, index_validation.npz        width, height, captions (how many) of each record
    prepared.json                                what it was made from, counts and hashes
    dataset_info.json, features.json             with which TFDS reads the folder too

`prepare` makes it of a collection, `write` of records at hand. `prepared.json` is written last:
a folder without it is unfinished. `tfds.builder_from_directory(FOLDER).as_data_source("train")`
gives the same records, decoded, without TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from ldm_scaling import files
from ldm_scaling.data import array_records
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.open_files import Readers
from ldm_scaling.data.record import Record, features
from ldm_scaling.errors import UserError, first_line

SPLITS = ("train", "validation")
MANIFEST = "prepared.json"
_FORMAT = "ldm_scaling prepared 1"
# One record a block, for random access; images are compressed already, and are written six times
# faster as they are.
_WRITING = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """A shard that is written.

    Attributes:
      file: its name in the folder.
      bytes: the file's length.
      hash: of its records, in order.
      width, height, captions: of each record, int32 [N]; the last says how many there are.
    """

    file: str
    bytes: int
    hash: str
    width: np.ndarray
    height: np.ndarray
    captions: np.ndarray

    def __len__(self) -> int:
        return len(self.width)


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """A prepared data set; `open` gives one.

    Attributes:
      path: its folder.
      name: of the data set.
      hash: 16 hex digits that change with any byte of any record, and with their order.
      manifest: what `prepared.json` says.
    """

    path: epath.Path
    name: str
    hash: str
    manifest: dict[str, Any]
    _index: dict[str, dict[str, np.ndarray]]

    def count(self, split: str) -> int:
        """Records of a split, which may be none. Raises `UserError` for an unknown split."""
        return len(self._of(split)["width"])

    def sizes(self, split: str) -> np.ndarray:
        """(width, height) of each record's image in pixels, int32 [N, 2]."""
        index = self._of(split)
        return np.stack([index["width"], index["height"]], axis=1)

    def captions(self, split: str) -> np.ndarray:
        """How many captions each record has, int32 [N]."""
        return self._of(split)["captions"]

    def records(self, split: str) -> Records:
        """Random access to the records of a split."""
        self._of(split)
        shards = self.manifest["splits"][split]["shards"]
        paths = [os.fspath(self.path / shard["file"]) for shard in shards]
        return Records(paths, [shard["count"] for shard in shards])

    def _of(self, split: str) -> dict[str, np.ndarray]:
        if split not in self._index:
            raise UserError(f"{os.fspath(self.path)} has no split {split!r}: {', '.join(SPLITS)}")
        return self._index[split]


class Records:
    """Random access to the records in some shards, as one sequence; threads may share it.

    Readers are opened when they are first used, and anew in a process that it is sent to.

    Args:
      paths: of the shards.
      counts: how many records each has.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        self._paths = list(paths)
        self._counts = [int(count) for count in counts]
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._readers = Readers(lambda shard: _reader(self._paths[shard], self._counts[shard]))

    def __getstate__(self) -> tuple[list[str], list[int]]:
        return self._paths, self._counts

    def __setstate__(self, state: tuple[list[str], list[int]]) -> None:
        self.__init__(*state)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._counts else 0

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Record]:
        """The records of these numbers, in this order.

        Raises:
          CorruptRecords: some are damaged; it names all of them, and the others can be read.
          IndexError: a number outside 0..len-1.
          UserError: a shard is missing, or damaged as a whole.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"records are 0..{len(self) - 1}; asked for {wanted.tolist()}")
        found: list[Record | None] = [None] * len(wanted)
        failures: dict[int, str] = {}
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == shard)
            start = int(self._ends[shard]) - self._counts[shard]
            rows = (wanted[places] - start).tolist()
            for place, row, data in zip(places.tolist(), rows, self._bytes(shard, rows)):
                try:
                    if isinstance(data, RuntimeError):
                        raise ValueError(first_line(data)) from data
                    found[place] = Record.from_bytes(data)
                except ValueError as e:
                    where = f"record {row} of {self._paths[shard]}"
                    failures[start + row] = f"{where} is damaged: {e}"
        if failures:
            raise CorruptRecords(failures)
        return found

    def _bytes(self, shard: int, rows: list[int]) -> list[bytes | RuntimeError]:
        """The records' bytes, and in place of those that are damaged, the reader's error."""
        reader = self._readers[shard]
        try:
            return reader.read(rows)
        except RuntimeError:
            return [_read_one(reader, row) for row in rows]


def open(path: epath.PathLike) -> Shards:
    """The prepared data set in a folder.

    Raises `UserError` when there is none, when it is unfinished, or when a file of it is missing or
    of another length than it had.
    """
    path = epath.Path(path).expanduser()
    shown, remedy = os.fspath(path), "remove it and prepare it anew, or copy it again"
    if not (path / MANIFEST).exists():
        raise UserError(
            f"there is no prepared data set in {shown}: it has no {MANIFEST}; make one with "
            "`ldm-scaling prepare`"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise UserError(
                f"{shown} is of the format {manifest['format']!r}, and {_FORMAT!r} is read: "
                "remove it and prepare it anew"
            )
        index = {}
        for split in SPLITS:
            with np.load(os.fspath(path / _index_file(split))) as arrays:
                index[split] = {name: arrays[name] for name in ("width", "height", "captions")}
            entry = manifest["splits"][split]
            lengths = {len(array) for array in index[split].values()}
            if lengths != {entry["count"]} or entry["count"] != sum(
                shard["count"] for shard in entry["shards"]
            ):
                raise ValueError(f"{_index_file(split)} is not of {entry['count']} records")
            for shard in entry["shards"]:
                _check_length(path / shard["file"], shard["bytes"])
        return Shards(path, manifest["name"], manifest["hash"], manifest, index)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"the data set in {shown} is damaged: {first_line(e)}; {remedy}") from e


def write(
    path: epath.PathLike,
    splits: Mapping[str, Iterable[Record]],
    name: str = "pairs",
    note: Mapping[str, Any] | None = None,
) -> Shards:
    """Writes records at hand as a prepared data set, a shard for each split.

    Args:
      path: the folder to make.
      splits: the records of "train", and of "validation" if there are any.
      name: of the data set: small letters, digits and `_`.
      note: plain JSON, kept in the manifest.

    Raises `UserError` when a file cannot be written.
    """
    path = epath.Path(path).expanduser()
    written: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for split, records in splits.items():
        shard = write_shard(path / shard_file(name, split, 0, 1), records)
        if len(shard):
            written[split] = [shard]
        else:
            (path / shard.file).unlink()
    return finish(path, name, written, note or {})


def write_shard(path: epath.PathLike, records: Iterable[Record]) -> Shard:
    """Writes a shard, whole or not at all. Raises `UserError` when it cannot be written."""
    path, digest = epath.Path(path), hashlib.sha256()
    facts: list[tuple[int, int, int]] = []
    with array_records.writing(path, _WRITING) as put:
        for record in records:
            data = record.to_bytes()
            digest.update(len(data).to_bytes(8, "little") + data)
            facts.append((record.width, record.height, len(record.captions)))
            put(data)
    columns = np.array(facts, np.int32).reshape(-1, 3).T.copy()
    return Shard(path.name, path.stat().length, digest.hexdigest(), *columns)


def finish(
    path: epath.PathLike,
    name: str,
    splits: Mapping[str, Sequence[Shard]],
    note: Mapping[str, Any],
) -> Shards:
    """Makes the written shards of a folder a prepared data set, and opens it.

    Args:
      path: the folder.
      name: of the data set.
      splits: the shards of each split, in order.
      note: plain JSON, kept in the manifest; no part of the hash.
    """
    path = epath.Path(path)
    entries = {}
    for split in SPLITS:
        shards = list(splits.get(split, ()))
        with files.atomic_path(path / _index_file(split)) as temporary, temporary.open("wb") as out:
            np.savez(out, **{column: _column(shards, column) for column in _COLUMNS})
        entries[split] = {
            "count": sum(map(len, shards)),
            "hash": files.sha256_of([[len(shard), shard.hash] for shard in shards]),
            "shards": [
                {"file": s.file, "count": len(s), "bytes": s.bytes, "hash": s.hash} for s in shards
            ],
        }
    _write_tfds(path, name, entries)
    manifest = {
        "format": _FORMAT,
        "name": name,
        "hash": files.sha256_of([_FORMAT, [[s, entries[s]["hash"]] for s in SPLITS]]),
        "splits": entries,
        **note,
    }
    files.write_json(path / MANIFEST, manifest)
    return open(path)


def shard_file(name: str, split: str, number: int, of: int) -> str:
    """The name of a shard, as TFDS has them."""
    return f"{name}-{split}.array_record-{number:05d}-of-{of:05d}"


_COLUMNS = ("width", "height", "captions")


def _column(shards: Sequence[Shard], column: str) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32)] + [getattr(shard, column) for shard in shards])


def _write_tfds(path: epath.Path, name: str, entries: Mapping[str, Any]) -> None:
    """What TFDS needs to read the folder; files of TFDS's own, whose times say nothing."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=name, filetype_suffix="array_record"
    )
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["count"] for shard in entry["shards"]],
            num_bytes=sum(shard["bytes"] for shard in entry["shards"]),
            filename_template=template.replace(split=split),
        )
        for split, entry in entries.items() if entry["shards"]
    ]  # fmt: skip
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(path), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features(), description="Images with captions."
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    try:
        info.write_to_directory(path)
    except OSError as e:
        raise UserError(f"cannot write into {os.fspath(path)}: {e.strerror or e}") from e


def _reader(path: str, count: int) -> ArrayRecordReader:
    remedy = "remove its folder and prepare the data set anew, or copy the file again"
    if not os.path.isfile(path):
        raise UserError(f"the shard {path} is missing: {remedy}")
    try:
        reader, found = array_records.opened(path, array_records.RANDOM)
    except RuntimeError as e:
        raise UserError(f"the shard {path} is damaged: {first_line(e)}; {remedy}") from e
    if found != count:
        raise UserError(
            f"the shard {path} is damaged: it has {found} records instead of {count}; {remedy}"
        )
    return reader


def _read_one(reader: ArrayRecordReader, row: int) -> bytes | RuntimeError:
    try:
        return reader.read([row])[0]
    except RuntimeError as e:
        return e


def _check_length(path: epath.Path, length: int) -> None:
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    if path.stat().length != length:
        raise ValueError(f"{path.name} has {path.stat().length} bytes instead of {length}")


def _index_file(split: str) -> str:
    return f"index_{split}.npz"
