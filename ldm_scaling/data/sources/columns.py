"""Files of columns, parquet and arrow: rows of them, and which column holds the images."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_scaling.data.collection import SCORES
from ldm_scaling.data.image_folder import SUFFIXES
from ldm_scaling.data.sources import texts
from ldm_scaling.data.sources.options import NO_CAPTIONS, Options
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import MissingPackageError, UserError

# Columns that hold images, the first that is there; `hr` is DIV2K's.
IMAGE_COLUMNS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "jpg_bytes", "image_data", "bytes",
    "picture", "photo", "hr",
)  # fmt: skip
_ROWS = 32  # at once: some megabytes of images
_BUFFER = 1 << 20
# What ends a stream that was closed; a writer that is killed between two batches leaves none.
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_FILE_MARK = b"ARROW1"
# Where the reading of a row group was left that is cut into several parts: the number of a batch's
# first row, the batch, and those that follow. Rows are only found by decoding all before them, so a
# process that takes one part after the other decodes the group once and not anew for each.
_LEFT: dict[tuple, tuple[int, Any, Iterator[Any]]] = {}


def arrow():
    """The package pyarrow. Raises `MissingPackageError`."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise MissingPackageError("pyarrow", "parquet and arrow files", extra="data") from e
    return pyarrow


class ColumnFile:
    """A parquet file, or an arrow file or stream by its ending; opened when read, so picklable.

    Raises `UserError` naming the file, here and when read, where it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pa = arrow()
        self._mark = ()
        with self._named():
            self._arrow = path.suffix == ".arrow"
            if self._arrow:
                with self._open_arrow() as batches:
                    self.schema = batches.schema
                    self.groups = [batch.num_rows for batch in _batches(batches)]
            else:
                with self._open_parquet() as file:
                    stat = os.stat(path)
                    self._mark = (str(path), stat.st_size, stat.st_mtime_ns)
                    self.schema = file.schema_arrow
                    meta = file.metadata
                    self.groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        twice = [name for name in self.schema.names if self.schema.names.count(name) > 1]
        if twice:
            raise UserError(f"{path} holds two columns {twice[0]!r}: rename one")

    def rows(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
        """Number and values of the rows from `start` to before `stop`.

        A row with text that is no UTF-8 is an `Unusable` instead.
        """
        stop = sum(self.groups) if stop is None else stop
        read = start
        with self._named():
            for first, batch in self._batches(list(columns), start, stop):
                below, above = max(0, start - first), min(batch.num_rows, stop - first)
                for i in range(below, above, _ROWS):
                    piece = batch.slice(i, min(_ROWS, above - i))
                    yield from enumerate(self._values(piece, first + i), first + i)
                    read += piece.num_rows
            if read != stop:  # A damaged page may say that it is empty.
                raise self._pa.ArrowInvalid(f"it holds {read - start} of rows {start} to {stop}")

    def _batches(self, columns: list[str], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Batches with the number of their first row that hold rows of the range."""
        if self._arrow:
            with self._open_arrow() as batches:
                first = 0
                for batch in _batches(batches):
                    if first < stop and first + batch.num_rows > start:
                        yield first, batch.select(columns)
                    first += batch.num_rows
            return
        starts = [0, *itertools.accumulate(self.groups)]
        pairs = itertools.pairwise(starts)
        groups = [i for i, (a, b) in enumerate(pairs) if a < stop and b > start]
        if not groups:
            return
        key = (*self._mark, *columns)
        first, held, batches = _LEFT.pop(key, (-1, None, None))
        if not starts[groups[0]] <= first <= start:
            first, held = starts[groups[0]], None
            batches = self._open_parquet().iter_batches(_ROWS, row_groups=groups, columns=columns)
        left = None
        try:
            for batch in itertools.chain([] if held is None else [held], batches):
                left = (first, batch, batches)
                if first + batch.num_rows > start:
                    yield first, batch
                if first + batch.num_rows >= stop:
                    return
                first, left = first + batch.num_rows, None
        finally:
            if left and stop not in starts:
                _LEFT.clear()
                _LEFT[key] = left

    def _values(self, batch, first: int) -> list[dict[str, Any] | Unusable]:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError as e:
            if batch.num_rows == 1:
                return [Unusable(f"row {first} of {self.path} holds text that is no UTF-8 ({e})")]
            return [
                value for i in range(batch.num_rows)
                for value in self._values(batch.slice(i, 1), first + i)
            ]  # fmt: skip

    def _open_parquet(self):
        # Without `pre_buffer` pages are read as they are needed, not whole row groups of images.
        return self._pa.parquet.ParquetFile(
            self.path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
        )

    def _open_arrow(self):
        with open(self.path, "rb") as file:
            whole = file.read(len(_FILE_MARK)) == _FILE_MARK
            size = file.seek(0, 2)
            file.seek(max(0, size - len(_STREAM_END)))
            if not whole and file.read() != _STREAM_END:
                raise self._pa.ArrowInvalid("it is cut short, or no arrow stream")
        source = self._pa.memory_map(str(self.path))
        return (self._pa.ipc.open_file if whole else self._pa.ipc.open_stream)(source)

    def _named(self):
        return _Named(self.path, (self._pa.ArrowException, OSError, EOFError))

    def __getstate__(self):
        return {**self.__dict__, "_pa": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _pa=arrow())


class _Named:
    """Turns errors of a library into one that names the file."""

    def __init__(self, path: Path, errors: tuple[type[Exception], ...]):
        self.path, self.errors = path, errors

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, self.errors) and not isinstance(error, UserError):
            why = (str(error).splitlines() or [kind.__name__])[0]
            raise UserError(
                f"cannot read {self.path} ({why}): fetch it again, or take it out of the folder"
            ) from error


def _batches(reader):
    """The batches of an arrow stream or file."""
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def describe(schema) -> str:
    """A table's columns with their types, for messages."""
    names = [f"{field.name} ({str(field.type)[:40]})" for field in schema]
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "") or "none"


def image_column(file: ColumnFile) -> str:
    """The column of images: bytes, Hugging Face's struct of bytes and path, or paths by name.

    Beside paths, bytes of another name count where one of the first is an image's. Raises
    `UserError` listing the columns when there is none or it is not clear which.
    """
    schema = file.schema
    images = [field.name for field in schema if _holds_bytes(field.type)]
    named = [column for column in IMAGE_COLUMNS if column in images]
    if named:
        return named[0]
    noted = _features(schema, "Image")
    images = noted or images
    images = [name for name in images if name in schema.names and not texts.columns_of(
        [name], Options())]  # fmt: skip
    paths = [name for name in IMAGE_COLUMNS if name in schema.names
             and _is_text(schema.field(name).type)]  # fmt: skip
    if paths and not noted:
        images = [name for name in images if _holds_images(file, name)]
    if len(images) == 1:
        return images[0]
    if paths and not images:
        return paths[0]
    what = "several columns of bytes" if images else "no column of image bytes"
    raise UserError(
        f"{file.path} holds {what}: name it one of {', '.join(IMAGE_COLUMNS[:6])}, ...; there are "
        f"{describe(schema)}"
    )


def _holds_images(file: ColumnFile, name: str) -> bool:
    """Whether one of a column's first values that are not null is an image: some may be broken."""
    rows = (row for _, row in file.rows([name]) if not isinstance(row, Unusable))
    values = (row[name] for row in rows if row[name] is not None)
    return any(map(_shows, itertools.islice(values, _ROWS)))


def _shows(value: Any) -> bool:
    """Whether a value begins as the file of an image does."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    kinds = Image.registered_extensions()
    try:  # Pillow takes nearly any bytes for kinds that have no mark.
        Image.open(io.BytesIO(data or b""), formats=[kinds.get(s, "PNG") for s in SUFFIXES])
    except Exception:  # Pillow's readers of other files raise errors of nearly every type
        return False
    return True


def caption_columns(schema, where: Path, options: Options) -> tuple[str, ...]:
    """The columns of captions, empty where none are needed.

    Raises `UserError` listing the columns when one that is named, or every one, is missing.
    """
    there = [field.name for field in schema if _holds_text(field.type)]
    missing = [name for name in options.caption_columns if name not in there]
    found = texts.columns_of(there, options)
    if missing or (options.captions and not found):
        what = f"no column of captions {missing[0]!r}" if missing else "no column of captions"
        raise UserError(
            f"{where} holds {what}: {NO_CAPTIONS}; there are {describe(schema)}"
        )
    return found


def score_columns(schema, where: Path, options: Options) -> tuple[str, ...]:
    """The columns of scores. Raises `UserError` when one that is named is missing."""
    for column in options.score_columns.values():
        if column not in schema.names:
            raise UserError(
                f"{where} holds no column of scores {column!r}: mend data.prepare.aesthetic_column "
                f"or data.prepare.watermark_column; there are {describe(schema)}"
            )
    return tuple(c for name in SCORES for c in options.names_of(name) if c in schema.names)


def _features(schema, kind: str) -> list[str]:
    """The columns that Hugging Face's notes in the schema call images."""
    try:
        notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = notes["info"]["features"].items()
        return [name for name, feature in features if feature.get("_type") == kind]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []  # Other programs keep other notes there: the types decide.


def _holds_bytes(kind) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind) -> bool:
    types = arrow().types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_null(kind)


def _holds_text(kind) -> bool:
    types = arrow().types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_text(kind.field(i).type) for i in range(kind.num_fields))
    return _is_text(kind) or types.is_binary(kind) or types.is_large_binary(kind)
