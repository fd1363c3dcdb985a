"""`webdataset:PATH`: what img2dataset writes, in any of its forms, and other WebDataset tars.

    PATH/00000.tar, 00000.parquet, 00000_stats.json   000000000.jpg, .txt, .json in the tar
    PATH/00000/000000000.jpg, .txt, .json             its output format `files`
    PATH/00000.parquet                                its output format `parquet`, column jpg

PATH may also be a single tar, or a pattern like shard-{0000..0012}.tar.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_scaling.data.collection import SCORES, Collection, Pair, Part
from ldm_scaling.data.image_folder import SUFFIXES
from ldm_scaling.data.sources import columns, listing, parquet, tars, texts
from ldm_scaling.data.sources.columns import ColumnFile
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import Options
from ldm_scaling.data.sources.tables import Tables
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TEXTS = ("txt", "text", "caption")


def collection(name: str, path: Path, options: Options) -> Collection:
    """The pairs by tar, folder or file, in the order in which they lie there.

    A sample's captions are its text, else those of its JSON, else those in its row of the parquet
    file of the same name; scores are taken from the JSON, then from that row.
    """
    if not path.exists():
        paths = tars.library().shardlists.expand_urls(str(path))
        root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
        names = [Path(path).relative_to(root).as_posix() for path in dict.fromkeys(paths)]
        return Tars(name, root, options, functools.partial(_pattern, name, root, names))
    if path.is_file():
        if not path.name.endswith(TARS):
            raise UserError(f"{name}: {path} is no tar, by its name: tars end in {', '.join(TARS)}")
        return Tars(name, path.parent, options, functools.partial(list, [path.name]))
    if _tars(path):
        return Tars(name, path, options, functools.partial(_tars, path))
    tables = listing.walk(path, lambda name: name.endswith(".parquet"))
    if tables and not listing.walk(path, listing.is_image):
        own = listing.alike([listing.stem(table) for table in tables])
        find = functools.partial(parquet.files, path)
        return Tables(name, path, options, find, key_column="key" if own else "")
    return Files(name, path, options)


@dataclasses.dataclass(frozen=True)
class Tars:
    """Tars; a part is one of them.

    A pair's key is the sample's, if it begins with its tar's name as img2dataset's do, else
    TAR/KEY.

    Attributes:
      name: as in `Collection`.
      root: the folder.
      options: how it is read.
      find: the tars' names below `root`, in order.
    """

    name: str
    root: Path
    options: Options
    find: Callable[[], list[str]]
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def _names(self) -> tuple[list[str], bool, set[str]]:
        """The tars, whether their names are img2dataset's kind, the names that two begin with."""
        names = self.find()
        stems = collections.Counter(map(_stem, names))
        twice = {stem for stem, count in stems.items() if count > 1}
        return names, listing.alike([_stem(name) for name in names]), twice

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        names, own, _ = self.once.get(self._names)
        return tuple(
            Part(
                listing.key(name), str(self.root / name),
                fingerprint=listing.fingerprint(
                    self.root, self._files([name]), self.options, f"{own} {self._piece(name)}"
                ),
            )
            for name in names
        )  # fmt: skip

    def _piece(self, name: str) -> str:
        """What the keys of a tar's samples begin with."""
        twice = self.once.get(self._names)[2]
        return name if _stem(name) in twice else _stem(name)

    def _files(self, names: list[str]) -> list[str]:
        """Tars, with the parquet files beside them."""
        beside = [f"{_stem(name)}.parquet" for name in names]
        return sorted([*names, *(name for name in beside if (self.root / name).is_file())])

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`; a sample's error is what is wrong with one of its files."""
        path = Path(part.path)
        own = self.once.get(self._names)[1]
        piece = self._piece(path.relative_to(self.root).as_posix())
        beside, names = Path(f"{_stem(str(path))}.parquet"), set()
        rows, lacking = _beside(beside, self.options), False
        for found in tars.samples(path):
            for name, sample in _parted(found):
                bare = name.removeprefix("./")
                names.add(bare)
                key = listing.own_key(bare if own else None, piece, bare)
                where = f"{name} in {path}"
                pair = _pair(key, sample, rows.get(bare, {}), where, self.options)
                lacking = lacking or _lacks(pair, rows, self.options)
                yield pair
        _check_beside(beside, rows, names, lacking)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`, with the parquet files beside the tars."""
        return listing.fingerprint(self.root, self._files(self.find()), self.options)


@dataclasses.dataclass(frozen=True)
class Files:
    """Folders of samples as files; a part is a folder, cut where it holds more than a part may.

    Attributes:
      name: as in `Collection`.
      root: the folder of these folders.
      options: how it is read.
    """

    name: str
    root: Path
    options: Options
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        return self.once.get(self._folders)[0]

    def _folders(self) -> tuple[tuple[Part, ...], bool]:
        folders: dict[str, int] = {}
        for name in listing.walk(self.root, listing.is_image):
            folder = posixpath.dirname(name)
            folders[folder] = folders.get(folder, 0) + 1
        if not folders:
            raise UserError(
                f"there is no tar, no parquet file and no image in {self.root}: name the folder "
                "that img2dataset wrote to"
            )
        parts = [
            Part(f"{listing.key(folder) or '.'}[{a}:{b}]", str(self.root / folder), a, b)
            for folder, count in folders.items()
            for a, b in listing.cut(count, self.options.part_size)
        ]
        return tuple(parts), listing.alike(list(folders))

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        folder = Path(part.path)
        _, own = self.once.get(self._folders)
        try:
            here = sorted(os.listdir(folder))
        except OSError as e:
            raise UserError(f"cannot read the folder {folder}: {e.strerror}") from e
        names = [name for name in here if listing.is_image(name) and not name.startswith(".")]
        stems = collections.Counter(map(listing.stem, names))
        piece, here = folder.relative_to(self.root).as_posix().removeprefix("."), set(here)
        beside = folder.with_name(f"{folder.name}.parquet")
        rows, lacking = _beside(beside, self.options), False
        for name in names[part.start : part.stop]:
            stem = listing.stem(name)
            key = listing.own_key(stem if own and stems[stem] == 1 else None, piece, name)
            sample: dict[str, Any] = {}
            error = ""
            for suffix in (*_TEXTS, "json"):
                if f"{stem}.{suffix}" in here:
                    sample[suffix], why = _bytes(folder / f"{stem}.{suffix}")
                    error = error or why
            sample[posixpath.splitext(name)[1][1:].lower()], why = listing.contents(folder / name)
            if error or why:
                yield Pair(key, b"", error=error or why)
            else:
                pair = _pair(key, sample, rows.get(stem, {}), str(folder / name), self.options)
                lacking = lacking or _lacks(pair, rows, self.options)
                yield pair
        _check_beside(beside, rows, set(stems), lacking)

    def left_out(self) -> dict[str, int]:
        """Files that are neither images, captions nor img2dataset's tables, by suffix."""
        ends = (*(f".{s}" for s in (*_TEXTS, "json")), ".parquet")
        return listing.left_out(self.root, lambda n: listing.is_image(n) or n.endswith(ends))

    def holds(self, place: Path) -> bool:
        """Whether what is written in a folder would be taken for the collection's."""
        return listing.holds(self.root, place)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`."""
        return listing.fingerprint(self.root, listing.walk(self.root, bool), self.options)


def _parted(sample: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The name and files of each sample in one of webdataset's, whose names end at the first dot.

    Several are in one where all names have more dots, as dates have, and those that agree up to
    the last are an image each, some with a text.
    """
    key, pieces = sample["__key__"], {}
    for suffix, data in sample.items():
        if not suffix.startswith("__"):
            stem, _, end = suffix.rpartition(".")
            pieces.setdefault(stem, {})[end] = data
    images = [sum(f".{end}" in SUFFIXES for end in piece) for piece in pieces.values()]
    several = "" not in pieces and len(pieces) > 1 and set(images) == {1}
    if several and any(len(piece) > 1 for piece in pieces.values()):
        return [(f"{key}.{stem}", piece) for stem, piece in pieces.items()]
    return [(key, sample)]


def _pair(
    key: str, sample: Mapping[str, Any], row: Mapping[str, Any], where: str, options: Options
) -> Pair:
    """The pair of a sample's files and of its row in the table beside them."""
    suffixes = [s for s in sample if f".{s.rpartition('.')[2]}" in SUFFIXES]
    suffixes = [s for s in suffixes if "." not in s] or suffixes
    if len(suffixes) != 1:
        shown = ", ".join(suffixes[:4]) + (", ..." if suffixes[4:] else "")
        what = f"several images, {shown}" if suffixes else "no image"
        if "." in shown:
            what += ": a sample's name ends at its first dot, so rename files with more of them"
        return Pair(key, b"", error=texts.one_line(f"{where} holds {what}"))
    image, prefix = sample[suffixes[0]], f"{suffixes[0].rpartition('.')[0]}."
    # What is named as the image is up to the last dot goes before what is so up to the first.
    beside = {s: sample.get(prefix + s, sample.get(s)) for s in (*_TEXTS, "json")}
    for found in (image, *beside.values()):
        if isinstance(found, Unusable):
            return Pair(key, b"", error=str(found))
    try:
        notes = {}
        if beside["json"] is not None:
            notes = texts.parse(beside["json"], f"the JSON of {where}", options)
        text = {s: beside[s] for s in _TEXTS if beside[s] is not None}
        captions = _captions([text, notes, row], where, options)
        scores = {
            **texts.row_scores(row, where, options),
            **texts.row_scores(notes, where, options),
        }
    except Unusable as e:
        return Pair(key, b"", error=str(e))
    if not image:
        why = texts.one_line(f"the image of {where} is empty")
        return Pair(key, b"", captions, scores=scores, error=why)
    return Pair(key, image, captions, scores=scores)


def _captions(places, where: str, options: Options) -> tuple[str, ...]:
    if options.caption_columns:
        text, notes, row = places
        return texts.row_captions({**row, **notes, **text}, where, options)
    text, *others = places
    # img2dataset writes a caption as it is: its line breaks do not part captions.
    for value in text.values():
        if found := texts.captions_of(value, where, options):
            return found
    for row in others:
        if found := texts.row_captions(row, where, options):
            return found
    return ()


def _beside(path: Path, options: Options) -> dict[str, dict[str, Any]]:
    """Captions and scores by key in the table that img2dataset writes beside a tar or folder."""
    if not path.is_file():
        return {}
    file = ColumnFile(path)
    wanted = [
        *columns.caption_columns(file.schema, path, dataclasses.replace(
            options, caption_columns=(), captions=False)),
        *(c for c in options.caption_columns if c in file.schema.names),
        *(c for c in columns.score_columns(
            file.schema, path, dataclasses.replace(options, score_columns={}))),
        *(c for c in options.score_columns.values() if c in file.schema.names),
    ]  # fmt: skip
    if not wanted:
        return {}
    if "key" not in file.schema.names:
        raise UserError(
            f"{path} holds no column 'key' to tell whose its captions and scores are; there are "
            f"{columns.describe(file.schema)}"
        )
    found = {}
    for _, row in file.rows(list(dict.fromkeys(["key", *wanted]))):
        if isinstance(row, Unusable):
            raise UserError(f"{row}: write the table again")
        found[str(row["key"])] = row
    return found


def _lacks(pair: Pair, rows: Mapping[str, Mapping[str, Any]], options: Options) -> bool:
    """Whether a pair has no caption, or not the scores that the table beside it holds."""
    row = next(iter(rows.values()), {})
    scores = {name for name in SCORES if not row.keys().isdisjoint(options.names_of(name))}
    return not pair.error and not (pair.captions and scores <= pair.scores.keys())


def _check_beside(path: Path, rows: Mapping[str, Any], names: set[str], lacking: bool) -> None:
    """Raises `UserError` for a table of which no row is a sample's, where one lacks something."""
    if lacking and rows and not names & rows.keys():
        raise UserError(
            f"{path} has keys such as {next(iter(rows))!r}, and none of {len(names)} samples has "
            f"one of them, such as {min(names)!r}: write its column 'key' as they "
            "are called, or take it out of the folder"
        )


def _bytes(path: Path) -> tuple[bytes, str]:
    try:
        return path.read_bytes(), ""
    except OSError as e:
        return b"", texts.one_line(f"cannot read {path}: {e.strerror}")


def _stem(name: str) -> str:
    return next((name[: -len(end)] for end in TARS[::-1] if name.endswith(end)), name)


def _tars(root: Path) -> list[str]:
    return listing.walk(root, lambda name: name.endswith(TARS))


def _pattern(name: str, root: Path, names: list[str]) -> list[str]:
    """The names. Raises `UserError` when a tar that the pattern stands for is missing."""
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"{root / missing[0]} is not there ({len(missing)} of {len(names)} tars that {name} "
            "stands for are missing): mend the pattern or fetch them"
        )
    return names
