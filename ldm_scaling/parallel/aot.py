"""Programs compiled ahead of time for TPUs and GPUs that are not here, by their own compilers:
libtpu (`aot_tpu`), and XLA's for CUDA (`aot_gpu`).

What comes back are the compiler's figures: memory that it has laid out, operations that it counts,
a time that it thinks possible. Nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import aot_gpu, aot_tpu, chips, gpu_program, gpus, hlo
from ldm_scaling.parallel import collectives as collectives_lib

# At the usual effort a network of 866M compiles for 13 minutes instead of 2 to 3.
_EFFORT = (
    ("jax_exec_time_optimization_effort", -1.0),
    ("jax_optimization_level", "O1"),  # Since jax 0.12.
)
CostOf = Callable[[hlo.CustomCall], tuple[float, float] | None]


class DoesNotFit(Exception):
    """The compiler finds no layout that the chip's memory holds.

    Attributes:
      needed, available: bytes, as it says, or as given; None where it does not.
      lowered: see `Program`.
    """

    def __init__(
        self, message: str, needed: float | None = None, available: float | None = None,
        lowered: str = "",
    ):
        super().__init__(message)
        sizes = re.search(r"([\d.]+)([MG]) of ([\d.]+)([MG]) hbm", message) or re.search(
            r"\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+)([MG])\)", message
        )
        unit = {"M": 2**20, "G": 2**30}
        self.needed, self.available, self.lowered = needed, available, lowered
        if sizes:
            a, b, c, d = sizes.groups()
            self.needed, self.available = float(a) * unit[b], float(c) * unit[d]


def check(name: str) -> None:
    """Raises what `topology` would, of a name or of a compiler that is not installed."""
    (aot_gpu if aot_gpu.is_name(name) else aot_tpu).check(name)


def topology(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of slices that are not here, for a mesh to compile for.

    Args:
      name: e.g. `v5e:16x16`, chips along each side (`aot_tpu.TOPOLOGIES`), or `h100:8`, GPUs.
      num_slices: how many of these, joined by the data-centre network; of TPUs alone.

    Raises:
      MissingPackageError: without the compiler.
      UserError: for a name that is not known, naming the nearest.
    """
    check(name)
    if aot_gpu.is_name(name):
        if num_slices != 1:
            raise UserError(
                f"num_slices={num_slices} is for TPUs: say all GPUs, e.g. {name.split(':')[0]}:16"
            )
        return aot_gpu.topology(name)
    return aot_tpu.topology(name, num_slices)


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


def on_gpu(devices: Iterable[Any]) -> bool:
    """Whether these are GPUs."""
    return next(iter(devices)).platform == "gpu"


def one_host(devices: Iterable[Any]) -> list[jax.Device]:
    """The devices of one process of a slice, as a slice by themselves: for a part of a large one
    libtpu does not compile.

    Raises:
      UserError: as `chip_of`.
    """
    devices = list(devices)
    chip, shared = chip_of(devices)
    own = sum(d.process_index == devices[0].process_index for d in devices)
    if on_gpu(devices):
        return topology(f"{chip.name}:{own}")
    return topology(aot_tpu.of_chips(chip.name, own // shared))


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
      flops, bytes: by XLA's count, loops' iterations and kernels included; of a GPU's program those
        of its kernels' products, operands and results.
      optimistic_seconds: the compiler's own estimate, loops included; kernels, which it takes for
        nothing, at their peak. Of a GPU's program, for which it has none, its kernels one after the
        other, each at the peak of what it needs longest for.
      sent: bytes that the device sends over links within its slice, or host of GPUs, at least.
      slice_sent: bytes that it sends to other slices, or hosts of GPUs, at least.
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
      counted: FLOPs, bytes and seconds as XLA's cost analysis gives them; None of a GPU's program.
      unpriced: operations without a time of the compiler's; theirs is taken for 0.
      loop_factors: what FLOPs and bytes were multiplied by, see `hlo.loop_factors`.
      unknown_loops: loops that count once for their length is decided at run time.
      collectives: the exchanges.
      kernels: (name, times, FLOPs, bytes of all) of custom calls, by the caller's count.
      uncounted: names of custom calls that the caller does not know.
      lower_seconds, compile_seconds: that it took.
      sorts: of a GPU's program, kind of kernel -> how many, FLOPs, bytes and seconds of all.
      options: of the compiler that it could not do without.
      lowered: hash of what the compiler was given: the text without its places in the code, the
        devices, the options; empty of a program that `read` was given.
    """

    memory: Memory
    work: Work
    counted: tuple[float, float, float] | None
    unpriced: int
    loop_factors: tuple[float, float]
    unknown_loops: int
    collectives: tuple[collectives_lib.Collective, ...]
    kernels: tuple[tuple[str, int, float, float], ...]
    uncounted: tuple[str, ...]
    lower_seconds: float
    compile_seconds: float
    sorts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lowered: str = ""

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
def _reduced_effort() -> Iterator[None]:
    name, value = next((name, value) for name, value in _EFFORT if hasattr(jax.config, name))
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile(
    jitted: Any, *args: Any, mesh: Mesh, cost_of: CostOf = lambda call: None,
    options: Mapping[str, Any] | None = None,
    known: Mapping[str, Program | DoesNotFit] = types.MappingProxyType({}),
) -> Program:
    """Compiles a jitted function for a mesh of devices that are not here.

    Args:
      jitted: what `jax.jit` returned.
      *args: `jax.ShapeDtypeStruct`s with shardings on the mesh.
      mesh: the devices.
      cost_of: (FLOPs, bytes) of one run of a custom call on one device, None for one that is not
        known.
      options: the compiler's, XLA's flags without dashes.
      known: what came of programs by `Program.lowered`, of the same compiler, kernels' costs and
        code of this room; these are lowered, but not compiled again.

    Raises:
      DoesNotFit: where it needs more memory than a device has.
    """
    start = time.perf_counter()
    devices = list(mesh.devices.flat)
    options = dict(options or {})
    if on_gpu(devices):
        with aot_gpu.as_on(devices[0]):
            lowered = jitted.trace(*args).lower(lowering_platforms=("cuda",))
        middle = time.perf_counter()
        name = _name(lowered, devices, options)
        if name in known:
            return _came(known[name])
        compiled, own = _gpu_compiled(lowered, options)
        end = time.perf_counter()
        program = read(compiled, mesh, cost_of, middle - start, end - middle)
        return _fitting(dataclasses.replace(program, options=own, lowered=name), devices)
    lowered = jitted.lower(*args)
    middle = time.perf_counter()
    name = _name(lowered, devices, options)
    if name in known:
        return _came(known[name])
    with _reduced_effort():
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" in str(e) and re.search(r"\bhbm\b", str(e), re.IGNORECASE):
                raise DoesNotFit(str(e), lowered=name) from e
            raise
    end = time.perf_counter()
    program = read(compiled, mesh, cost_of, middle - start, end - middle)
    return dataclasses.replace(program, lowered=name)


def _name(lowered: Any, devices: list[Any], options: dict[str, Any]) -> str:
    """See `Program.lowered`. XLA for GPUs looks at the capacity, too."""
    chip, _ = chip_of(devices)
    places = [
        (d.device_kind, getattr(d, "slice_index", 0), tuple(getattr(d, "coords", (d.id,))))
        for d in devices
    ]
    return files.sha256_of([lowered.as_text(), places, options, _EFFORT, chips.capacity(chip)])


def _came(known: Program | DoesNotFit) -> Program:
    if isinstance(known, DoesNotFit):
        raise known
    return known


def _gpu_compiled(lowered: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A program for a GPU, and what was added to the options: without a card to try tiles on, XLA
    finds none for some products, as those of `jax.image.resize`, and does them without Triton."""
    try:
        return lowered.compile(compiler_options=options), {}
    except jax.errors.JaxRuntimeError as e:
        if "Couldn't find output tile sizes" not in str(e):
            raise
    own = {"xla_gpu_enable_triton_gemm": False}
    return lowered.compile(compiler_options=options | own), own


def _fitting(program: Program, devices: list[Any]) -> Program:
    """The same. Raises `DoesNotFit` where it needs more than the device's programs may take, which
    XLA for GPUs does not look at."""
    chip, _ = chip_of(devices)
    needed, available = program.memory.total, chips.capacity(chip)
    if needed > available:
        raise DoesNotFit(f"{needed / 1e9:.2f} of {available / 1e9:.2f} GB", needed, available,
                         program.lowered)
    return program


def read(
    compiled: Any, mesh: Mesh, cost_of: CostOf = lambda call: None, lower_seconds: float = 0.0,
    compile_seconds: float = 0.0,
) -> Program:
    """The figures of a `jax.stages.Compiled`; the arguments are `compile`'s."""
    devices = list(mesh.devices.flat)
    chip, shared = chip_of(devices)
    gpu = on_gpu(devices)
    slices = [d.process_index if gpu else getattr(d, "slice_index", 0) for d in devices]
    module = hlo.parse(compiled.as_text())
    exchanges = collectives_lib.of(module, len(devices), slices if len(set(slices)) > 1 else None)
    if gpu:
        work, sorts = _gpu_work(module, chip, exchanges)
        return Program(
            _memory(compiled), work, None, 0, (1.0, 1.0), module.unknown_loops, tuple(exchanges),
            (), (), lower_seconds, compile_seconds, sorts,
        )
    kernels, uncounted = [], []
    for call in hlo.custom_calls(module):
        cost = cost_of(call)
        if cost is None:
            uncounted.append(call.name)
        else:
            kernels.append((call.name, call.times, *cost))
    counted = compiled.cost_analysis()
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
        memory=_memory(compiled),
        work=Work(
            by_flops * flops + kernel_flops, by_bytes * moved + kernel_bytes, seconds,
            *_sent(exchanges),
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


def _memory(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.temp_size_in_bytes, stats.generated_code_size_in_bytes,
    )


def _sent(exchanges: Iterable[collectives_lib.Collective]) -> tuple[float, float]:
    """Bytes within a slice, and to others."""
    within = sum(c.times * (c.sent - c.slice_sent) for c in exchanges)
    return within, sum(c.times * c.slice_sent for c in exchanges)


def _gpu_work(
    module: hlo.Module, chip: chips.Chip, exchanges: list[collectives_lib.Collective]
) -> tuple[Work, dict[str, dict[str, float]]]:
    """What a GPU's program does, and the same by its kernels' kinds. Where a loop of an unknown
    number of iterations has most of its FLOPs, as in the sampler's, one of these, without what is
    before and behind the loop."""
    gpu = gpus.GPUS[chip.name]
    peaks = (chip.bf16_flops, chip.f32_flops, chip.hbm_bandwidth, gpu.exponentials)
    sorts: dict[str, dict[str, float]] = {}
    # Exchanges are counted by what they send.
    found = [one for one in gpu_program.kernels(module) if one.kind != "exchange"]
    turns = [one for one in found if one.turn]
    if 2 * sum(one.times * one.flops for one in turns) > sum(o.times * o.flops for o in found):
        found = turns
    for kernel in found:
        row = sorts.setdefault(
            kernel.kind, {"count": 0, "flops": 0.0, "bytes": 0.0, "seconds": 0.0}
        )
        row["count"] += kernel.times
        row["flops"] += kernel.times * kernel.flops
        row["bytes"] += kernel.times * kernel.bytes
        row["seconds"] += kernel.times * kernel.once(*peaks)
    flops, moved, seconds = (
        sum(row[name] for row in sorts.values()) for name in ("flops", "bytes", "seconds")
    )
    sorts = dict(sorted(sorts.items(), key=lambda pair: -pair[1]["seconds"]))
    return Work(flops, moved, seconds, *_sent(exchanges)), sorts


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
