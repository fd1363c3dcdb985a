"""`folder:PATH`: images below a folder, with captions in files beside them or in tables.

    PATH/cat.jpg, PATH/cat.txt (a caption a line), cat.caption or cat.json
    PATH/metadata.csv, .jsonl or .parquet, or PATH/train/metadata.csv: file_name, caption

`prepare` lists the folder once; each process of Apache Beam does so for itself, so for more than
some ten million images take tars.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.data.image_folder import SUFFIXES
from ldm_scaling.data.sources import listing, metadata, texts
from ldm_scaling.data.sources.listing import Held, Once
from ldm_scaling.data.sources.metadata import Row
from ldm_scaling.data.sources.options import Options
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError

SIDECARS = (".txt", ".caption", ".json")


def collection(name: str, path: Path, options: Options) -> Folder:
    """The images by name, with those that only a table names."""
    if not path.is_dir():
        raise UserError(f"{name}: {path} is a file: name the folder that it is in")
    return Folder(name, path, options)


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Images and what tables name, sorted, from number `first` on; what tables say; sidecars by
    stem and lower suffix."""

    names: list[str]
    rows: dict[str, Row]
    sidecars: dict[str, str]
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images as files; a part is some of them that follow each other by name.

    A pair's key is its image's path below the folder. Its captions are those of its rows in tables
    if it has any, else those of the first sidecar that holds one; scores are taken from the tables
    and from X.json.

    Attributes:
      name: as in `Collection`.
      root: the folder.
      options: how it is read.
    """

    name: str
    root: Path
    options: Options
    once: Once | Held = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        count = len(self._listing().names)
        return listing.parts(self.root, count, self.options)

    def _listing(self) -> _Listing:
        return self.once.get(self._list)

    def _list(self) -> _Listing:
        names = listing.walk(self.root, _belongs)
        images = {name for name in names if listing.is_image(name)}
        tables = [name for name in names if posixpath.basename(name) in metadata.NAMES]
        folders = [posixpath.dirname(table) for table in tables]
        twice = [table for table, folder in zip(tables, folders) if folders.count(folder) > 1]
        if twice:
            raise UserError(
                f"{self.root / twice[0]} and {posixpath.basename(twice[1])} lie side by side: keep "
                "one of them"
            )
        rows: dict[str, Row] = {}
        for table in tables:
            for name, row in metadata.read(self.root, table, self.options).items():
                rows[name] = rows[name] + row if name in rows else row
        if not images and not rows:
            raise UserError(
                f"there is no image in {self.root}: files that end in {', '.join(SUFFIXES)}"
            )
        splits = ((name, *posixpath.splitext(name)) for name in names)
        sidecars = {stem + end.lower(): name for name, stem, end in splits
                    if end.lower() in SIDECARS}  # fmt: skip
        if self.options.score_columns and not tables and not any(
            name.endswith(".json") for name in sidecars
        ):
            score, column = next(iter(self.options.score_columns.items()))
            raise UserError(
                f"{self.root} holds no column of scores {column!r}: there is neither a metadata "
                f"table nor a .json beside an image; leave out data.prepare.{score}_column"
            )
        return _Listing(sorted(images | rows.keys()), rows, sidecars)

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        found = self._listing()
        for name in found.names[part.start - found.first : part.stop - found.first]:
            yield self._pair(name, found)

    def share(self, part: Part) -> Folder:
        """The folder with the listing of one part, which travels to a process that reads it."""
        found = self._listing()
        names = found.names[part.start : part.stop]
        rows = {name: found.rows[name] for name in names if name in found.rows}
        beside = (listing.stem(name) + suffix for name in names for suffix in SIDECARS)
        sidecars = {name: found.sidecars[name] for name in beside if name in found.sidecars}
        held = Held(_Listing(names, rows, sidecars, part.start))
        return dataclasses.replace(self, once=held)

    def groups(self) -> Iterator[str]:
        """The groups of all pairs, sound or not; each is its own."""
        return map(listing.key, self._listing().names)

    def left_out(self) -> dict[str, int]:
        """Files that are neither images nor captions, by suffix."""
        return listing.left_out(self.root, _belongs)

    def _pair(self, name: str, found: _Listing) -> Pair:
        key, row = listing.key(name), found.rows.get(name, Row())
        if row.error:
            return Pair(key, b"", error=row.error)
        if name.startswith(("../", "/")):
            return Pair(key, b"", error=f"a table names {key}, which is not in {self.root}")
        data, error = listing.contents(
            self.root / name, "a table" if name in found.rows else ""
        )
        if error:
            return Pair(key, b"", row.captions, scores=dict(row.scores), error=error)
        try:
            captions, scores = self._sidecars(listing.stem(name), found.sidecars)
        except Unusable as e:
            return Pair(key, b"", error=str(e))
        return Pair(key, data, row.captions or captions, scores={**scores, **row.scores})

    def _sidecars(self, stem: str, there: dict[str, str]):
        captions: tuple[str, ...] = ()
        scores: dict[str, float] = {}
        for suffix in SIDECARS:
            if stem + suffix not in there:
                continue
            path = self.root / there[stem + suffix]
            try:
                data = path.read_bytes()
            except OSError as e:
                raise Unusable(f"cannot read {path}: {e.strerror}") from e
            if suffix == ".json":
                values = texts.parse(data, str(path), self.options)
                scores = texts.row_scores(values, str(path), self.options)
                captions = captions or texts.row_captions(values, str(path), self.options)
            elif not captions:
                text = texts.decode(data, str(path), self.options)
                captions = texts.captions_of(texts.lines(text), str(path), self.options)
        return captions, scores

    def holds(self, place: Path) -> bool:
        """Whether what is written in a folder would be taken for the collection's."""
        return listing.holds(self.root, place)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`: of images, sidecars and tables."""
        return listing.fingerprint(self.root, listing.walk(self.root, _belongs), self.options)


def _belongs(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in SUFFIXES or suffix in SIDECARS or name in metadata.NAMES
