"""Timing: seconds of the programs that pictures are drawn with, on the device that is here."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import __version__, files, machine
from ldm_scaling.models import autoencoder, backbone, clip, clip_text, text_encoder
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import guidance
from ldm_scaling.study.cost_files import Skipped, Timing
from ldm_scaling.tasks import drawing

# A timed run is as many calls in a row as take so long together: waiting for each would add the
# host's own time, which the sampler's loop does not have.
_LEAST_S = 0.05
_MOST_CALLS = 100
# Runs go on until they took so long together, within these numbers; slow calls get the fewest.
_TOTAL_S, _FEWEST, _MOST = 1.0, 5, 30
_SLOW_S, _FEWEST_SLOW = 2.0, 3
# Of the memory that is free: the compiler's figure leaves out what the runtime needs. On a CPU it
# is coarser (of the 39M member 6% too low), and other processes live there.
_SHARE, _SHARE_CPU = 0.95, 0.8
_RATE, _TIME = 7.5, 500.0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One thing to time.

    Attributes:
      part, name, batch: as `Timing`'s.
      run: `run(params, *inputs)`, to be compiled.
      inputs: shapes of its inputs.
      spec: of the network.
      dtype: what it computes in.
      narrowed: whether its parameters are in the types that it uses them in, see
        `models.narrowing`.
    """

    part: str
    name: str
    batch: int
    run: Callable
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    spec: Any
    dtype: str
    narrowed: bool = False

    @property
    def key(self) -> str:
        """Hash of all that decides the program."""
        shapes = [[list(s.shape), s.dtype.name] for s in self.inputs]
        return files.sha256_of([
            self.part, self.batch, self.spec, shapes, self.dtype, jax.__version__, __version__,
            *(["narrowed"] if self.narrowed else []),
        ])


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Programs that share parameters, which are put on the device once.

    Attributes:
      params: their shapes.
      programs: smallest batch first.
      beside: bytes that lie on the device while pictures are drawn, and not while this is timed.
    """

    params: Any
    programs: Sequence[Program]
    beside: int = 0


# --- what there is to time ----------------------------------------------------------------------


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def network(
    name: str, spec: backbone.Spec, tokens: int, batches: Sequence[int], device: jax.Device
) -> Group:
    """A call of a member's network and a guided pair of calls, as sampling runs them: on captions
    of so many tokens, with parameters that were converted before the first."""
    mesh = mesh_lib.make(devices=[device])
    denoise = drawing.denoiser(spec, mesh)
    own = backbone.param_shapes(spec)
    params = jax.eval_shape(drawing.narrowed(spec, mesh), own)
    narrowed = _bytes(params) < _bytes(own)
    dtype = hosts.compute_dtype("auto", device.platform).name

    def once(params, x_BHWC, t_B, ctx_BLD):
        return denoise(params, x_BHWC, t_B, {"context": ctx_BLD})

    def pair(params, x_BHWC, t_B, ctx_BLD, w_B, null_1LD):
        both = guidance.with_unconditional({"context": ctx_BLD}, {"context": null_1LD})
        return guidance.guided(denoise, params, x_BHWC, t_B, both, w_B)

    text = (tokens, spec.context_dim)
    programs = []
    for b in batches:
        inputs = (_floats(b, *spec.latent_shape), _floats(b), _floats(b, *text))
        programs += [
            Program("network", name, b, once, inputs, spec, dtype, narrowed),
            Program("guided", name, b, pair, (*inputs, _floats(b), _floats(1, *text)), spec, dtype,
                    narrowed),
        ]
    return Group(params, programs, _bytes(own) if narrowed else 0)


def decoder(
    name: str, spec: autoencoder.AutoencoderSpec, latent_shape: tuple[int, int, int],
    batches: Sequence[int],
) -> Group:
    """Pictures of latents."""
    decode = drawing.decoder(spec, 1.0)
    whole = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    return Group(
        {"decoder": whole["decoder"]},
        [Program("decoder", name, b, decode, (_floats(b, *latent_shape),), spec, "float32")
         for b in batches],
    )


def text(
    name: str, spec: clip.TextSpec | text_encoder.BertSpec, length: int, batches: Sequence[int]
) -> Group:
    """States of captions, from their tokens."""
    bert = isinstance(spec, text_encoder.BertSpec)
    tower = text_encoder.Bert(spec) if bert else clip_text.TextTower(spec)

    def states(variables, *tokens):
        out = tower.apply(variables, *tokens)
        return out if bert else out["last"]

    def inputs(b: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        ids = jax.ShapeDtypeStruct((b, length), jnp.int32)
        return (ids, jax.ShapeDtypeStruct((b, length), jnp.bool_)) if bert else (ids,)

    params = jax.eval_shape(tower.init, jax.random.key(0), *inputs(1))
    return Group(
        params,
        [Program("text", name, b, states, inputs(b), spec, "float32") for b in batches],
    )


# --- the device ---------------------------------------------------------------------------------


def device_kind(device: jax.Device) -> str:
    """JAX's name of it. `cpu` alone says nothing of how fast it is: with its model and cores."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        lines = ""
    model = re.search(r"^model name\s*:\s*(.+)$", lines, re.M)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"cpu {name}, {machine.cores()} cores"


def free_bytes(device: jax.Device) -> float:
    """Memory that a program may take; infinite where nothing says so."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return math.inf
    found = [math.inf]
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        found += [int(available[1]) * 1024.0] if available else []
        # A container's own limit, where it has one.
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            found.append(float(most) - float((group / "memory.current").read_text()))
    except OSError:
        pass
    return min(found)


# --- timing -------------------------------------------------------------------------------------


@functools.cache
def _pool() -> np.ndarray:
    # Random: on accelerators equal numbers take less power, and run faster.
    return np.random.default_rng(0).standard_normal(2**20 - 3).astype(np.float32)


def _filled(shapes: Any, device: jax.Device, scale: float) -> Any:
    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            value = (scale * np.resize(_pool(), leaf.shape)).astype(leaf.dtype)
        else:
            value = np.ones(leaf.shape, leaf.dtype)
        return jax.device_put(value, device)

    return jax.tree.map(one, shapes)


def _bytes(shapes: Any) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes))


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def run(
    group: Group, device: jax.Device, wanted: Callable[[Program], bool],
    done: Callable[[Timing | Skipped], None], free: float | None = None,
) -> None:
    """Times those programs of a group that are wanted, one after the other.

    What needs more memory than is free is skipped and says so, as do larger batches after it.

    Args:
      group: see `network`, `decoder`, `text`.
      device: where.
      wanted: says whether a program is to be timed.
      done: told each outcome as soon as it is there.
      free: bytes that may be taken; those that are free on the device if not given.
    """
    pending = [p for p in group.programs if wanted(p)]
    if not pending:
        return
    share = _SHARE_CPU if device.platform == "cpu" else _SHARE
    room = share * (free_bytes(device) if free is None else free)
    held = _bytes(group.params) + group.beside

    def skip(program: Program, need: str) -> None:
        why = f"needs {need}, {_gb(room)} are free on the device"
        done(Skipped(program.part, program.name, program.batch, why))

    if held > room:
        for program in pending:
            skip(program, f"{_gb(held)} for parameters alone")
        return
    params = None
    lost: dict[str, int] = {}
    for program in pending:
        if program.batch > lost.get(program.part, program.batch):
            skip(program, f"more than batch size {lost[program.part]}, which did not fit")
            continue
        try:
            compiled, hidden = _compiled(program, group.params, device)
            arguments = _bytes(group.params) + _bytes(program.inputs)
            need = _needs(compiled, arguments, hidden) + group.beside
            if need > room:
                lost[program.part] = program.batch
                skip(program, _gb(need))
                continue
            if params is None:
                params = _filled(group.params, device, 0.05)
            done(_timed(program, compiled, params, _inputs(program, device), need))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            lost[program.part] = program.batch
            skip(program, "more memory than the device gives")


def _compiled(program: Program, params: Any, device: jax.Device) -> tuple[Any, int]:
    """The program, and what it needs of the device's memory beside what the compiler says."""
    place = jax.sharding.SingleDeviceSharding(device)

    def at(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    traced = jax.jit(program.run).trace(*jax.tree.map(at, (params, *program.inputs)))
    # XLA:CPU's figure leaves out what its fused products take: of attention, all of the logits.
    hidden = _largest(traced.jaxpr.jaxpr) if device.platform == "cpu" else 0
    return traced.lower().compile(), hidden


def _largest(jaxpr: Any) -> int:
    """Most bytes of operands and results of one operation."""
    most = 0
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
        inner = [v for v in inner if hasattr(v, "eqns")]
        if inner:
            most = max(most, *map(_largest, inner))
        else:
            held = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            most = max(most, sum(
                math.prod(v.shape) * v.dtype.itemsize for v in held
                if isinstance(getattr(v, "dtype", None), np.dtype)
            ))
    return most


def _needs(compiled: Any, arguments: int, hidden: int) -> int:
    """Bytes on the device: arguments, results and what lies between."""
    found = compiled.memory_analysis()
    if found is None:  # Of a platform that does not say.
        return arguments + hidden
    between = max(found.temp_size_in_bytes, hidden)
    sizes = (
        max(found.argument_size_in_bytes, arguments), found.output_size_in_bytes, between,
        -found.alias_size_in_bytes,
    )
    return int(sum(sizes))


def _inputs(program: Program, device: jax.Device) -> tuple[jax.Array, ...]:
    inputs = list(_filled(program.inputs, device, 1.0))
    if program.part in ("network", "guided"):
        inputs[1] = jax.device_put(np.full(program.batch, _TIME, np.float32), device)
    if program.part == "guided":
        inputs[3] = jax.device_put(np.full(program.batch, _RATE, np.float32), device)
    return tuple(inputs)


def _timed(program: Program, compiled: Any, params: Any, inputs: tuple, need: int) -> Timing:
    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(params, *inputs)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    first = seconds(1)
    one = seconds(1)
    calls = max(1, min(_MOST_CALLS, math.ceil(_LEAST_S / one)))
    found = [one] if calls == 1 else []
    fewest = _FEWEST_SLOW if one > _SLOW_S else _FEWEST
    while len(found) < fewest or (len(found) < _MOST and sum(found) * calls < _TOTAL_S):
        found.append(seconds(calls))
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return Timing(
        program.part, program.name, program.batch, program.key, program.dtype,
        statistics.median(found), low, high, first, len(found), need,
    )
