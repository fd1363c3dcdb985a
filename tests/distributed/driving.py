"""Starts processes of training runs, see `worker`, and waits for them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

from ldm_scaling.data import cache

ROOT = pathlib.Path(__file__).parents[2]
# One thread each, for many processes share few cores; quick to compile, as all tests are.
_THREADS = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_cpu_multi_thread_eigen=false",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")])  # where `toy` is


class Nursery:
    """A process that others are forked from; use as a context manager."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).with_name("worker.py"))], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_THREADS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _PATH},
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *unused) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def ask(self, **order: Any) -> Any:
        """The answer to an order."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, job: dict[str, Any], n: int, folder: pathlib.Path) -> Run:
        """Starts a job's processes; their output goes to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"job_{time.monotonic_ns()}.json"
        path.write_text(json.dumps(job))
        address = f"127.0.0.1:{free_port()}"
        pids = [
            self.ask(start={
                "job": str(path), "address": address, "k": k, "n": n,
                "log": str(folder / f"process_{k}.txt"),
            })
            for k in range(n)
        ]
        return Run(self, pids, folder)

    def finish(self, job: dict[str, Any], n: int, folder: pathlib.Path) -> None:
        """Runs a job to its end; fails where it fails."""
        statuses = self.start(job, n, folder).wait()
        assert statuses == [0] * n, output(folder)


@dataclasses.dataclass
class Run:
    """Processes that run."""

    nursery: Nursery
    pids: list[int]
    folder: pathlib.Path

    def poll(self) -> list[int | None]:
        """Exit statuses so far."""
        return [self.nursery.ask(poll=pid) for pid in self.pids]

    def wait(self, seconds: float = 300.0, grace: float = 20.0) -> list[int]:
        """Exit statuses. As launchers do: when one has failed, the others have `grace` seconds to
        notice, then they are killed."""
        deadline, failed = time.monotonic() + seconds, None
        while True:
            found = self.poll()
            if None not in found:
                return found
            now = time.monotonic()
            if failed is None and any(found):
                failed = now
            if now > deadline or (failed is not None and now - failed > grace):
                self.signal(signal.SIGKILL)
            time.sleep(0.02)

    def signal(self, number: int, *processes: int) -> None:
        """Sends a signal to some, or all, that still run."""
        chosen = [self.pids[k] for k in processes] or self.pids
        for pid in chosen:
            if self.nursery.ask(poll=pid) is None:
                os.kill(pid, number)


def output(folder: pathlib.Path) -> str:
    """What processes wrote."""
    return "\n".join(f"{p.name}: {p.read_text()}" for p in sorted(folder.glob("process_*.txt")))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_data(path: pathlib.Path, count: int = 256) -> None:
    """A cache of random examples: `x` (4, 4, 4) or (8,) and `context` (3, 16)."""
    rng = np.random.default_rng(0)
    shapes = {"x": (8,)} if path.name.startswith("linear") else {"x": (4, 4, 4), "context": (3, 16)}
    arrays = {k: rng.normal(size=(count, *s)).astype(np.float32) for k, s in shapes.items()}
    cache.write(path, cache.rows([arrays]), {"hash": path.name})


def damage(path: pathlib.Path, count: int) -> int:
    """Cuts into one record of a cache of `count`; returns its number."""
    records = cache.CacheSource(path)
    number = count // 3
    inside = records[number]["x"].tobytes()
    data = bytearray(path.read_bytes())
    at = data.index(inside)
    data[at + len(inside) // 2 : at + len(inside)] = bytes(len(inside) - len(inside) // 2)
    path.write_bytes(data)
    return number


def params(path: pathlib.Path) -> dict[str, np.ndarray]:
    """What a job's process 0 wrote."""
    with np.load(path) as file:
        return dict(file)
