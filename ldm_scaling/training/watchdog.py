"""Ends a process that is stuck, or whose peers are gone, so that a launcher starts it again."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax

from ldm_scaling.errors import SAVED, STALLED
from ldm_scaling.parallel import processes

log = logging.getLogger(__name__)

# Steps that compile, and what lies between steps (validation, pictures), may take so much longer.
PATIENT = 4
# Errors of a program itself, which starting again would not mend.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")
_TELLING = 10.0  # seconds: a log on a file system that hangs must not hold the process


class Watchdog:
    """A thread that ends the process with status 76 when no step finishes for too long.

    It writes which step, how long and what to do to stderr and the log, with the stacks of all
    threads. Python's own thread switching must work: what holds the interpreter's lock for ever
    is not seen.

    Args:
      name: of the run.
      seconds: without a finished step; 0 watches nothing.
      step: the last one that is finished.
      end: ends the process, `os._exit`.
    """

    def __init__(
        self, name: str, seconds: float, step: int = 0, end: Callable[[int], None] = os._exit
    ):
        self._name, self._seconds, self._step, self._end = name, seconds, step, end
        self._changed = threading.Condition()
        self._compiles = step + 1  # The first step does.
        self._allowed = PATIENT * seconds
        self._since = time.monotonic()
        self._closed = seconds == 0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        if not self._closed:
            self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def finished(self, step: int) -> None:
        """Tells that a step is done on the devices."""
        self._step = step
        self._start(self._seconds * (PATIENT if step < self._compiles else 1))

    def compiles(self, step: int) -> None:
        """Four times as long until this step, which is the next, is finished."""
        self._compiles = step
        self._start(PATIENT * self._seconds)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Four times as long inside, for what is no step; then the count starts anew."""
        self._start(PATIENT * self._seconds)
        try:
            yield
        finally:
            self._start(self._seconds)

    def _start(self, seconds: float) -> None:
        with self._changed:
            self._allowed, self._since = seconds, time.monotonic()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._since + self._allowed - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                end_process(
                    f"{self._name}: no step finished for {self._allowed:g} s after step "
                    f"{self._step}: the process ends with status {STALLED}, to be started again "
                    "from the newest checkpoint. If it recurs, see the stacks in the log for what "
                    "hangs, or raise train.stall_seconds",
                    self._end,
                )
                return


@contextlib.contextmanager
def lost_host(name: str) -> Iterator[None]:
    """Ends the process where the runtime fails inside and there are others: with the status of the
    one that said why it stopped, else with 76.

    A step, or a barrier, that another process does not come to any more fails so where the network
    notices at once; JAX's own service ends a process when heartbeats stay away.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        # A collective of which a peer is gone may raise as ValueError too.
        lost = isinstance(e, jax.errors.JaxRuntimeError) or "Gloo" in str(e)
        if jax.process_count() == 1 or not lost or str(e).startswith(_OWN_FAULTS):
            raise
        log.exception("%s: the runtime failed", name)
        # It said so before its connections closed.
        status, why = processes.within(_TELLING, processes.failure) or (SAVED, "")
        if status != SAVED:
            end_process(f"{name}: {why}", lambda _: processes.leave(status, why))
        lines = str(e).strip().splitlines() or [type(e).__name__]
        end_process(
            f"{name}: process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({lines[0][:200]}): it ends with status {STALLED}, to be started again, with all "
            "others, from the newest checkpoint"
        )


def end_process(message: str, end: Callable[[int], None] = os._exit) -> None:
    """Tells the message, with the stacks of all threads in the log, and calls `end` with 76.

    Nothing is waited for: no other thread, no exit handler and no other process, which could hang.
    """
    stacks = _stacks()

    def tell() -> None:
        print(f"ldm-scaling: error: {message}", file=sys.stderr, flush=True)
        log.critical("%s\n%s", message, stacks)
        for handler in logging.getLogger().handlers:
            handler.flush()

    processes.within(_TELLING, tell)
    end(STALLED)


def _stacks() -> str:
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read().decode(errors="replace")
    except OSError as e:  # A full disk.
        return f"(no stacks: {e})"
