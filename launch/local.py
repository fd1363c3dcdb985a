"""N processes of one job on this machine, over loopback, restarted together until they are done.

    python3 launch/local.py --processes=4 --cpu-devices=2 -- train --config=FILE --workdir=DIR

Every process gets `--distributed=127.0.0.1:PORT,K,N`. `--cpu-devices=D` gives each D fake devices,
`--gpus=G` its own G of this machine's, or of those that `CUDA_VISIBLE_DEVICES` names; with neither
each sees what there is. `--dry-run` only prints. With `--raw` what stands after  --  is run as it
is, with `--distributed=...` behind it.

When one process fails, the others are ended (SIGTERM, after `--grace` seconds SIGKILL) and all
start again, on a new port: after status 75, 76, 1 or a signal, at most `--max-restarts` times in a
row, after a pause that doubles; an attempt that lasts `--stable` seconds counts from zero again.
Status 2 and Ctrl-C never start again. SIGTERM goes on to all, which have `--saving` seconds to save
and end; nothing starts again. A second signal kills them.

Exit status: the job's: 0, 2, 130; 75 when it was asked to end and saved; else that of the process
that failed first (128 + the signal's number where a signal ended it).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch import common
from launch.common import LaunchError, entry

POLL_S = 0.05
LONGEST_PAUSE_S = 60.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is started, and how often.

    Attributes:
      job: what every process runs, without `--distributed`.
      processes: how many.
      cpu_devices, gpus: devices of each; 0 leaves them as they are. At most one of them.
      max_restarts: starts after the first that fail in a row.
      grace: seconds between SIGTERM and SIGKILL for those whose companion failed.
      saving: the same where this launcher was asked to end.
      pause: seconds before the first restart; then twice as long each time, to a minute.
      stable: seconds after which an attempt's failure is the first again.
      logs: a folder for each process's output, or None: all write where this process does.
      raw: it is any command, not one of ldm-scaling.
    """

    job: tuple[str, ...]
    processes: int = 1
    cpu_devices: int = 0
    gpus: int = 0
    max_restarts: int = 20
    grace: float = 60.0
    saving: float = 600.0
    pause: float = 1.0
    stable: float = 3600.0
    logs: pathlib.Path | None = None
    raw: bool = False

    def __post_init__(self):
        if self.processes < 1:
            raise LaunchError(f"--processes={self.processes}: at least 1")
        if self.cpu_devices and self.gpus:
            raise LaunchError("give --cpu-devices or --gpus, not both")
        for name in ("cpu_devices", "gpus", "max_restarts", "grace", "saving", "pause", "stable"):
            if getattr(self, name) < 0:
                raise LaunchError(f"--{name.replace('_', '-')}={getattr(self, name)}: at least 0")
        shown, wanted = shown_gpus(), self.processes * self.gpus
        if self.gpus and shown is not None and len(shown) < wanted:
            raise LaunchError(
                f"--processes={self.processes} of --gpus={self.gpus} need {wanted} GPUs, and "
                f"CUDA_VISIBLE_DEVICES names {len(shown)}: unset it, or ask for fewer"
            )

    def arguments(self, process: int, port: int | str) -> list[str]:
        flag = f"--distributed=127.0.0.1:{port},{process},{self.processes}"
        return [*self.job, flag] if self.raw else common.job_command(self.job, flag)

    def variables(self, process: int) -> dict[str, str]:
        """Environment variables that differ from this process's."""
        if self.cpu_devices:
            # A count in XLA_FLAGS beside jax's own setting is an error there.
            flags = os.environ.get("XLA_FLAGS", "")
            flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", flags).strip()
            out = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.cpu_devices)}
            return out | ({"XLA_FLAGS": flags} if "XLA_FLAGS" in os.environ else {})
        if self.gpus:
            numbers = range(process * self.gpus, (process + 1) * self.gpus)
            shown = shown_gpus()
            names = map(str, numbers) if shown is None else (shown[i] for i in numbers)
            return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
        return {}


def shown_gpus() -> list[str] | None:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, by number, UUID or MIG name; None: all are."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = (name.strip() for name in text.split(","))
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def status_of(returncode: int) -> int:
    """A shell's status: 128 + the signal's number where a signal ended the process."""
    return 128 - returncode if returncode < 0 else returncode


def first_failure(returncodes: Iterable[int]) -> int:
    """The status to blame among processes that were seen to have ended at once; 0: none failed.

    2 comes last: it is also what a process says that noticed another's end.
    """
    failed = [status_of(code) for code in returncodes if code]
    return next((s for s in failed if s != common.USER), failed[0] if failed else common.DONE)


def verdict(statuses: Sequence[int], first: int, asked: int | None) -> int | None:
    """The status to end with, or None: start again.

    Args:
      statuses: of all processes, 0 those that are done.
      first: of the process that failed before the others; theirs may be what that did to them.
      asked: the signal that asked this launcher to end, or None.
    """
    if not any(statuses):
        return common.DONE
    if first == common.USER:
        return common.USER
    if common.INTERRUPTED in statuses or asked == signal.SIGINT:
        return common.INTERRUPTED
    if asked is not None:
        return common.SAVED if common.SAVED in statuses else first
    return None


class Launcher:
    """Runs a plan to its end. One at a time in a process: it holds the process's signals."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.running: list[subprocess.Popen] = []
        self.asked: int | None = None

    def run(self) -> int:
        """The exit status, after all restarts."""
        before = {s: signal.signal(s, self._asked) for s in SIGNALS}
        try:
            return self._run()
        finally:
            for process in self.running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        failures = 0
        while True:
            started = time.monotonic()
            statuses, first = self._attempt()
            end = verdict(statuses, first, self.asked)
            if end is not None:
                return end
            failures = 1 if time.monotonic() - started >= self.plan.stable else failures + 1
            what = f"statuses {' '.join(map(str, statuses))}, first {first}"
            if failures > self.plan.max_restarts:
                say(f"{what}: failed {failures} times in a row, no more restarts")
                return first
            pause = min(self.plan.pause * 2 ** min(failures - 1, 16), LONGEST_PAUSE_S)
            say(f"{what}: start {failures + 1} of {self.plan.max_restarts + 1} in {pause:g} s")
            until = time.monotonic() + pause
            while self.asked is None and time.monotonic() < until:
                time.sleep(POLL_S)
            if self.asked is not None:
                # Nothing runs; what the last attempt saved is there.
                return common.INTERRUPTED if self.asked == signal.SIGINT else common.SAVED

    def _attempt(self) -> tuple[list[int], int]:
        """Statuses of all processes, and that of the first that failed (0: none)."""
        port, self.running = free_port(), []
        with signals_wait():
            for k in range(self.plan.processes):
                self.running.append(self._start(k, port))
        first, deadline = 0, None
        while any(process.poll() is None for process in self.running):
            if not first:
                first = first_failure(p.poll() or 0 for p in self.running)
            # Those that were told to end have that signal: another would cut short what they do.
            if self.asked is not None and deadline is None:
                deadline = time.monotonic() + self.plan.saving
            if first and deadline is None:
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + self.plan.grace
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(POLL_S)
        codes = [process.returncode for process in self.running]
        self.running = []
        return [status_of(code) for code in codes], first or first_failure(codes)

    def _start(self, process: int, port: int) -> subprocess.Popen:
        out: IO | None = None
        command = self.plan.arguments(process, port)
        if self.plan.logs:
            self.plan.logs.mkdir(parents=True, exist_ok=True)
            out = open(self.plan.logs / f"{process}.log", "ab")
        try:
            # A session of its own: Ctrl-C reaches it through this launcher, once.
            return subprocess.Popen(
                command,
                env=os.environ | self.plan.variables(process),
                stdout=out, stderr=subprocess.STDOUT if out else None,
                start_new_session=True, preexec_fn=in_child,
            )
        except OSError as e:
            raise LaunchError(
                f"{command[0]} cannot be started ({e.strerror}): activate the "
                "environment that has it"
            ) from e
        finally:
            if out:
                out.close()

    def _asked(self, number: int, _frame: object) -> None:
        again, self.asked = self.asked is not None, number
        self._send(signal.SIGKILL if again else number)

    def _send(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """A signal that comes while processes are started waits until all are there to be told."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def in_child() -> None:
    """SIGTERM for this process when its launcher dies (Linux): nothing is left running."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def say(text: str) -> None:
    print(f"launch/local.py: {text}", file=sys.stderr, flush=True)


def dry_run(plan: Plan) -> str:
    """The commands, one line a process."""
    lines = []
    for k in range(plan.processes):
        variables = [f"{name}={shlex.quote(value)}" for name, value in plan.variables(k).items()]
        to = [f">> {shlex.quote(str(plan.logs / f'{k}.log'))} 2>&1"] if plan.logs else []
        line = shlex.join(plan.arguments(k, "PORT"))
        lines.append(" ".join([*variables, line, *to, "&"]))
    return "\n".join([*lines, "wait"])


def main(arguments: list[str]) -> int:
    own, job = common.parted(arguments)
    p = argparse.ArgumentParser("launch/local.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--cpu-devices", type=int, default=0, help="fake devices of each process")
    p.add_argument("--gpus", type=int, default=0, help="GPUs of each process")
    p.add_argument("--max-restarts", type=int, default=20)
    p.add_argument("--grace", type=float, default=60.0,
                   help="seconds from SIGTERM to SIGKILL when another process failed")
    p.add_argument("--saving", type=float, default=600.0,
                   help="the same when this launcher was asked to end")
    p.add_argument("--pause", type=float, default=1.0, help="seconds before the first restart")
    p.add_argument("--stable", type=float, default=3600.0)
    p.add_argument("--logs", type=pathlib.Path, help="a folder for K.log of each process")
    p.add_argument("--raw", action="store_true", help="run any command, not ldm-scaling")
    p.add_argument("--dry-run", action="store_true")
    given = vars(p.parse_args(own))
    dry = given.pop("dry_run")
    if given["raw"] and not job:
        raise LaunchError("after  --  goes the command")
    if given["raw"]:
        common.check_no_secret(job)
    else:
        common.check_job(job)
    plan = Plan(tuple(job), **given)
    if dry:
        print(dry_run(plan))
        return 0
    return Launcher(plan).run()


if __name__ == "__main__":
    entry(main)
