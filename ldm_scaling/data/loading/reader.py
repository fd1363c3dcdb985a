"""Reading a batch: a pure function of its step, run by threads or worker processes.

What cannot be read is replaced by another example of the same stream, drawn by the key of the one
it stands for, and told along with the batch, so that whoever trains may count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import draws
from ldm_scaling.data.loading.order import Examples, Order
from ldm_scaling.data.loading.source import Source
from ldm_scaling.errors import UserError

_AFTER_SIGTERM = 60.0  # seconds that a worker goes on for
_ATTEMPTS = 20  # half of a source may be corrupt, and one in a million batches fails


class Failure(NamedTuple):
    """An example that could not be read: its source's number, its index in it, and why."""

    source: int
    index: int
    why: str


@dataclasses.dataclass(frozen=True)
class Note:
    """What is told along with a batch.

    Attributes:
      read: examples that were read of each source, those that failed included.
      failures: the latter.
      hopeless: whether replacement after replacement failed, so that there is no batch.
    """

    read: tuple[int, ...]
    failures: tuple[Failure, ...] = ()
    hopeless: bool = False

    def to_json(self) -> str:
        """As text: it travels between processes beside arrays."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Note:
        """What `to_json` wrote."""
        tree = json.loads(text)
        failures = tuple(Failure(*failure) for failure in tree["failures"])
        return cls(tuple(tree["read"]), failures, tree["hopeless"])


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads a host's share of any batch; picklable where its sources are.

    Attributes:
      sources: by number.
      order: of their examples.
      own: this host's part of a batch.
      seed: of what is random about examples.
    """

    sources: Sequence[Source]
    order: Order
    own: slice
    seed: int
    # Found corrupt before, by source, index and key: of one example one caption may be damaged and
    # another not. What is read depends on the seed and the step alone, whatever was read before.
    _known: dict[tuple[int, int, int], str] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int) -> tuple[dict[str, np.ndarray], str]:
        """Batch `step`, from 0, and its note in JSON; no arrays where all is hopeless.

        Raises:
          UserError: as the sources.
        """
        examples = self.order.examples(step, self.own)
        parts, rows, read, failures = [], [], [0] * len(self.sources), []
        for source in np.unique(examples.sources_B).tolist():
            rows_S = np.flatnonzero(examples.sources_B == source)
            part, failed = self._part(source, examples, rows_S)
            failures += failed
            read[source] = len(rows_S) + len(failed)
            if part is None:
                return {}, Note(tuple(read), tuple(failures), hopeless=True).to_json()
            parts.append(part)
            rows.append(rows_S)
        arrays = parts[0] if len(parts) == 1 else _merged(parts, np.concatenate(rows))
        return arrays, Note(tuple(read), tuple(failures)).to_json()

    def _part(
        self, source: int, examples: Examples, rows_S: np.ndarray
    ) -> tuple[dict[str, np.ndarray] | None, list[Failure]]:
        """One source's examples in a batch, and those that failed."""
        stream = examples.streams[source]
        epochs_S = examples.epochs_B[rows_S]
        indices = examples.indices_B[rows_S].tolist()
        first_keys = draws.keys(self.seed, source, epochs_S, np.asarray(indices))
        attempts, failures = [0] * len(indices), []

        def known(row: int) -> str | None:
            key = draws.keys(self.seed, source, epochs_S[row], np.int64(indices[row]))
            return self._known.get((source, indices[row], int(key)))

        while True:
            for row in range(len(indices)) if self._known else ():
                while (why := known(row)) is not None:
                    failures.append(Failure(source, indices[row], why))
                    attempts[row] += 1
                    if attempts[row] > _ATTEMPTS:
                        return None, failures
                    indices[row] = stream.another(int(first_keys[row]), attempts[row])
            keys = draws.keys(self.seed, source, epochs_S, np.asarray(indices))
            try:
                return self.sources[source].batch(indices, keys), failures
            except CorruptRecords as e:
                if not e.failures.keys() & set(indices):
                    raise ValueError(f"source {source} failed at others than asked: {e}") from e
                self._known.update({
                    (source, i, int(key)): e.failures[i]
                    for i, key in zip(indices, keys) if i in e.failures
                })
            except UserError as e:
                raise UserError(str(e)) from e  # of a class whose errors travel between processes


def _merged(parts: Sequence[dict[str, np.ndarray]], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The parts' examples in the places `rows`."""
    kinds = [{k: (v.shape[1:], v.dtype.kind) for k, v in part.items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(
            f"the sources of a mixture give different arrays: {kinds}; prepare them the same way"
        )
    back = np.argsort(rows)
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}


def start_worker(number: int, count: int) -> None:
    """What a worker process does first: it leaves accelerators alone, and ends with its parent."""
    import multiprocessing

    import jax

    del number, count
    jax.config.update("jax_platforms", "cpu")  # grain imports it; arrays are made by no one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent closes them

    def end_soon(*unused) -> None:
        timer = threading.Timer(_AFTER_SIGTERM, os._exit, (1,))
        timer.daemon = True
        timer.start()

    # So may SIGTERM, whose parent ends the step in hand first, which may want a batch.
    signal.signal(signal.SIGTERM, end_soon)

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end-with-parent").start()
