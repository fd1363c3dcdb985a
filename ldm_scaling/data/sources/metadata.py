"""Tables beside images, `metadata.csv`, `.jsonl` or `.parquet`, as Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_scaling.data.collection import CAPTION_COLUMNS
from ldm_scaling.data.sources import columns, texts
from ldm_scaling.data.sources.columns import ColumnFile
from ldm_scaling.data.sources.options import NO_CAPTIONS, Options
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Columns that name an image, relative to the table; the first that is there.
FILE_COLUMNS = ("file_name", "file", "filename", "image", "path")
_LONGEST_FIELD = 1 << 24


@dataclasses.dataclass(frozen=True)
class Row:
    """What tables say of one image: captions of all its rows, scores, or why it cannot be used."""

    captions: tuple[str, ...] = ()
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""

    def __add__(self, other: Row) -> Row:
        return Row(
            self.captions + other.captions, {**self.scores, **other.scores},
            self.error or other.error,
        )  # fmt: skip


def read(root: Path, name: str, options: Options) -> dict[str, Row]:
    """Path below `root` of each image that a table names, to what it says of it.

    A row that names no image has the table's name and its own number for a path, and an error.
    Raises `UserError` naming a table that is damaged or has no columns to read.
    """
    path = root / name
    kind = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix]
    found: dict[str, Row] = {}
    for number, values in kind(path, options):
        where = f"row {number} of {path}"
        image, row = f"{name}#{number}", Row(error=str(values))
        if not isinstance(values, Unusable):
            column = next(c for c in FILE_COLUMNS if c in values)
            file = values[column]
            try:
                if not isinstance(file, str) or not file.strip():
                    raise Unusable(f"{where} names no image in its column {column}")
                image = posixpath.normpath(posixpath.join(posixpath.dirname(name), file.strip()))
                if Path(image).is_relative_to(root):
                    image = posixpath.relpath(image, root)
                row = Row(
                    texts.row_captions(values, where, options),
                    texts.row_scores(values, where, options),
                )
            except Unusable as e:
                row = Row(error=str(e))
        found[image] = found[image] + row if image in found else row
    return found


def _csv(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    encoding, begins = _encoding(path, options), 1
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            _check(names, path, options)
            begins = reader.line_num + 1
            for number, fields in enumerate(reader, 2):
                begins = reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(names):
                    yield number, Unusable(
                        f"row {number} of {path} has {len(fields)} fields instead of "
                        f"{len(names)}: quote captions that hold commas"
                    )
                else:
                    yield number, dict(zip(names, fields))
    except (OSError, csv.Error, UnicodeError) as e:
        raise UserError(
            f"cannot read {path} (the row that begins in line {begins}: {e}): mend or remove it"
        ) from e


def _jsonl(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with open(path, encoding=_encoding(path, options), errors="surrogateescape") as file:
            known: set[str] = set()
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise ValueError("it is no object")
                if not any(column in values for column in FILE_COLUMNS):
                    _check(list(values), path, options)
                known |= values.keys()
                yield number, values
            _check(sorted(known), path, options)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        at = f"near line {max(number, 1)}: "
        raise UserError(f"cannot read {path} ({at}{e}): mend or remove it") from e


def _parquet(path: Path, options: Options) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    file = ColumnFile(path)
    there = file.schema.names
    _check(there, path, options)
    wanted = [
        next(c for c in FILE_COLUMNS if c in there),
        *texts.columns_of(there, options),
        *columns.score_columns(file.schema, path, options),
    ]
    return file.rows(list(dict.fromkeys(wanted)))


def _check(names: list[str], path: Path, options: Options) -> None:
    """Raises `UserError` for a table without the columns that are asked for."""
    there = ", ".join(names) or "none"
    if not any(column in names for column in FILE_COLUMNS):
        raise UserError(
            f"{path} has no column of the images' names ({', '.join(FILE_COLUMNS)}): its columns "
            f"are {there}"
        )
    named = [*options.caption_columns, *options.score_columns.values()]
    missing = [column for column in named if column not in names]
    scores = itertools.chain.from_iterable(map(options.names_of, ("aesthetic", "watermark")))
    found = texts.columns_of(names, options) or set(scores) & set(names)
    if missing or (options.captions and not found):
        what = repr(missing[0]) if missing else f"of captions ({', '.join(CAPTION_COLUMNS)})"
        remedy = "" if missing else f"; {NO_CAPTIONS}"
        raise UserError(f"{path} has no column {what}: its columns are {there}{remedy}")


def _encoding(path: Path, options: Options) -> str:
    try:
        with open(path, "rb") as file:
            return texts.encoding_of(file.read(4), options)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
