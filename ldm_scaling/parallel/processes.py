"""Several processes as one program: how they find each other, wait for each other and end.

Process 0 leads: it locks a workdir, prepares, logs and reports. Waiting goes through jax's
coordination service and not through the devices, so that it may last as long as the lead works,
answers signals, and ends as soon as any process says that it failed. One that neither waits nor
fails by itself, as it waits for devices or works by itself, is ended by a thread that listens.

That thread also ends all of them where one hears SIGTERM, but not while training has steps to save.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ldm_scaling.errors import AGAIN, SAVED, ApartError, Interrupted, UserError, first_line

# How long processes wait for each other to start: a pod's hosts come up minutes apart.
START_S = 900
# How long a process may be silent before all others are ended.
HEARTBEAT_S = 100
_SLICE_MS = 1_000  # between two looks at signals and at failures of others
_FAILED, _HEARD, _LEFT = "ldm_scaling/failed", "ldm_scaling/heard", "ldm_scaling/left"
# What jax's preemption service tells the processes by, of which one has heard SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_LISTEN_S = 1.0  # between two looks of the thread that listens
_HEARING_S = 5.0  # in which others hear of a failure, or are taken for dead
_ALONE_S = 20.0  # that a process which heard has to end by itself
_LINGER_S = 0.5  # from a process's last word to its end
_TELLING_S = 10.0  # that its last words may take
_COMMANDS = "TPU pods and slices, GKE (with the package kubernetes) and Slurm"

log = logging.getLogger(__name__)
_ended, _leaving = threading.Event(), threading.Lock()
_counts: collections.Counter[str] = collections.Counter()
_joined, _saves = threading.Event(), threading.Event()


def initialize(where: str, start_s: float = START_S, heartbeat_s: int = HEARTBEAT_S) -> None:
    """Joins the processes of one program; must run before JAX makes its first array.

    Args:
      where: `auto`, which finds the others on TPU pods, GKE and Slurm, or `HOST:PORT,K,N`: this is
        process K of N, and process 0 listens there.
      start_s: seconds in which all must have come.
      heartbeat_s: seconds after which a silent process is taken for dead, and all end.
    Raises:
      UserError: for another value, or an `auto` that finds nothing.
      ApartError: where processes do not come.
    """
    given = None if where == "auto" else _parsed(where)
    done: list[BaseException | None] = []

    def join() -> None:
        try:
            # Beyond its own limit jax aborts the process without a word that a user can read.
            limits = {"initialization_timeout": int(start_s) + 3_600,
                      "heartbeat_timeout_seconds": heartbeat_s}
            if given is None:
                jax.distributed.initialize(**limits)
            else:
                jax.distributed.initialize(
                    *given, cluster_detection_method="deactivate", **limits
                )
            done.append(None)
        except BaseException as e:
            done.append(e)

    thread = threading.Thread(target=join, daemon=True, name="join")
    thread.start()
    thread.join(start_s)
    if not done:
        what = "the processes that the cluster names" if given is None else (
            f"{given[1]} processes at {given[0]}"
        )
        raise ApartError(
            f"--distributed={where}: {what} did not all come together within {start_s:g} s: start "
            "all of them with the same address, which all can reach, and look at the others' errors"
        )
    error = done[0]
    if isinstance(error, ValueError) and given is None:
        raise UserError(
            f"--distributed=auto finds no cluster ({error}); it knows {_COMMANDS}. Elsewhere give "
            "--distributed=HOST:PORT,K,N: this is process K of N, process 0 is at HOST"
        ) from error
    if error is not None:
        kind = UserError if isinstance(error, ValueError) else ApartError
        raise kind(f"--distributed={where}: {first_line(error, most=300)}") from error
    _joined.set()
    if _state().num_processes > 1:
        listener = threading.Thread(target=_listen, daemon=True, name="listen")
        listener.start()
        # Before jax lets go of its client, which was registered earlier.
        atexit.register(lambda: (_ended.set(), listener.join()))


def saves(itself: bool) -> None:
    """Says whether this process, told to end, saves what it is at and ends by itself; all that do
    save together. Otherwise it is ended where it is."""
    if itself:
        _saves.set()
    else:
        _saves.clear()


def _listen() -> None:
    """Ends this process when it is told to, and after another one failed, where it does not end by
    itself."""
    while (told := failure() or _told()) is None:
        if _ended.wait(_LISTEN_S):
            return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_HEARD}/{_state().process_id}", "null")
    status, why = told
    # Who ends with 75 has saved together with all that had to, or left before there was a step.
    patience_s = (_HEARING_S if _saves.is_set() else 0.0) if status == SAVED else _ALONE_S
    if _ended.wait(patience_s):
        return

    def tell() -> None:
        said = f"{why}{AGAIN}" if status == SAVED else f"error: {why}"
        print(f"ldm-scaling: {said}", file=sys.stderr, flush=True)
        log.log(logging.INFO if status == SAVED else logging.ERROR, "%s", why)

    within(_TELLING_S, tell)
    leave(status, why)


def _told() -> tuple[int, str] | None:
    """How this process is to end where any has heard SIGTERM; None where it saves first."""
    if _saves.is_set() or _peek(_NOTICE) is None:
        return None
    return SAVED, "stopped by SIGTERM"


def failure() -> tuple[int, str] | None:
    """Exit status and cause of the process that failed first; None while none has said so."""
    text = _peek(_FAILED) if _joined.is_set() else None
    if text is None:
        return None
    told = json.loads(text)
    return told["status"], f"another process stopped: {told['why']}"


def _peek(key: str) -> str | None:
    """The value of a key, None where it is not there."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().key_value_try_get(key)
    return None


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What it returns; None after so many seconds: what hangs must not hold the process."""
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(function()), daemon=True, name="last-words"
    )
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _parsed(where: str) -> tuple[str, int, int]:
    """Address, number of processes, number of this one."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:,\[\]]+):(\d{1,5}),(\d{1,6}),(\d{1,6})", where)
    if found is None:
        raise UserError(
            f"--distributed={where}: write auto, or HOST:PORT,K,N where this is process K, from 0, "
            "of N and process 0 listens at HOST:PORT"
        )
    host, (port, k, n) = found[1], map(int, found.groups()[1:])
    if not 0 < port < 65536:
        raise UserError(f"--distributed={where}: {port} is no port; take one of 1024 to 65535")
    if not k < n:
        raise UserError(f"--distributed={where}: process {k} of {n}: processes are numbered from 0 "
                        f"to {n - 1}")
    return f"{host}:{port}", n, k


def several() -> bool:
    """Whether this program runs as more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_lead(what: str, make: Callable[[], Any]) -> Any:
    """What `make` gives in the lead, as JSON keeps it, in all processes; the lead does not wait.

    Every process must come here in the same order as to other calls with the same `what`.

    Raises:
      UserError: where another process failed by one, RuntimeError where otherwise, Interrupted
        where it was told to end; what `make` raises, in the lead.
    """
    if not several():
        return make()
    key = _key(what)
    if jax.process_index() == 0:
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_wait(key))


@contextlib.contextmanager
def lead_first(what: str) -> Iterator[None]:
    """The lead goes through first; when it is through, the others follow, and find what it made.

    What is inside must not wait for other processes: only one is in it at first.

    Raises: as `from_lead`.
    """
    if not several():
        yield
        return
    key = _key(what)
    if jax.process_index() == 0:
        yield
        _client().key_value_set(key, "null")
    else:
        _wait(key)
        yield


def barrier(what: str) -> None:
    """Returns when all processes are here. Raises as `from_lead`."""
    if not several():
        return
    key = _key(what)
    if jax.process_index() == 0:
        for other in range(1, jax.process_count()):
            _wait(f"{key}/{other}")
        _client().key_value_set(key, "null")
    else:
        _client().key_value_set(f"{key}/{jax.process_index()}", "null")
        _wait(key)


def leave(status: int, why: str = "") -> None:
    """Ends this process at once where it is one of several; otherwise returns.

    Python's own end would wait for the others, and they for this one. Those that wait for a word of
    it raise; those that do not hear of it by themselves are ended with the same status.
    """
    if not jax.distributed.is_initialized():
        return
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # for another thread of this process, which ends it
    _ended.set()
    if _joined.is_set():
        with contextlib.suppress(Exception):
            _tell(status, why)
    within(_TELLING_S, lambda: (sys.stdout.flush(), sys.stderr.flush()))
    os._exit(status)


def _tell(status: int, why: str) -> None:
    """Tells the other processes that this one ends; the lead waits for them to do so too, and where
    all end alike (75), each for all: jax aborts those that see others gone.
    """
    client, own, started = _client(), _state().process_id, time.monotonic()
    text = json.dumps({"status": status, "why": f"process {own}: {why}"})
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # The first that failed is the cause.
        client.key_value_set(_FAILED, text)
    client.key_value_set(f"{_LEFT}/{own}", "null")
    if own != 0 and status != SAVED:
        return
    # The lead serves what the others read: without it jax ends them, with no status of ours.
    others = [f"/{other}" for other in range(_state().num_processes) if other != own]
    late = [other for other in others if not _come(_LEFT + other, started + _HEARING_S)]
    for other in late:
        if _come(_HEARD + other, started + _HEARING_S):  # Else it is dead.
            _come(_LEFT + other, started + _HEARING_S + _ALONE_S)
    time.sleep(_LINGER_S if own else 2 * _LINGER_S)  # The lead last.


def _come(key: str, until: float) -> bool:
    """Waits for a key until a time, if that is not past; whether it is there."""
    left_ms = int(1000 * (until - time.monotonic()))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if left_ms > 0:
            _client().blocking_key_value_get(key, left_ms)
        else:
            _client().key_value_try_get(key)
        return True
    return False


def _key(what: str) -> str:
    _counts[what] += 1
    return f"ldm_scaling/{what}/{_counts[what]}"


def _wait(key: str) -> str:
    """The value of a key, once it is there."""
    client = _client()
    while True:
        try:
            return client.blocking_key_value_get(key, _SLICE_MS)
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise
        if (told := failure()) is not None:
            raise _raised(*told)


def _raised(status: int, why: str) -> BaseException:
    """What the failure of another process is in this one: the exit status is to be the same."""
    if status == 2:
        return UserError(why)
    return RuntimeError(why) if status == 1 else Interrupted(why)


def _state() -> Any:
    # jax gives no public name to its client; Orbax takes it from the same place.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client
