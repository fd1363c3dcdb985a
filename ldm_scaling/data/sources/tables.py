"""Collections in files of columns, one pair a row: images as bytes beside their captions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.data.sources import columns, listing, texts
from ldm_scaling.data.sources.columns import ColumnFile
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import Options
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError

_LONGEST_PATH = 1024
# What img2dataset notes of a picture that it could not fetch.
_NOTES = ("status", "error_message")


@dataclasses.dataclass(frozen=True)
class Tables:
    """Files of columns below a folder; a part is some rows of one, by row groups where they fit.

    Large row groups are cut; each process that reads of such a group decodes it once, see
    `columns`.

    A pair's key is its file's name and its row's number: FILE/ROW.

    Attributes:
      name: as in `Collection`.
      root: the folder; images that are only named are looked for below it.
      options: how it is read.
      find: the files' names below `root`, in order.
      key_column: of keys that begin with their file's name, as img2dataset's do; empty if none.
    """

    name: str
    root: Path
    options: Options
    find: Callable[[], list[str]]
    key_column: str = ""
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`; each file's footer is read once."""
        return self.once.get(self._parts)

    def _parts(self) -> tuple[Part, ...]:
        names = self.find()

        def of(name: str) -> list[Part]:
            file = ColumnFile(self.root / name)
            _columns(file, self.options)  # What is missing is said before the work begins.
            of_file = listing.fingerprint(self.root, [name], self.options, self.key_column)
            return [
                Part(f"{listing.key(name)}[{a}:{b}]", str(file.path), a, b, of_file)
                for a, b in listing.gather(file.groups, self.options.part_size)
            ]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            parts = tuple(part for found in pool.map(of, names) for part in found)
        if not parts:
            raise UserError(f"{self.name}: there is no row in {len(names)} files of {self.root}")
        return parts

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        file = ColumnFile(Path(part.path))
        image, captions, scores = _columns(file, self.options)
        name = file.path.relative_to(self.root).as_posix()
        notes = [c for c in (*_NOTES, self.key_column) if c in file.schema.names]
        wanted = dict.fromkeys([image, *captions, *scores, *notes])
        for number, row in file.rows(list(wanted), part.start, part.stop):
            known = "" if isinstance(row, Unusable) else row.get(self.key_column)
            key = listing.own_key(known, listing.stem(name), number)
            if isinstance(row, Unusable):
                yield Pair(key, b"", error=str(row))
                continue
            where = f"row {number} of {file.path}"
            try:
                found = texts.captions_of([row[c] for c in captions], where, self.options)
                numbers = texts.row_scores(row, where, self.options)
            except Unusable as e:
                yield Pair(key, b"", error=str(e))
                continue
            data, error = self._image(row, image, file.path, where)
            yield Pair(key, data, found, scores=numbers, error=error)

    def _image(self, row: Mapping[str, Any], column: str, file: Path, where: str):
        value, path = row[column], None
        if isinstance(value, Mapping):
            value, path = value["bytes"], value.get("path")
        elif isinstance(value, str):
            value, path = None, value
        if value:
            return value, ""
        if not path:
            notes = ", ".join(str(row[note]) for note in _NOTES if row.get(note))
            why = f"{where} holds no image" + (f" ({notes})" if notes else "")
            return b"", texts.one_line(why)
        if "://" in path:
            why = f"{where} names the image {path}, which is not on this disk: fetch it first"
            return b"", texts.one_line(why)
        if len(path) > _LONGEST_PATH:
            return b"", texts.one_line(
                f"{where} holds a text of {len(path)} characters for an image, which is no path: "
                "images are read as bytes, so decode base64 first"
            )
        places = [file.parent / path, self.root / path]
        return listing.contents(next(filter(listing.is_file, places), places[0]), where)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`; images that are only named do not count."""
        return listing.fingerprint(self.root, self.find(), self.options)


def _columns(file: ColumnFile, options: Options) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return (
        columns.image_column(file),
        columns.caption_columns(file.schema, file.path, options),
        columns.score_columns(file.schema, file.path, options),
    )
