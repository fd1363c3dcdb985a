"""Hashes of published weights' files, remembered in the workdir while the files do not change."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ldm_scaling import files
from ldm_scaling.study.workdir import MARKER, Workdir

_HASHES = "weights.json"


@functools.cache
def _sha256(file: str, size: int, changed: int) -> str:
    return files.sha256_of_file(file)


def hash_of(found: Iterable[Path], root: Path, workdir: Workdir) -> str:
    """Hash of the names below `root` and the contents of files. Contents are read again only where
    a file's size or time is not what the workdir remembers.

    Raises `UserError` for a file that cannot be read.
    """
    memo = workdir / _HASHES
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(memo.read_text()))
    digests: dict[str, list] = {}
    for file in found:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        *before, digest = known.get(os.fspath(file)) or [None]
        if before != stamp:
            digest = _sha256(os.fspath(file), *stamp)
        digests[os.fspath(file)] = [*stamp, digest]
    if any(known.get(file) != value for file, value in digests.items()) and (
        workdir / MARKER
    ).exists():
        files.write_json(memo, known | digests)
    return files.sha256_of(
        {os.path.relpath(file, root): digest for file, (*_, digest) in digests.items()}
    )


def below(path: Path) -> list[Path]:
    """A file, or the files of a folder and those below it, in order; hidden ones are left out."""
    if path.is_file():
        return [path]
    inside = (p for p in path.rglob("*") if not any(
        part.startswith(".") for part in p.relative_to(path).parts
    ))
    return sorted(p for p in inside if p.is_file())
