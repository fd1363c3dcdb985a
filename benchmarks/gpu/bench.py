"""What the scripts of this folder share: pieces that are done once, the clock, timings, the table.

A script is a list of pieces. Each writes one JSON file with its date, device and versions below
`--to` when it is done, and what is there is not done again; a script that has used up `--minutes`
stops by itself and says what is left. On an accelerator each piece is a process of its own, so that
each side has all of the memory and one that runs out of it ends nothing but itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.models import unet, zoo
from ldm_scaling.parallel import chips, compiled, gpus

ROOT = Path(__file__).resolve().parents[2]
# JAX takes memory as it needs it, so that the peer in the same process finds some, and leaves what
# CUDA's contexts take.
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
_NOT_HERE, _NOT_ASKED = "peer not here: ", "peer not asked for (--no-peer)"
# What runs out of memory says: XLA, PyTorch, and NVIDIA's libraries within either.
_NO_MEMORY = (
    "RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
CALLS = 5  # that `several` makes
# Names the folder in which together.py says whose turn it is.
TURNS = "LDM_SCALING_TURNS"
# A network that a CPU compiles in seconds.
TOY = unet.UNetSpec(
    8, context_dim=16, channel_mults=(1,), attention_levels=(False,), blocks_per_level=1, heads=2,
    groups=4, sample_size=8, context_length=5,
)


def spec_of(member: str) -> unet.UNetSpec:
    """A member's network; `toy` is `TOY`."""
    return TOY if member == "toy" else zoo.get(member).spec


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a script.

    Attributes:
      name: of its file.
      run: `run(book) -> result`, JSON.
      minutes: that it takes at most, about; it is not begun with less left.
      first: whether nothing else counts without it: the script ends where it fails.
    """

    name: str
    run: Callable[[Book], dict[str, Any]]
    minutes: float = 2.0
    first: bool = False


class Book:
    """The results of one script, one file a piece.

    Args:
      folder: where they lie.
      args: of the script.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args

    def get(self, name: str) -> dict[str, Any] | None:
        """A piece's result; None where it is not done."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text())["result"] if path.exists() else None

    def done(self, name: str) -> bool:
        """Whether it need not be done again: it ran, and not without a peer that is here now."""
        result = self.get(name)
        if result is None:
            return False
        why = str(result.get("why") or result.get("peer") or "")
        if why.startswith(_NOT_HERE):
            absent = why.removeprefix(_NOT_HERE).split(" not installed")[0].split(", ")
            return bool(no_peer(self.args, *absent))
        return why != _NOT_ASKED or self.args.no_peer

    def put(self, name: str, result: dict[str, Any], seconds: float) -> None:
        """Writes a piece's result."""
        for path in sorted(self.folder.glob("*.json")):
            there = json.loads(path.read_text())["device"]
            if there != device():
                raise UserError(
                    f"{path} is of a {there}, this is a {device()}: name another folder with --to"
                )
            check_flags(path, os.environ.get("XLA_FLAGS", ""))
        body = {
            "piece": name, "when": datetime.date.today().isoformat(), "device": device(),
            "flags": os.environ.get("XLA_FLAGS", ""), "commit": commit(), "seconds": seconds,
            "versions": versions(), "settings": settings(self.args),
            "result": result,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(body, indent=1, allow_nan=False) + "\n"
        files.atomic_write_text(self.folder / f"{name}.json", text)

    def all(self) -> dict[str, dict[str, Any]]:
        """Results by piece, in the order of their names."""
        paths = sorted(p for p in self.folder.glob("*.json") if not p.name.startswith("."))
        return {p.stem: self.get(p.stem) for p in paths}


# Of one script, whatever it measures.
_OWN_FLAGS = ("--xla_gpu_enable_command_buffer=", "--xla_backend_optimization_level=0")


def check_flags(path: Path, flags: str) -> None:
    """Raises `UserError` where a result was measured with other flags of XLA."""
    before = json.loads(path.read_text()).get("flags", "")
    there, here = (sorted(set(text.split()) - set(_OWN_FLAGS)) for text in (before, flags))
    if there != here:
        raise UserError(
            f"{path} was measured with XLA_FLAGS={' '.join(there)!r}, now they are "
            f"{' '.join(here)!r}: name another folder with --to"
        )


# --- what is here -----------------------------------------------------------------------------


def device() -> str:
    """JAX's name of the first device."""
    return jax.local_devices()[0].device_kind


@functools.cache
def commit() -> str | None:
    """Of the checkout; None where it is none."""
    line = ["git", "-C", os.fspath(ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(line, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


@functools.cache
def versions() -> dict[str, str]:
    """Of what computes."""
    out = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def no_peer(args: argparse.Namespace, *packages: str) -> str | None:
    """Why the PyTorch peer does not run; None where it does. `--toy` runs it on a CPU too."""
    if args.no_peer:
        return _NOT_ASKED
    absent = [
        p for p in ("torch", *packages)
        if p not in sys.modules and importlib.util.find_spec(p) is None
    ]
    if absent:
        return f"{_NOT_HERE}{', '.join(absent)} not installed"
    if args.toy:
        return None
    import torch

    return None if torch.cuda.is_available() else f"{_NOT_HERE}torch finds no CUDA device"


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device does at most, by its makers' pages.

    Attributes:
      flops: of bfloat16 products, a second.
      bandwidth: bytes/s.
      exponentials: a second.
      wide_flops: of products of float32 operands.
    """

    flops: float
    bandwidth: float
    exponentials: float
    wide_flops: float = math.inf


def ceilings() -> Ceilings | None:
    """Those of the first device; None for one that is in no table."""
    chip = chips.by_kind(device())
    if chip is None:
        return None
    gpu = gpus.GPUS.get(chip.name)
    return Ceilings(
        chip.bf16_flops, chip.hbm_bandwidth, gpu.exponentials if gpu else math.inf, chip.f32_flops
    )


def share(flops: float, seconds: float) -> float | None:
    """FLOP utilisation; None for a device that is in no table."""
    found = ceilings()
    return flops / seconds / found.flops if found else None


def measured_ceilings(toy: bool) -> dict[str, float]:
    """The same, measured: a large product and a large copy on random numbers, and a chain of
    exponentials that stays in registers. FLOP/s, bytes/s, results/s."""
    n, size, chain = (256, 2**20, 16) if toy else (8192, 2**29, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in keys[:2])
    x = jax.random.normal(keys[2], (size,), jnp.bfloat16)
    y = jax.random.uniform(keys[2], (size // 8,), jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)

    @jax.jit
    def exponentials(y):
        for _ in range(chain):
            y = jnp.exp(-y)
        return y

    found = interleaved({
        "product": lambda: jax.block_until_ready(product(a, b)),
        "copy": lambda: jax.block_until_ready(copy(x)),
        "exponentials": lambda: jax.block_until_ready(exponentials(y)),
    }, toy=toy)
    return {
        "flops": 2.0 * n**3 / found["product"]["median"],
        "bandwidth": 2.0 * x.nbytes / found["copy"]["median"],
        "exponentials": float(y.size * chain) / found["exponentials"]["median"],
    }


# --- timing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """What is measured within has the card for itself. Alone unless together.py started this: then
    it waits until the others are stopped. A turn within a turn is the same one."""
    folder = os.environ.get(TURNS)
    if folder is None or turn.taken:
        yield
        return
    mine = Path(folder) / str(os.getpid())
    mine.with_suffix(".ready").touch()
    while not mine.with_suffix(".go").exists():
        time.sleep(0.02)
    turn.taken = True
    try:
        yield
    finally:
        turn.taken = False
        mine.with_suffix(".go").unlink(missing_ok=True)


turn.taken = False


def several(run: Callable[[], Any], toy: bool) -> Callable[[], None]:
    """A run of `CALLS`, one of a toy's, of which the last is waited for: for what is so short that
    the host would be timed."""

    def runs() -> None:
        for _ in range(1 if toy else CALLS):
            out = run()
        jax.block_until_ready(out)

    return runs


def interleaved(
    runs: dict[str, Callable[[], Any]], toy: bool, seconds: float = 8.0
) -> dict[str, dict[str, float]]:
    """Seconds of each run, one after the other in turns: median, quartiles and how many.

    Args:
      runs: each waits until its work is done.
      toy: three times and no more.
      seconds: that all of it takes about.
    """
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    spent, turns = 0.0, 0
    while turns < 3 or (not toy and turns < 100 and spent < seconds):
        with turn():
            start = time.perf_counter()
            while True:
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    found[name].append(time.perf_counter() - begin)
                turns += 1
                if toy or time.perf_counter() - start > seconds / 3:
                    break
            spent += time.perf_counter() - start
    return {name: _quartiles(times) for name, times in found.items()}


def _quartiles(times: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": statistics.median(times), "low": low, "high": high, "n": len(times)}


def sustained(run: Callable[[int], Any], count: int, seconds: float, toy: bool) -> dict[str, Any]:
    """Rates of windows of calls in a row, each a turn, for so many seconds in all.

    Args:
      run: `run(calls)` makes so many calls and waits for the last.
      count: what one call works off.
      seconds: in all.
      toy: two windows of one call.
    """
    run(1)
    with turn():
        begin = time.perf_counter()
        run(1)
        one = time.perf_counter() - begin
    calls = 1 if toy else max(1, round(min(5.0, seconds / 3) / one))
    rates, total = [], 0.0
    while len(rates) < 2 or (not toy and total < seconds):
        with turn():
            begin = time.perf_counter()
            run(calls)
            took = time.perf_counter() - begin
        rates.append(calls * count / took)
        total += took
    return {
        "per_second": len(rates) * calls * count / total, "seconds": total,
        "slowest_window": min(rates), "fastest_window": max(rates),
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether a run ended for want of memory, JAX's or PyTorch's."""
    said = f"{type(error).__name__} {error}"
    return any(word in said for word in _NO_MEMORY)


def filled(shapes: Any) -> Any:
    """Arrays of these shapes on the device, of random numbers in parameters' size: for what is
    timed, without the minutes that a GPU's compiler takes for hundreds of random programs."""
    few = np.random.default_rng(0).standard_normal(1_000_003, np.float32) / 50
    return jax.tree.map(lambda s: jax.device_put(
        np.resize(few, s.shape).astype(s.dtype), getattr(s, "sharding", None)
    ), shapes)


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b|, and infinite where something is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if math.isfinite(error) else math.inf


def turned(a: Any, b: Any) -> float:
    """1 less the cosine between a and b, and infinite where something is not finite."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    error = 1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return error if math.isfinite(error) else math.inf


def check(name: str, error: float, limit: float) -> float:
    """The error, if it is below its limit. Raises `AssertionError` naming both."""
    assert error < limit, f"{name}: differs by {error:.2e} of its size, the limit is {limit:.0e}"
    return error


# --- a script ---------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What of the arguments decides results. Which pieces there are does not, nor for how long one
    of them runs: a flag more goes on in the same folder."""
    aside = ("to", "minutes", "piece", "ladder", "seconds", "window", "no_peer")
    return {k: v for k, v in sorted(vars(args).items()) if k not in aside}


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags that all scripts have."""
    out = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out.add_argument("--to", type=Path, default=Path("runs/gpu"), help="folder of results")
    out.add_argument("--minutes", type=float, default=8.5, help="after which it stops")
    out.add_argument(
        "--window", type=float, default=10.0, help="seconds for which a batch is measured"
    )
    out.add_argument("--toy", action="store_true", help="everything, tiny, on a CPU")
    out.add_argument("--no-peer", action="store_true", help="leave out the PyTorch peer")
    out.add_argument("--piece", help=argparse.SUPPRESS)
    return out


def main(
    script: str, args: argparse.Namespace, pieces: Sequence[Piece],
    table: Callable[[Book], list[list[str]]], notes: Sequence[str] = (),
) -> int:
    """Does what is missing, prints the table; 0 if nothing is left.

    Args:
      script: its path.
      args: see `parser`.
      pieces: in order.
      table: rows of cells, the first a heading.
      notes: lines below it.
    """
    book = Book(args.to / Path(script).stem, args)
    if args.toy:
        # Most of a toy's time is its compilation: as little of it as there is, and once for all.
        level = "--xla_backend_optimization_level=0"
        if level not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {level}"
        jax.config.update("jax_compilation_cache_dir", str(args.to / "compiled"))
    if args.piece:
        _one(book, next(p for p in pieces if p.name == args.piece))
        return 0
    start = time.perf_counter()
    left, failed = [], []
    # Bound by no device here: this process leaves the card to the others.
    files.bind(
        args.to / Path(script).stem / "bound", "settings.json", settings(args),
        "results of other settings, by {key}",
    )
    for path in book.folder.glob("*.json"):
        check_flags(path, os.environ.get("XLA_FLAGS", ""))
    for piece in pieces:
        if book.done(piece.name):
            continue
        spare = args.minutes - (time.perf_counter() - start) / 60
        if left or (spare < piece.minutes and not args.toy):
            left.append(piece.name)
            continue
        print(f"{piece.name} ...", file=sys.stderr, flush=True)
        why = _in_process(book, piece) if args.toy else _apart(script, piece, 60 * spare)
        if why:
            failed.append(f"{piece.name}: {why}")
            if piece.first:
                break
    print(text(table(book)))
    for line in (*notes, *(f"failed: {line}" for line in failed)):
        print(line)
    if left:
        print(f"left: {', '.join(left)}: run the same line again")
    return 1 if left or failed else 0


def _one(book: Book, piece: Piece) -> None:
    compiled.keep()
    start = time.perf_counter()
    result = piece.run(book)
    book.put(piece.name, result, time.perf_counter() - start)


def _in_process(book: Book, piece: Piece) -> None:
    _one(book, piece)


def _apart(script: str, piece: Piece, seconds: float) -> str | None:
    """Runs a piece as a process; why it failed."""
    line = [sys.executable, script, *sys.argv[1:], f"--piece={piece.name}"]
    env = {**MEMORY, **os.environ}
    try:
        done = subprocess.run(line, env=env, timeout=seconds, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        sys.stderr.write(done.stderr[-4000:])
        return said[-1][:300]
    return None


def text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """For a cell: so many digits, without exponents where they do not help; - for None."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{places}f}"
    return f"{value:.{digits - 1}e}"


def percent(value: float | None) -> str:
    """For a cell."""
    return "-" if value is None else f"{100 * value:.1f}%"
