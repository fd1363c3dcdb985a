"""Files written whole or not at all, hashes, and progress bars: what every room may use."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from etils import epath
from tqdm import tqdm

from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)

_OLD_S = 3600.0


@contextlib.contextmanager
def atomic_path(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary sibling of `path`; a clean exit renames it into place.

    A process that is killed in between leaves `path` as it was (and a `.tmp-` file that nothing
    reads, see `remove_leftovers`), and so does a machine that crashes: the file is on disk before
    it has its name. Raises `UserError` when the folder cannot be written.
    """
    path = epath.Path(path)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(os.fspath(temporary), "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {os.fspath(path)}: {e.strerror or e}") from e
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary sibling folder of `path`; a clean exit renames it into place.

    A process that is killed in between leaves no `path`, and a `.tmp-` folder that the next call
    removes. Raises `UserError` when `path` is there already or cannot be written.
    """
    path = epath.Path(path)
    if path.exists():
        raise UserError(f"{os.fspath(path)} is there already: remove it, or choose another place")
    temporary = path.parent / f".tmp-{path.name}"
    try:
        if temporary.exists():
            temporary.rmtree()
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {os.fspath(path)}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            if temporary.exists():
                temporary.rmtree()


def remove_leftovers(found: Iterable[epath.Path]) -> None:
    """Removes those of some temporary files and folders that killed writers left: of
    what is younger than an hour the writer may be at work."""
    for path in found:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().mtime > _OLD_S:
                path.rmtree() if path.is_dir() else path.unlink()


def atomic_write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path` by rename: a reader sees the old file or the whole new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) to `path` by rename."""
    atomic_write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any, **how: Any) -> None:
    """Writes a value as JSON to `path` by rename; `how` is of `json.dumps`."""
    atomic_write_text(path, json.dumps(value, indent=1, **how) + "\n")


def bind(folder: epath.PathLike, name: str, about: dict[str, Any], other: str) -> None:
    """Ties a new folder to what decides its contents, or holds one that is there against it.

    Args:
      folder: made if need be.
      name: of the JSON file in it.
      about: all that decides the contents, JSON.
      other: what to say of a folder of something else; `{key}` is the first that differs.
    Raises:
      UserError: for a folder of something else, and one that cannot be used.
    """
    path, about = epath.Path(folder) / name, json.loads(json.dumps(about))
    if not path.exists():
        if path.parent.exists() and any(path.parent.iterdir()):
            raise UserError(f"{folder} is not empty, and holds no {name}: name a new folder")
        write_json(path, about)
        return
    try:
        have = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"cannot use {path} ({e}): name a new folder") from e
    for key in dict.fromkeys([*about, *have]):
        was, now = have.get(key), about.get(key)
        if was != now:
            long = isinstance(was, (dict, list)) or isinstance(now, (dict, list))
            shown = "" if long else f" ({was}, now {now})"
            raise UserError(
                f"{folder} holds {other.format(key=repr(key))}{shown}: name a new folder"
            )


def lock(path: epath.PathLike, taken: str) -> IO[str]:
    """Holds a file for this process while the returned one is open; a lock ends with its process.

    Args:
      path: the file; made if need be.
      taken: what to say where another process holds it, as a `UserError`.
    Raises:
      OSError: where it cannot be opened.
    """
    file = open(os.fspath(path), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(taken) from e
    except OSError:  # A file system without locks.
        folder = os.path.dirname(os.fspath(path))
        log.warning("%s cannot be locked; run one process at a time", folder)
    return file


def on_disk(what: str, path: epath.PathLike) -> None:
    """Raises `UserError` for a bucket or a web address in place of a path."""
    if "://" in os.fspath(path):
        raise UserError(
            f"{what}: {os.fspath(path)} is no path on this machine: mount it, for example with "
            "gcsfuse, or fetch the files, and give the path there"
        )


def _plain(value: Any) -> Any:
    """JSON's view of dataclasses and numpy values; floats keep every digit. A field of which the
    metadata say `later` is left out at its default, so that hashes from before it hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = {"__class__": type(value).__name__, **dataclasses.asdict(value)}
        for field in dataclasses.fields(value):
            if field.metadata.get("later") and told[field.name] == field.default:
                del told[field.name]
        return told
    if isinstance(value, np.ndarray):
        digest = sha256_of(value.tobytes())
        return {"shape": value.shape, "dtype": str(value.dtype), "sha256": digest}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, set)):
        return list(value)
    raise TypeError(f"cannot hash a {type(value).__name__}")


def sha256_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of bytes, or of a value's canonical JSON."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=_plain).encode()
    return hashlib.sha256(value).hexdigest()[:16]


def sha256_of_file(path: epath.PathLike) -> str:
    """The SHA-256 of a file, as `sha256sum` and the sites that publish weights print it.

    Raises `UserError` when the file cannot be read.
    """
    try:
        with open(os.fspath(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"cannot read {os.fspath(path)}: {e.strerror or e}") from e


_progress_shown = True


def show_progress(shown: bool) -> None:
    """Whether progress bars are drawn: of several processes one draws them."""
    global _progress_shown
    _progress_shown = shown


def progress_shown() -> bool:
    """See `show_progress`."""
    return _progress_shown


def progress_seconds() -> float:
    """Seconds between two states of a progress bar: where stderr is a file or a pipe (a batch job's
    log) each is a line there, on a terminal and in a notebook it replaces the last."""
    logged = isinstance(sys.stderr, io.TextIOWrapper) and not sys.stderr.isatty()
    return 30.0 if logged else 0.5


def progress(total: int, desc: str, unit: str = "it", initial: int = 0) -> tqdm:
    """A progress bar with rate and time left on stderr; use as a context manager, `update(n)`."""
    seconds = progress_seconds()
    return tqdm(
        total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True, smoothing=0.1,
        mininterval=seconds, maxinterval=max(seconds, 10.0), unit_scale=False,
        disable=not _progress_shown,
    )


def say(line: str) -> None:
    """Tells who waits something beside the progress: a line on stderr, which the log has too."""
    log.info("%s", line)
    tqdm.write(f"ldm-scaling: {line}", file=sys.stderr)
