"""A preparation on disk: what was asked for, and its steps for one part, each done once.

In `.work` of the destination lie `begun.json` and for each part `facts-N.parquet`, `verdict-N.npz`
(why each row is dropped, and for what) and `written-N.npz` (its shards). Every file appears by
atomic rename, and a step whose file is there is not done again, so a run that is killed goes on
where it was; every step gives the same bytes whenever and wherever it runs.

Where a part's files are its own (`Part.fingerprint`), its facts are named by them: a tar that is
mended, added or taken out in between costs no other's facts. A part that could not be read is tried
again by the next run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.data import shards, sources
from ldm_scaling.data.collection import Collection, Pair, Part
from ldm_scaling.data.preparing import facts as facts_lib
from ldm_scaling.data.preparing import stored
from ldm_scaling.data.preparing.facts import Facts
from ldm_scaling.data.preparing.filters import KEPT
from ldm_scaling.data.preparing.options import Options
from ldm_scaling.data.record import Record
from ldm_scaling.data.shards import Shard
from ldm_scaling.errors import UserError

_FORMAT = "ldm_scaling preparation 3"


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What becomes of the rows of a part.

    Attributes:
      reason: number in `filters.REASONS` of why each is dropped, or `KEPT`; int8 [N].
      keeper: part and row of the better duplicate, or -1; int32 [N, 2].
      others: by row, captions of exact duplicates that are kept with it, see `decide.others`.
    """

    reason: np.ndarray
    keeper: np.ndarray
    others: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)


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

    @property
    def finished(self) -> bool:
        """Whether the destination is a prepared data set."""
        return (self.path / shards.MANIFEST).exists()

    @property
    def by_part(self) -> bool:
        """Whether it is known of each part alone that its files changed."""
        return all(part.fingerprint for part in self.parts)

    def scan(self, i: int, threads: int = 1) -> int:
        """Finds out part i's facts unless they are there; returns how many rows were found anew.

        Those of a part that could not be read are not taken for there, unless it is left out.
        """
        there = self.facts_file(i).exists()
        if there and (self.options.skip_broken or not self.broken(i)):
            return 0
        options = self.options
        found = facts_lib.scan(
            self.collection, self.parts[i], options.tile,
            options.duplicates.perceptual is not None, threads,
        )  # fmt: skip
        facts_lib.save(found, self.facts_file(i))
        return len(found)

    def facts(self, i: int) -> Facts:
        """Part i's facts."""
        return facts_lib.load(self.facts_file(i))

    def broken(self, i: int) -> str:
        """Why part i could not be read to its end; empty where it could."""
        return facts_lib.why_broken(self.facts_file(i))

    def check_broken(self, numbers: Iterable[int]) -> None:
        """Raises `UserError` naming parts that cannot be read, unless they are to be left out."""
        broken = [why for i in numbers if (why := self.broken(i))]
        if broken and not self.options.skip_broken:
            more = f" (and {len(broken) - 1} more parts like it)" if len(broken) > 1 else ""
            anew = "" if self.by_part else f", remove {os.fspath(self.path)}"
            raise UserError(
                f"{broken[0]}{more}; mend it{anew} and run again, or leave such parts out by "
                "data.prepare.skip_broken=True (with --to what was examined is not examined again; "
                "a workdir prepares anew)"
            )

    def save_verdict(self, i: int, verdict: Verdict) -> None:
        """Keeps what becomes of part i's rows."""
        others = np.array(_others_text(verdict))
        _save(
            self._file("verdict", i), reason=verdict.reason, keeper=verdict.keeper, others=others
        )

    def verdict(self, i: int) -> Verdict:
        """What becomes of part i's rows."""
        found = _load(self._file("verdict", i))
        others = json.loads(str(found["others"]))
        return Verdict(found["reason"], found["keeper"], {row: tuple(t) for row, t in others})

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
        arrays = {"basis": np.array(self._basis(i))}
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
        plain["broken"] = [part.name for i, part in enumerate(self.parts) if self.broken(i)]
        return shards.finish(self.path, self.options.name, splits, plain)

    def _basis(self, i: int) -> str:
        """Hash of what part i's shards are written by: facts and verdict."""
        verdict = self.verdict(i)
        decided = verdict.reason.tobytes() + _others_text(verdict).encode()
        return files.sha256_of(self.facts_file(i).read_bytes() + decided)

    def _is_written(self, i: int, named: Mapping[str, str]) -> bool:
        file = self._file("written", i)
        if not file.exists() or str(_load(file).get("basis")) != self._basis(i):
            return False
        written = self.written(i)
        return {split: shard.file for split, shard in written.items()} == dict(named) and all(
            (self.path / shard.file).exists()
            and (self.path / shard.file).stat().length == shard.bytes
            for shard in written.values()
        )

    def _spooled(self, i: int, spool: Any, threads: int) -> Iterator[tuple[str, Record, int, int]]:
        """Order, record without its image, and where in `spool` that is, of each kept row."""
        facts, verdict = self.facts(i), self.verdict(i)
        kept = np.flatnonzero(verdict.reason == KEPT)
        rows: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
        for number, row in zip(kept.tolist(), facts.table.take(kept).to_pylist()):
            rows[row["pair"]].append({**row, "others": verdict.others.get(number, ())})

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
        remedy = f"remove {os.fspath(self.path)} and prepare them anew"
        if self.by_part:
            remedy = "run again, those that changed are examined anew"
        return UserError(
            f"the files of {self.collection.name} changed while they were prepared: {remedy}"
        )

    def facts_file(self, i: int) -> epath.Path:
        """Where part i's facts lie."""
        part = self.parts[i]
        if not part.fingerprint:
            return self._file("facts", i, "parquet")
        return self.work / f"facts-{files.sha256_of([part.name, part.fingerprint])}.parquet"

    def _file(self, what: str, i: int, suffix: str = "npz") -> epath.Path:
        return self.work / f"{what}-{i:05d}.{suffix}"


def begin(
    collection: Collection, destination: epath.PathLike, options: Options
) -> tuple[Preparation, bool]:
    """A preparation that starts or goes on, and whether it is finished already.

    Raises `UserError` where the destination lies in the collection or holds other files, or a
    preparation of other files or with other options, and `MissingPackageError` for what is not
    installed.
    """
    path = epath.Path(destination).expanduser()
    files.on_disk("shards", destination)
    check_outside(collection, path)
    facts_lib.check_packages(options.duplicates.perceptual is not None)
    parts = tuple(collection.parts())
    if not parts:
        raise UserError(f"there is nothing in {collection.name}: give a collection with images")
    job = Preparation(collection, path, options, parts, collection.fingerprint())
    begun = job.work / "begun.json"
    if job.finished:
        _check_finished(job, shards.open(path).manifest)
        return job, True
    if begun.exists():
        try:
            found = dict(json.loads(begun.read_text()))
        except (ValueError, TypeError) as e:
            raise UserError(f"{os.fspath(begun)} is damaged: remove {os.fspath(path)}") from e
        of_files = () if job.by_part else ("fingerprint", "parts")
        _compare(job, found, ("format", "source", *of_files))
        return job, False
    if path.exists():
        others = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"{os.fspath(path)} holds other files ({others[0]}): choose an empty folder"
            )
    files.atomic_write_text(begun, json.dumps(job.identity, indent=1))
    return job, False


def check_outside(collection: Collection, path: epath.Path) -> None:
    """Raises `UserError` for a destination that is not finished and lies in the collection: what is
    written there would be taken for its files, which then change while they are prepared.
    """
    holds = getattr(collection, "holds", None)
    if holds and not (path / shards.MANIFEST).exists() and holds(Path(path)):
        raise UserError(
            f"{os.fspath(path)} lies in {collection.name}, and what is prepared there would be "
            "taken for its files: choose another --to or --workdir, outside of that folder"
        )


_REMEDY = "remove it, or choose another folder"


def _check_finished(job: Preparation, found: Mapping[str, Any]) -> None:
    """Raises `UserError` for a data set that is not what `job` would make."""
    _compare(job, found, ("source", "fingerprint", "parts"))
    skipped = bool(found["options"].get("skip_broken"))  # Older manifests do not say which.
    if found.get("broken", skipped) and not job.options.skip_broken:
        names = ", ".join(found.get("broken", ["some parts"])[:8])
        raise UserError(
            f"{os.fspath(job.path)} was made without {names}, which could not be read: say "
            f"data.prepare.skip_broken=True, or mend them and {_REMEDY}"
        )


def _compare(job: Preparation, found: Mapping[str, Any], held: Sequence[str]) -> None:
    where, name = os.fspath(job.path), job.collection.name
    same = found.get("fingerprint") == job.fingerprint or (
        sources.canonical(str(found.get("source"))) == sources.canonical(name))
    for what in held:
        if found.get(what) != job.identity[what] and not (what == "source" and same):
            how = {
                "format": f"was begun by another version ({found.get('format')})",
                "source": f"is of {found.get('source')}, not of {name}",
                "fingerprint": f"was made when the files of {name} were others",
                "parts": f"was made of {found.get('parts')} parts, and there are {len(job.parts)}",
            }
            raise UserError(f"{where} {how[what]}: {_REMEDY}")
    before, wanted = found.get("options", {}), job.options.identity
    for option in wanted:  # What is left out is decided after all is examined.
        if option != "skip_broken" and before.get(option) != wanted[option]:
            raise UserError(
                f"{where} was begun with {option} {json.dumps(before.get(option))}, not "
                f"{json.dumps(wanted[option])}: {_REMEDY}"
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
            image = stored.encode(decoded.image_HWC, decoded.lossy, options.store_side)
        out.append(
            Record(
                row["key"], image, (*captions, *row["others"]), row["group"], width, height,
                row["aesthetic"], row["watermark"],
            )
        )  # fmt: skip
    return out


def _others_text(verdict: Verdict) -> str:
    return json.dumps(sorted(verdict.others.items()))


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
