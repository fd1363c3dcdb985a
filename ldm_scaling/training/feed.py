"""Batches on the devices before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

_AHEAD = 2


class _Item(NamedTuple):
    batch: Any
    state: dict[str, Any]


class Feed:
    """An iterator of batches that a thread reads and places while the step before runs.

    `state` belongs to the batch in hand, not to those that are read ahead: a run that goes on from
    it gets the batch after the one last taken. What the loader raises is raised in its turn, after
    the batches before it, `KeyboardInterrupt` included. As a context manager it ends the thread and
    closes the loader.

    Args:
      loader: an iterator of host batches with `get_state()` and `close()`.
      make_batch: from a host batch to arrays of this process's share, numpy to numpy.
      sharding: of the arrays over all devices, of every process.

    Attributes:
      sharding: as given.
      state: what the loader goes on from after the batch in hand.
    """

    def __init__(
        self, loader: Any, make_batch: Callable[[Any], Any], sharding: NamedSharding
    ):
        self._loader, self._make_batch, self.sharding = loader, make_batch, sharding
        self.state: dict[str, Any] = loader.get_state()
        self._items: queue.Queue[_Item | BaseException] = queue.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, daemon=True, name="feed")
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        """The next batch, on the devices. Raises what the loader or `make_batch` raises."""
        if self._error is not None:
            raise self._error
        item = self._items.get()
        self._room.release()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self.state = item.state
        return item.batch

    def examples(self, state: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What the batch after `state` holds, by name; None where the loader cannot tell."""
        tell = getattr(self._loader, "examples", None)
        return None if tell is None else tell(state)

    def close(self) -> None:
        """Ends the thread, then closes the loader; what was read ahead is dropped."""
        self._closing.set()
        self._room.release()
        self._thread.join()
        self._items.queue.clear()
        self._loader.close()

    def _fill(self) -> None:
        try:
            while self._room.acquire() and not self._closing.is_set():
                local = self._make_batch(next(self._loader))
                batch = jax.tree.map(
                    lambda x: jax.make_array_from_process_local_data(self.sharding, x), local
                )
                self._items.put(_Item(batch, self._loader.get_state()))
        except BaseException as e:  # Raised in the thread that asks for batches.
            self._items.put(e)
