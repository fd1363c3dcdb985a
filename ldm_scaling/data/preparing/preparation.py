"""A preparation on disk: what was asked for, and its steps for one part, each done once.

In `.work` of the destination lie `begun.json` and for each part `facts-N.parquet`, `verdict-N.npz`
(why each row is dropped, and for what) and `written-N.npz` (its shards). Every file appears by
atomic rename, and a step whose file is there is not done again, so a run that is killed goes on
where it was; every step gives the same bytes whenever and wherever it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.data import shards
from ldm_scaling.data.collection import Collection, Pair, Part
from ldm_scaling.data.preparing import facts as facts_lib
from ldm_scaling.data.preparing import stored
from ldm_scaling.data.preparing.duplicates import Duplicates
from ldm_scaling.data.preparing.facts import Facts
from ldm_scaling.data.preparing.filters import KEPT, Filters
from ldm_scaling.data.record import Record
from ldm_scaling.data.shards import Shard
from ldm_scaling.errors import UserError

_FORMAT = "ldm_scaling preparation 1"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a collection is prepared.

    Attributes:
      name: of the data set: small letters, digits and `_`.
      filters: which pairs are kept.
      duplicates: which duplicates are removed.
      validation_share: of the groups, in the validation split, by hash of the group.
      salt: changes the split, the order and what `limit` takes.
      store_side: brings the short side of larger images down to so many pixels; None stores them
        as they are.
      tile: cuts images into tiles of so many pixels, side by side from the upper left, as PNG; the
        tiles of one lie in one split. Bounds on size are of the whole image.
      limit: keeps so many pairs, the first by hash of the key.
      skip_broken: leaves out a part that cannot be read to its end, instead of stopping.
      workers: processes, or threads where there are fewer parts; None is one for each core.
    """

    name: str = "pairs"
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    validation_share: float = 0.05
    salt: str = ""
    store_side: int | None = None
    tile: int | None = None
    limit: int | None = None
    skip_broken: bool = False
    workers: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(
                f"the data set's name {self.name!r} needs small letters, digits and _, a letter "
                "first"
            )
        if not 0 <= self.validation_share < 1:
            raise UserError(f"validation_share {self.validation_share} is outside 0 <= share < 1")
        for field in ("store_side", "tile", "limit", "workers"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}: give 1 or more, or leave it")
        if self.tile is not None and self.store_side is not None:
            raise UserError("store_side and tile are both set: tiles are stored as they are cut")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain JSON."""
        plain = dataclasses.asdict(self)
        del plain["workers"]
        return json.loads(json.dumps(plain))

    def order(self, key: str) -> str:
        """What records are sorted by within a shard, and limited by."""
        return hashlib.sha256(f"order {self.salt} {key}".encode()).hexdigest()[:32]

    def split(self, group: str) -> str:
        """The split that a group is in."""
        digest = hashlib.sha256(f"split {self.salt} {group}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return "validation" if share < self.validation_share else "train"


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What becomes of the rows of a part.

    Attributes:
      reason: number in `filters.REASONS` of why each is dropped, or `KEPT`; int8 [N].
      keeper: part and row of the better duplicate, or -1; int32 [N, 2].
    """

    reason: np.ndarray
    keeper: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
    """A preparation under way; `begin` gives one. Workers get it by pickle.

    Attributes:
      collection: what is prepared.
      path: the destination, on a file system that all workers share.
      options: how.
      parts: of the collection.
      fingerprint: of the collection.
    """

    collection: Collection
    path: epath.Path
    options: Options
    parts: tuple[Part, ...]
    fingerprint: str

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on with another's files."""
        return {
            "format": _FORMAT,
            "source": self.collection.name,
            "parts": len(self.parts),
            "fingerprint": self.fingerprint,
            "options": self.options.identity,
        }

    @property
    def work(self) -> epath.Path:
        """The folder of what is needed only until the end."""
        return self.path / ".work"

    def scan(self, i: int, threads: int = 1) -> int:
        """Finds out part i's facts unless they are there; returns how many rows were found anew."""
        if self._file("facts", i, "parquet").exists():
            return 0
        options = self.options
        found = facts_lib.scan(
            self.collection, self.parts[i], options.tile,
            options.duplicates.perceptual is not None, threads,
        )  # fmt: skip
        facts_lib.save(found, self._file("facts", i, "parquet"))
        return len(found)

    def facts(self, i: int) -> Facts:
        """Part i's facts."""
        return facts_lib.load(self._file("facts", i, "parquet"))

    def check_broken(self, numbers: Iterable[int]) -> None:
        """Raises `UserError` naming parts that cannot be read, unless they are to be left out."""
        broken = [why for i in numbers if (why := self.facts(i).broken)]
        if broken and not self.options.skip_broken:
            more = f" (and {len(broken) - 1} more parts like it)" if len(broken) > 1 else ""
            raise UserError(
                f"{broken[0]}{more}; mend it and remove {os.fspath(self.path)}, or leave such "
                "parts out by skip_broken in another folder"
            )

    def save_verdict(self, i: int, verdict: Verdict) -> None:
        """Keeps what becomes of part i's rows."""
        _save(self._file("verdict", i), reason=verdict.reason, keeper=verdict.keeper)

    def verdict(self, i: int) -> Verdict:
        """What becomes of part i's rows."""
        return Verdict(**_load(self._file("verdict", i)))

    def counts(self, i: int) -> dict[str, int]:
        """How many records of part i are kept in each split."""
        groups = self.facts(i)["group"][self.verdict(i).reason == KEPT]
        splits = collections.Counter(map(self.options.split, groups))
        return {split: splits[split] for split in shards.SPLITS}

    def shard_files(self, counts: Sequence[Mapping[str, int]]) -> list[dict[str, str]]:
        """The files of each part, by split; of the parts that have records in it."""
        named: list[dict[str, str]] = [{} for _ in counts]
        for split in shards.SPLITS:
            having = [i for i, count in enumerate(counts) if count[split]]
            for number, i in enumerate(having):
                named[i][split] = shards.shard_file(self.options.name, split, number, len(having))
        return named

    def write(self, i: int, named: Mapping[str, str], threads: int = 1) -> int:
        """Writes part i's shards unless they are there; returns how many records it wrote."""
        if self._is_written(i, named):
            return 0
        try:
            with tempfile.TemporaryFile(dir=os.fspath(self.work)) as spool:
                entries = list(self._spooled(i, spool, threads))
                written = {}
                for split, name in named.items():
                    chosen = [e for e in entries if self.options.split(e[1].group) == split]
                    chosen.sort(key=lambda entry: entry[0])
                    written[split] = shards.write_shard(
                        self.path / name, (_unspooled(spool, *entry[1:]) for entry in chosen)
                    )
        except OSError as e:
            where = f"the shards of {self.parts[i].name} into {os.fspath(self.path)}"
            raise UserError(f"cannot write {where}: {e.strerror or e}") from e
        arrays = {}
        for split, shard in written.items():
            arrays[f"{split}/of"] = np.array([shard.file, str(shard.bytes), shard.hash])
            for column in ("width", "height", "captions"):
                arrays[f"{split}/{column}"] = getattr(shard, column)
        _save(self._file("written", i), **arrays)
        return len(entries)

    def written(self, i: int) -> dict[str, Shard]:
        """Part i's shards, by split."""
        arrays = _load(self._file("written", i))
        out = {}
        for split in (name.removesuffix("/of") for name in arrays if name.endswith("/of")):
            file, length, digest = arrays[f"{split}/of"].tolist()
            columns = (arrays[f"{split}/{column}"] for column in ("width", "height", "captions"))
            out[split] = Shard(file, int(length), digest, *columns)
        return out

    def check_source(self) -> None:
        """Raises `UserError` when the collection's files changed since the beginning."""
        if self.collection.fingerprint() != self.fingerprint:
            raise self._changed()

    def finish(self) -> shards.Shards:
        """Makes the shards that are written a prepared data set."""
        self.check_source()
        written = [self.written(i) for i in range(len(self.parts))]
        splits = {split: [w[split] for w in written if split in w] for split in shards.SPLITS}
        plain = {key: self.identity[key] for key in ("source", "fingerprint", "options", "parts")}
        return shards.finish(self.path, self.options.name, splits, plain)

    def _is_written(self, i: int, named: Mapping[str, str]) -> bool:
        if not self._file("written", i).exists():
            return False
        written = self.written(i)
        return {split: shard.file for split, shard in written.items()} == dict(named) and all(
            (self.path / shard.file).exists()
            and (self.path / shard.file).stat().length == shard.bytes
            for shard in written.values()
        )

    def _spooled(self, i: int, spool: Any, threads: int) -> Iterator[tuple[str, Record, int, int]]:
        """Order, record without its image, and where in `spool` that is, of each kept row."""
        facts, reason = self.facts(i), self.verdict(i).reason
        rows: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
        for row in facts.table.take(np.flatnonzero(reason == KEPT)).to_pylist():
            rows[row["pair"]].append(row)

        def found() -> Iterator[tuple[Pair, list[dict[str, Any]]]]:
            if not rows:  # a part that is broken, or of which nothing is kept, is not read again
                return
            for number, pair in enumerate(facts_lib.iter_pairs(self.collection, self.parts[i])):
                if number in rows:
                    yield pair, rows.pop(number)
                    if not rows:
                        return

        work = functools.partial(_records, options=self.options)
        for records in facts_lib.in_order(work, found(), threads):
            if records is None:
                raise self._changed()
            for record in records:
                at = spool.tell()
                spool.write(record.image)
                bare = dataclasses.replace(record, image=b"")
                yield self.options.order(record.key), bare, at, len(record.image)
        if rows:
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(
            f"the files of {self.collection.name} changed while they were prepared: remove "
            f"{os.fspath(self.path)} and prepare them anew"
        )

    def _file(self, what: str, i: int, suffix: str = "npz") -> epath.Path:
        return self.work / f"{what}-{i:05d}.{suffix}"


def begin(
    collection: Collection, destination: epath.PathLike, options: Options
) -> tuple[Preparation, bool]:
    """A preparation that starts or goes on, and whether it is finished already.

    Raises `UserError` where the destination holds other files, or a preparation of other files or
    with other options, and `MissingPackageError` for what is not installed.
    """
    path = epath.Path(destination).expanduser()
    if "://" in os.fspath(destination):
        raise UserError(
            f"shards cannot be written to {os.fspath(destination)}: mount it as a folder"
        )
    facts_lib.check_packages(options.duplicates.perceptual is not None)
    parts = tuple(collection.parts())
    if not parts:
        raise UserError(f"there is nothing in {collection.name}: give a collection with images")
    job = Preparation(collection, path, options, parts, collection.fingerprint())
    manifest, begun = path / shards.MANIFEST, job.work / "begun.json"
    if manifest.exists():
        found = shards.open(path).manifest
        _compare(job, found)
        return job, True
    if begun.exists():
        try:
            found = json.loads(begun.read_text())
        except ValueError as e:
            raise UserError(f"{os.fspath(begun)} is damaged: remove {os.fspath(path)}") from e
        _compare(job, found)
        return job, False
    if path.exists():
        others = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"{os.fspath(path)} holds other files ({others[0]}): choose an empty folder"
            )
    files.atomic_write_text(begun, json.dumps(job.identity, indent=1))
    return job, False


def _compare(job: Preparation, found: Mapping[str, Any]) -> None:
    where, remedy = os.fspath(job.path), "remove it, or choose another folder"
    for what in ("source", "fingerprint", "parts"):
        if found.get(what) != job.identity[what]:
            how = {
                "source": f"is of {found.get('source')}, not of {job.collection.name}",
                "fingerprint": f"was made when the files of {job.collection.name} were others",
                "parts": f"was made of {found.get('parts')} parts, and there are {len(job.parts)}",
            }
            raise UserError(f"{where} {how[what]}: {remedy}")
    before, wanted = found.get("options", {}), job.options.identity
    for name in wanted:
        if before.get(name) != wanted[name]:
            raise UserError(
                f"{where} was begun with {name} {json.dumps(before.get(name))}, not "
                f"{json.dumps(wanted[name])}: {remedy}"
            )


def _records(item: tuple[Pair, list[dict[str, Any]]], options: Options) -> list[Record] | None:
    """The records of a pair's kept rows; None where the pair is another than was looked at."""
    pair, rows = item
    key = rows[0]["key"].removesuffix(rows[0]["tile"])
    if pair.key != key or len(pair.image) != rows[0]["bytes"]:
        return None
    captions = tuple(caption for caption in pair.captions if options.filters.keeps(caption))
    size = (rows[0]["source_width"], rows[0]["source_height"])
    stored_size = stored.reduced(*size, options.store_side)
    as_it_is = rows[0]["plain"] and options.tile is None and stored_size == size
    decoded = None if as_it_is else stored.decode(pair.image)
    out = []
    for row in rows:
        width, height = (row["width"], row["height"]) if options.tile else stored_size
        if decoded is None:
            image = pair.image
        elif options.tile:
            y, x = map(int, row["tile"][1:].split("_"))
            tile_HWC = decoded.image_HWC[y : y + height, x : x + width]
            image = stored.encode(tile_HWC, lossy=False)
        else:
            lossy = decoded.lossy and stored_size != size
            image = stored.encode(decoded.image_HWC, lossy, options.store_side)
        out.append(
            Record(
                row["key"], image, captions, row["group"], width, height, row["aesthetic"],
                row["watermark"],
            )
        )  # fmt: skip
    return out


def _unspooled(spool: Any, record: Record, at: int, length: int) -> Record:
    spool.seek(at)
    return dataclasses.replace(record, image=spool.read(length))


def _save(path: epath.Path, **arrays: np.ndarray) -> None:
    with files.atomic_path(path) as temporary, temporary.open("wb") as out:
        np.savez(out, **arrays)


def _load(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(os.fspath(path)) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as e:
        raise UserError(f"{os.fspath(path)} is damaged: remove it, and run again") from e
