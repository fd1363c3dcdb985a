"""ArrayRecord files: opened with their count, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError, first_line

RANDOM = "readahead_buffer_size:0,max_parallelism:0"
"""Options of reading for random access."""


def opened(path: epath.PathLike, options: str = "") -> tuple[ArrayRecordReader, int]:
    """A file's reader, and how many records it has: 0 where it is not there or cut short. Other
    damage raises `RuntimeError`."""
    reader = ArrayRecordReader(os.fspath(path), options)
    return reader, reader.num_records() if reader.ok() else 0


@contextlib.contextmanager
def writing(path: epath.PathLike, options: str) -> Iterator[Callable[[bytes], None]]:
    """Yields what writes a record; the file is there when all are written.

    Raises:
      UserError: it cannot be written.
    """
    path = epath.Path(path)

    def told(act: Callable, *given: Any) -> None:
        try:
            act(*given)
        except RuntimeError as e:  # Of the writer alone: what is written may raise its own.
            raise UserError(f"cannot write {os.fspath(path)}: {first_line(e)}") from e

    with files.atomic_path(path) as temporary:
        writer = ArrayRecordWriter(os.fspath(temporary), options)
        if not writer.ok():
            raise OSError(f"no file can be made in {os.fspath(path.parent)}")
        try:
            yield lambda record: told(writer.write, record)
        finally:
            if writer.is_open():
                told(writer.close)
