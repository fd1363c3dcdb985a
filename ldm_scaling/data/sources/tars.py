"""Tars as the webdataset library writes them: the files of a sample lie together, KEY.SUFFIX."""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import MissingPackageError, UserError

_BROKEN = (
    tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError,
)  # fmt: skip
# Beginnings of compressed files; these readers notice where one is cut short or damaged.
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# After two blocks of zeros a tar is filled up to a whole number of records: of 10,240 bytes as a
# rule, of 16 MiB where a tape takes such.
_BLOCK, _RECORD, _LONGEST_RECORD = 512, 10_240, 16 << 20
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes


def library():
    """The package webdataset. Raises `MissingPackageError`."""
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ModuleNotFoundError as e:
        raise MissingPackageError("webdataset", "tars of pairs", extra="data") from e
    return webdataset


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar, compressed or not: `__key__`, and the bytes by suffix in lower case, or
    `Unusable` for what is a link.

    Raises `UserError` naming a tar that is damaged or cut short, before its last, incomplete sample
    is given, and one in which the files of a sample do not lie together.
    """
    seen: set[str] = set()
    try:
        for sample in library().tariterators.group_by_keys(_members(path)):
            if sample["__key__"] in seen:
                raise UserError(
                    f"the files of {sample['__key__']!r} in {path} do not lie together: make the "
                    "tar again with sorted names (tar --sort=name), or captions would be lost"
                )
            seen.add(sample["__key__"])
            yield sample
    except UserError:
        raise
    except _BROKEN as e:
        why = str(e.args[0] if e.args else e).splitlines() or [type(e).__name__]
        raise UserError(
            f"cannot read the tar {path} ({why[0]}): make or fetch it again, or take it out of "
            "the folder"
        ) from e


class _Member(tarfile.TarInfo):
    """A header; one that is cut or damaged is an error, which `tarfile` takes for the end."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"it is cut short or damaged at byte {archive.offset}") from e


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """Files for `group_by_keys`; webdataset's own reader ends in silence where a tar is cut."""
    with open(path, "rb") as file:
        start = file.read(8)
    opener = next((opener for mark, opener in _OPENERS.items() if start.startswith(mark)), open)
    with opener(path, "rb") as file:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                if not (_META.match(member.name) or _again(member)):
                    if member.isreg():
                        data = archive.extractfile(member).read()
                        yield {"fname": member.name, "data": data, "__url__": str(path)}
                    elif member.islnk() or member.issym():
                        why = Unusable(
                            f"{member.name} in {path} is a link to {member.linkname}: make the tar "
                            "of files alone (tar --dereference --hard-dereference)"
                        )
                        yield {"fname": member.name, "data": why, "__url__": str(path)}
                archive.members = []
            _check_end(archive)


def _again(member: tarfile.TarInfo) -> bool:
    """Whether it is a file that was there before, as GNU tar writes one that is named twice."""
    name, target = map(posixpath.normpath, (member.name, member.linkname))
    return member.islnk() and name == target


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises `tarfile.ReadError` where the zeros that end a tar may have taken the place of files,
    or more follows. Reads to the end: the checksum of what was compressed comes last."""
    end, at = archive.offset, archive.fileobj.tell()
    while rest := archive.fileobj.read(1 << 20):
        if more := len(rest.lstrip(b"\0")):
            at += len(rest) - more
            raise tarfile.ReadError(
                f"it is cut short or damaged at byte {end}, or several in one: it ends there, and "
                f"more follows at byte {at}"
            )
        at += len(rest)
    fill = at - end - 2 * _BLOCK
    records = range(fill - fill % _BLOCK + _BLOCK, _LONGEST_RECORD + 1, _BLOCK)
    if fill >= _RECORD and all(at % record for record in records):
        raise tarfile.ReadError(
            f"it is cut short or damaged at byte {end}: {at - end} zeros follow, too many to end it"
        )
