"""`parquet:PATH`: a parquet file, or all those below a folder, with images and captions in rows."""

from __future__ import annotations

import functools
from pathlib import Path

from ldm_scaling.data.sources import listing
from ldm_scaling.data.sources.options import Options
from ldm_scaling.data.sources.tables import Tables
from ldm_scaling.errors import UserError


def collection(name: str, path: Path, options: Options) -> Tables:
    """The rows of the files, by file name and row.

    Columns are found by name and type, see `columns.IMAGE_COLUMNS` and `CAPTION_COLUMNS`.
    """
    if path.is_file():
        return Tables(name, path.parent, options, functools.partial(list, [path.name]))
    return Tables(name, path, options, functools.partial(files, path))


def files(root: Path) -> list[str]:
    """The parquet files below a folder. Raises `UserError` when there are none."""
    names = listing.walk(root, lambda name: name.endswith(".parquet"))
    if not names:
        raise UserError(f"there is no parquet file in {root}: files that end in .parquet")
    return names
