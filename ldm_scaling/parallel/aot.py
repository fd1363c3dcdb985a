"""Programs compiled ahead of time for TPUs that are not here, by the TPU's own compiler (libtpu).

What comes back are the compiler's figures: memory that it has laid out, operations that it counts,
a time that it thinks possible. Nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from ldm_scaling.errors import MissingPackageError, UserError
from ldm_scaling.parallel import chips, hlo
from ldm_scaling.parallel import collectives as collectives_lib

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16", "16x16x16")  # fmt: skip
# The slices that libtpu knows and that can be asked for.
TOPOLOGIES = tuple(
    f"{name}:{shape}"
    for name, shapes in (
        ("v4", _CUBIC), ("v5e", _FLAT), ("v5p", _CUBIC), ("v6e", _FLAT), ("tpu7x", _CUBIC)
    )
    for shape in shapes
)  # fmt: skip
# Off a TPU machine libtpu asks a server that is not there, locks a file against a second process,
# and complains of what it does not find.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}  # fmt: skip
# At the usual effort a network of 866M compiles for 13 minutes instead of 2 to 3.
_EFFORT = -1.0
CostOf = Callable[[hlo.CustomCall], tuple[float, float] | None]


class DoesNotFit(Exception):
    """The compiler finds no layout that the chip's memory holds.

    Attributes:
      needed, available: bytes, as it says; None where it does not.
    """

    def __init__(self, message: str):
        super().__init__(message)
        sizes = re.search(r"([\d.]+)([MG]) of ([\d.]+)([MG]) hbm", message) or re.search(
            r"\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+)([MG])\)", message
        )
        unit = {"M": 2**20, "G": 2**30}
        self.needed = self.available = None
        if sizes:
            a, b, c, d = sizes.groups()
            self.needed, self.available = float(a) * unit[b], float(c) * unit[d]


def require() -> None:
    """Raises `MissingPackageError` where the TPU's compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise MissingPackageError("libtpu", "compiling for a TPU", extra="tpu-plan")


def topology(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of slices that are not here, for a mesh to compile for.

    Args:
      name: e.g. `v5e:16x16`, chips along each side; `TOPOLOGIES` lists them.
      num_slices: how many of these, joined by the data-centre network.

    Raises:
      MissingPackageError: without libtpu.
      UserError: for a name that is not known, naming the nearest.
    """
    require()
    if name not in TOPOLOGIES:
        raise UserError(f"topology {name!r} is not known; {_nearest(name)}")
    if num_slices < 1:
        raise UserError(f"num_slices={num_slices}: give 1 or more")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    # The two cores of a v4 are one device, as on a TPU machine.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(
            name, platform="tpu", num_slices=num_slices, **options
        )
    except Exception as e:  # libtpu's errors have no type of their own.
        line = str(e).strip().splitlines()[0][:200]
        raise UserError(f"topology {name!r}, {num_slices} slices: libtpu says {line}") from e
    return list(found.devices)


def _nearest(name: str) -> str:
    kind, _, shape = name.lower().replace("-", ":").partition(":")
    kind = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "v7": "tpu7x", "v6": "v6e"}.get(
        kind, kind
    )
    same = [one for one in TOPOLOGIES if one.startswith(f"{kind}:")]
    if shape.isdecimal():  # v5e-256: so many chips
        near = [one for one in same if _chips(one) == int(shape)]
    else:
        near = difflib.get_close_matches(f"{kind}:{shape}", TOPOLOGIES, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(same or TOPOLOGIES)}"


def _chips(name: str) -> int:
    return math.prod(int(side) for side in name.split(":")[1].split("x"))


def chip_of(devices: Iterable[Any]) -> tuple[chips.Chip, int]:
    """The chip that devices are on, and how many of them are on one.

    Raises:
      UserError: for a chip that is not in the table.
    """
    devices = list(devices)
    chip = chips.by_kind(devices[0].device_kind)
    if chip is None:
        raise UserError(f"{devices[0].device_kind} is not in the table of chips: add its figures")
    places = {
        (getattr(d, "slice_index", 0), tuple(getattr(d, "coords", (d.id,)))) for d in devices
    }
    return chip, len(devices) // len(places)


def one_host(devices: Iterable[Any]) -> list[jax.Device]:
    """The devices of one process of a slice, as a slice by themselves: for a part of a large one
    libtpu does not compile.

    Raises:
      UserError: as `chip_of`.
    """
    chip, _ = chip_of(devices)
    return topology(next(name for name in TOPOLOGIES if name.startswith(f"{chip.name}:")))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a program runs, as the compiler laid them out.

    Attributes:
      arguments: what is given.
      outputs: what is returned, less what is written over arguments that are given up.
      temporaries: the most that lives in between.
      code: the program.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does on one device in one call.

    Attributes:
      flops, bytes: by XLA's count, loops' iterations and kernels included.
      optimistic_seconds: the compiler's own estimate, loops included; kernels, which it takes for
        nothing, at their peak.
      sent: bytes that the device sends over links within its slice, at least.
      slice_sent: bytes that it sends to other slices, at least.
    """

    flops: float
    bytes: float
    optimistic_seconds: float
    sent: float
    slice_sent: float


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program's figures, on one device.

    Attributes:
      memory: see `Memory`.
      work: see `Work`.
      counted: FLOPs, bytes and seconds as XLA's cost analysis gives them.
      unpriced: operations without a time of the compiler's; theirs is taken for 0.
      loop_factors: what FLOPs and bytes were multiplied by, see `hlo.loop_factors`.
      unknown_loops: loops that count once for their length is decided at run time.
      collectives: the exchanges.
      kernels: (name, times, FLOPs, bytes of all) of custom calls, by the caller's count.
      uncounted: names of custom calls that the caller does not know.
      lower_seconds, compile_seconds: that it took.
    """

    memory: Memory
    work: Work
    counted: tuple[float, float, float]
    unpriced: int
    loop_factors: tuple[float, float]
    unknown_loops: int
    collectives: tuple[collectives_lib.Collective, ...]
    kernels: tuple[tuple[str, int, float, float], ...]
    uncounted: tuple[str, ...]
    lower_seconds: float
    compile_seconds: float

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Collectives by kind: how many run, bytes of the whole, bytes that a device sends."""
        out: dict[str, dict[str, float]] = {}
        for one in self.collectives:
            row = out.setdefault(
                one.kind, {"count": 0, "bytes": 0.0, "sent": 0.0, "slice_sent": 0.0}
            )
            row["count"] += one.times
            row["bytes"] += one.times * one.bytes
            row["sent"] += one.times * one.sent
            row["slice_sent"] += one.times * one.slice_sent
        return out


@contextlib.contextmanager
def _effort(value: float) -> Iterator[None]:
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", value)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


def compile(
    jitted: Any, *args: Any, mesh: Mesh, cost_of: CostOf = lambda call: None
) -> Program:
    """Compiles a jitted function for a mesh of devices that are not here.

    Args:
      jitted: what `jax.jit` returned.
      *args: `jax.ShapeDtypeStruct`s with shardings on the mesh.
      mesh: the devices.
      cost_of: (FLOPs, bytes) of one run of a custom call on one device, None for one that is not
        known.

    Raises:
      DoesNotFit: where it needs more memory than a device has.
    """
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    middle = time.perf_counter()
    with _effort(_EFFORT):
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" in str(e) and re.search(r"\bhbm\b", str(e), re.IGNORECASE):
                raise DoesNotFit(str(e)) from e
            raise
    end = time.perf_counter()
    return read(compiled, mesh, cost_of, middle - start, end - middle)


def read(
    compiled: Any, mesh: Mesh, cost_of: CostOf = lambda call: None, lower_seconds: float = 0.0,
    compile_seconds: float = 0.0,
) -> Program:
    """The figures of a `jax.stages.Compiled`; the arguments are `compile`'s."""
    devices = list(mesh.devices.flat)
    chip, shared = chip_of(devices)
    slices = [getattr(d, "slice_index", 0) for d in devices]
    module = hlo.parse(compiled.as_text())
    exchanges = collectives_lib.of(module, len(devices), slices if len(set(slices)) > 1 else None)
    kernels, uncounted = [], []
    for call in hlo.custom_calls(module):
        cost = cost_of(call)
        if cost is None:
            uncounted.append(call.name)
        else:
            kernels.append((call.name, call.times, *cost))
    stats, counted = compiled.memory_analysis(), compiled.cost_analysis()
    flops, moved = counted.get("flops", 0.0), counted.get("bytes accessed", 0.0)
    raw = counted.get("optimal_seconds", 0.0)
    # An operation that the cost model has no time for, as some between slices, counts as -1 s.
    unpriced = max(0, math.ceil(-raw))
    seconds = raw + unpriced
    by_flops, by_bytes = hlo.loop_factors(module)
    kernel_flops = sum(times * f for _, times, f, _ in kernels)
    kernel_bytes = sum(times * b for _, times, _, b in kernels)
    peak, bandwidth = chip.bf16_flops / shared, chip.hbm_bandwidth / shared
    once = max(flops / peak, moved / bandwidth)
    looped = max(by_flops * flops / peak, by_bytes * moved / bandwidth)
    seconds = seconds * (looped / once if once else 1.0)
    seconds += max(kernel_flops / peak, kernel_bytes / bandwidth)
    return Program(
        memory=Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.temp_size_in_bytes, stats.generated_code_size_in_bytes,
        ),
        work=Work(
            flops=by_flops * flops + kernel_flops, bytes=by_bytes * moved + kernel_bytes,
            optimistic_seconds=seconds,
            sent=sum(c.times * (c.sent - c.slice_sent) for c in exchanges),
            slice_sent=sum(c.times * c.slice_sent for c in exchanges),
        ),
        counted=(flops, moved, raw),
        unpriced=unpriced,
        loop_factors=(by_flops, by_bytes),
        unknown_loops=module.unknown_loops,
        collectives=tuple(exchanges),
        kernels=tuple(kernels),
        uncounted=tuple(sorted(set(uncounted))),
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
    )


def roofline(work: Work, chip: chips.Chip, devices_per_chip: int = 1) -> dict[str, float]:
    """Seconds that each of a device's means needs at least, at its peak: `compute` (bfloat16),
    `memory`, `links` (within a slice) and, where slices exchange, `network`.

    None of these can be undercut; whether they overlap, and what else delays, is not said.
    """
    out = {
        "compute": work.flops / (chip.bf16_flops / devices_per_chip),
        "memory": work.bytes / (chip.hbm_bandwidth / devices_per_chip),
        "links": work.sent / (chip.link_bandwidth / devices_per_chip),
    }
    if work.slice_sent and chip.network_bandwidth:
        out["network"] = work.slice_sent / (chip.network_bandwidth / devices_per_chip)
    return out
