"""Which files a folder holds, and what every reader does with a list of them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ldm_scaling.data.collection import Part
from ldm_scaling.data.image_folder import SUFFIXES
from ldm_scaling.data.sources import texts
from ldm_scaling.data.sources.options import Options
from ldm_scaling.errors import UserError

T = TypeVar("T")

_KEPT: collections.OrderedDict[str, Any] = collections.OrderedDict()
_MOST = 8
_LOCK = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Once:
    """Something that a collection finds out once in a process.

    It is not part of the collection's pickle, so that a list of millions of files does not travel
    with each part; all copies of the collection in a process share it.
    """

    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def get(self, make: Callable[[], T]) -> T:
        """What `make` gave when it was first called."""
        with _LOCK:
            if self.token not in _KEPT:
                value = make()
                while len(_KEPT) >= _MOST:
                    _KEPT.popitem(last=False)
                _KEPT[self.token] = value
            return _KEPT[self.token]


@dataclasses.dataclass(frozen=True)
class Held:
    """In the place of `Once`, something that does travel: as much of it as a part needs."""

    value: Any

    def get(self, make: Callable[[], T]) -> T:
        """As `Once.get`."""
        del make
        return self.value


def walk(root: Path, keep: Callable[[str], bool]) -> list[str]:
    """Paths below `root` of the files whose name is to be kept, with `/`, sorted.

    Hidden files and folders are left out, links are followed, a folder is entered once. Raises
    `UserError` for a folder that cannot be read.
    """

    def fail(e: OSError):
        raise UserError(f"cannot read the folder {e.filename}: {e.strerror}") from e

    names: list[str] = []
    entered = set()
    for folder, below, here in os.walk(root, followlinks=True, onerror=fail):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            below.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        base = Path(folder).relative_to(root).as_posix()
        names += (
            name if base == "." else f"{base}/{name}"
            for name in here
            if not name.startswith(".") and keep(name)
        )
    return sorted(names)


def holds(root: Path, place: Path) -> bool:
    """Whether `walk` would find what is written in a folder: it is not hidden, and lies in `root`
    as it is spelt or where its links lead."""
    spelt = Path(os.path.abspath(root)), Path(os.path.abspath(place))
    led = Path(os.path.realpath(root)), Path(os.path.realpath(place))
    return any(
        inner.is_relative_to(outer)
        and not any(name.startswith(".") for name in inner.relative_to(outer).parts)
        for outer, inner in (spelt, led)
    )


def is_image(name: str) -> bool:
    """Whether a file is an image by the end of its name."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def stem(name: str) -> str:
    """A name without its last suffix, with its folders."""
    return posixpath.splitext(name)[0]


def key(name: str) -> str:
    """A name as a key: bytes that are no UTF-8 are written out, so that any file can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def alike(stems: Sequence[str]) -> bool:
    """Whether the names of pieces are img2dataset's kind: of one length, so none begins another.

    A key that begins with its piece's name is then no other piece's.
    """
    bare = [posixpath.basename(name) for name in stems]
    return len(set(map(len, bare))) == 1 and len(set(bare)) == len(bare)


def own_key(found: Any, piece: str, number: object) -> str:
    """The key that a piece's member has where it begins with the piece's name, else one made of it.

    `piece` is the piece's path without suffix, `number` what the member is called in it.
    """
    if isinstance(found, str) and len(found) > len(name := posixpath.basename(piece)) > 0:
        if found.startswith(name) and found.isascii():
            return found
    return key(f"{piece}/{number}" if piece else str(number))


def cut(count: int, most: int) -> list[tuple[int, int]]:
    """Start and stop of the fewest pieces of `count` things, of at most `most`, evenly."""
    pieces = -(-count // most)
    return [(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]


def parts(root: Path, count: int, options: Options) -> tuple[Part, ...]:
    """Parts of `count` files of a folder, in order."""
    return tuple(
        Part(f"{root.name}[{a}:{b}]", str(root), a, b) for a, b in cut(count, options.part_size)
    )


def gather(groups: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Start and stop of runs of whole groups of at most `most` rows; larger groups are cut."""
    runs: list[tuple[int, int]] = []
    start = stop = 0
    for rows in groups:
        if start < stop and stop + rows - start > most:
            runs.append((start, stop))
            start = stop
        if rows > most:
            runs += [(stop + a, stop + b) for a, b in cut(rows, most)]
            start = stop + rows
        stop += rows
    return runs if start == stop else [*runs, (start, stop)]


def left_out(root: Path, keep: Callable[[str], bool]) -> dict[str, int]:
    """How many files below `root` are not to be kept, by suffix."""
    others = walk(root, lambda name: not keep(name))
    return collections.Counter(posixpath.splitext(name)[1].lower() for name in others)


def fingerprint(root: Path, names: Iterable[str], options: Options, more: str = "") -> str:
    """`Collection.fingerprint` of files below `root`, or that of a part with `more` that decides.

    Raises `UserError` when a file is gone.
    """
    digest = hashlib.sha256((options.hash + more).encode("utf-8", "surrogateescape"))
    for name, size, time in _stats(root, names):
        digest.update(f"{name}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _stats(root: Path, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    for name in names:
        try:
            stat = os.stat(root / name)
            yield name, stat.st_size, stat.st_mtime_ns
        except FileNotFoundError as e:
            if not (root / name).is_symlink():
                raise UserError(f"{root / name} went away: list the folder again") from e
            yield name, -1, 0  # A link to nothing; its pair says so.
        except OSError as e:
            raise UserError(f"cannot read {root / name}: {e.strerror}") from e


def is_file(path: Path) -> bool:
    """Whether it is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:  # longer than the system allows
        return False


def contents(path: Path, named_by: str = "") -> tuple[bytes, str]:
    """The bytes of an image's file, or none and why."""
    data, why = b"", ""
    try:
        if path.exists() and not path.is_file():
            why = f"{path} is no file"  # a folder, or a pipe that would never end
        else:
            data = path.read_bytes()
            why = "" if data else f"{path} is empty"
    except FileNotFoundError:
        why = f"there is no file {path}" + (f", which {named_by} names" if named_by else "")
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        why = f"cannot read {path}: {getattr(e, 'strerror', None) or e}"
    return data, texts.one_line(why)
