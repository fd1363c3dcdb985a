"""Readers of many files, of which as many stay open as a process may have."""

from __future__ import annotations

import functools
import random
import resource
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Reader = TypeVar("Reader")

_SHARE = 12  # Training reads latents, mirrored ones and text states of each source; so many fit.
_LEAST, _MOST = 64, 512  # Opening reads an index of about 1 MB; readers keep theirs.


@functools.cache
def most() -> int:
    """Files that one sequence of shards may keep open. Raises this process's soft limit, often
    1,024, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST * _SHARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = max(soft, min(wanted, hard))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # macOS has a limit below its own hard one.
            pass
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(_LEAST, min(_MOST, soft // _SHARE))


class Readers(Generic[Reader]):
    """Open readers by number; threads may share them.

    One that is put out stays open until the thread that reads it is done. It is any but the new
    one: batches ask for shards in order, and of those the one unused for longest is the next to be
    asked for.

    Args:
      open: a number's reader.
    """

    def __init__(self, open: Callable[[int], Reader]):
        self._open, self._lock, self._random = open, threading.Lock(), random.Random(0)
        self._found: dict[int, Reader] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Reader:
        with self._lock:
            reader = self._found.get(number)
            if reader is None:
                reader = self._open(number)
                if len(self._found) >= most():
                    del self._found[self._random.choice(list(self._found))]
                self._found[number] = reader
            return reader
