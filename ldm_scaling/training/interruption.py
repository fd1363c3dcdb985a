"""When a run is asked to end: SIGTERM or a preemption notice, at a step all processes share."""

from __future__ import annotations

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

from ldm_scaling.parallel import processes

# Over all runs of this process, see `Interruption.due`.
_CALLS = itertools.count(1)


class Interruption:
    """Whether the run should save and end, asked after every step.

    One process hears SIGTERM itself, where this thread gets signals, and only inside the context,
    from the first answer on; then the step in hand is saved, however long it takes.
    Several are told at different moments and must save one checkpoint together: JAX's preemption
    service, which `jax.distributed.initialize` starts and which hears SIGTERM from then on, picks
    the step after the furthest one that any of them has reached. A handler of SIGTERM that is set
    in Python after that would silence it. Before the first answer, and outside, there is no step to
    save: `processes` ends several, and the handler of before one.
    """

    def __init__(self):
        self._told = threading.Event()
        self._before = None

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, kind, *unused) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if kind is None:  # What is raised ends the process, with its own status.
            processes.saves(False)

    @property
    def told(self) -> bool:
        """Whether this process, alone, has heard SIGTERM."""
        return self._told.is_set()

    def due(self) -> bool:
        """Whether to end after this step; all processes get the same answer.

        All must ask equally often. The service compares counts of calls, which must grow: they go
        on from one run to the next, where steps begin again.
        """
        if jax.process_count() == 1:
            if self._before is None and threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGTERM, lambda *unused: self._told.set())
            return self.told
        processes.saves(True)
        return multihost_utils.reached_preemption_sync_point(next(_CALLS))
