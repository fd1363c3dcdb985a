"""What a job will need, before the first hour of it: its programs compiled for devices that are not
here, and if they do not fit, what makes them fit.

Every figure is the compiler's or follows from it; nothing is measured.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import ldm_scaling
from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.config.training import BOOKKEEPING
from ldm_scaling.models import cost, zoo
from ldm_scaling.parallel import aot, aot_gpu, chips, collectives, hlo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import caching_cost, plan_parts, plan_remedies
from ldm_scaling.study.plan_parts import Part
from ldm_scaling.tasks.distillation import student

GB = 1e9
NOTES = (
    "Nothing here is measured: bounds from the compiler's figures, at the chip's peak, with the "
    "input ready, no failures and no pauses.",
    "GB are 1e9 bytes. Capacity is what libtpu lets one program take; a process holds more than "
    "one, and batches on their way.",
    "XLA counts a loop's body once (gradient accumulation, chunked attention): its FLOPs, bytes "
    "and seconds are multiplied by what this package counts of products and operands with the "
    "iterations over without them (loop_factors). Rows of the sampler are counted once each.",
    "Pallas kernels, which XLA takes for nothing, are counted by hand: attention's forward pass "
    "4 B N L M W FLOPs, its fused backward pass 2.5 times that; the bytes of its operands and "
    "results.",
    "The bound is the larger of the compiler's time and the roofline's, which is that of compute, "
    "memory, links or network, whichever needs longest, as if all others hid behind it.",
)
GPU_NOTES = (
    NOTES[0],
    "GB are 1e9 bytes. Capacity is what of a GPU's memory JAX takes as it starts: three quarters, "
    "or XLA_CLIENT_MEM_FRACTION. Programs are served from it, more than one in a process.",
    "Without a GPU nothing is tried out: which convolution of cuDNN's and which tiles of a product "
    "it would choose, and their workspaces, are not known.",
    "FLOPs are those of products, convolutions (taps on padding included) and attention; bytes are "
    "each kernel's operands and results, of slices their own size, once: what stays in L2 from one "
    "kernel to the next may take less. What a condition decides is not counted.",
    "The bound is the larger of two: the kernels one after the other, each at the peak of compute, "
    "memory or exponentials, whichever it needs longest, without launches; and the roofline of "
    "compute, memory, links (NVLink) or network (between hosts), whichever needs longest.",
)
_ROOT = Path(ldm_scaling.__file__).parent
# What decides a program besides the config; whatever else changes, a plan stays.
_ROOMS = ("config", "diffusion", "models", "parallel", "sampling", "tasks", "training")
_FILES = ("caching", "plan", "plan_parts", "plan_remedies")  # of the study's room
# What reads a compiled program.
_READERS = ("aot", "chips", "collectives", "gpu_program", "gpus", "hlo")  # of the room parallel


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      topology: e.g. `v5e:16x16`, see `aot_tpu.TOPOLOGIES`, or `h100:8`, see `gpus.GPUS`.
      num_slices: how many of these.
    """

    topology: str
    num_slices: int = 1


Compile = Callable[[Part], aot.Program]


def kernel_cost(call: hlo.CustomCall) -> tuple[float, float] | None:
    """(FLOPs, bytes) of a run of splash attention on one device; None for other kernels.

    Of q_BNWL, k_BNWM, as `models.attention` gives them to it: 2 products forward, 5 in the fused
    backward pass, each 2 B N L M W.
    """
    products = {"fwd": 2, "dkv": 5}
    found = next((n for name, n in products.items() if f"_{name}" in call.name), None)
    if found is None or "splash" not in call.name:
        return None
    tensors = [
        (kind, dims) for kind, dims in (*call.operands, *call.results)
        if len(dims) >= 3 and kind in ("bf16", "f16", "f32")
    ]
    (_, q), (_, k) = tensors[:2]
    heads = 1
    for size in q[:-2]:
        heads *= size
    flops = 2.0 * found * heads * q[-1] * k[-1] * q[-2]
    return flops, float(sum(hlo.size_of((one,)) for one in tensors))


def compile_part(
    part: Part, known: Mapping[str, aot.Program | aot.DoesNotFit] = types.MappingProxyType({}),
) -> aot.Program:
    """Compiles a part for its mesh's devices, unless its program is `known`."""
    return aot.compile(part.program, *part.args, mesh=part.mesh, cost_of=kernel_cost, known=known)


def known(
    plan: Mapping[str, Any] | None, target: Target
) -> dict[str, aot.Program | aot.DoesNotFit]:
    """What a plan of before tells of the programs that were compiled for it, by
    `aot.Program.lowered`: nothing where it does not name them, or another compiler made or other
    code read them."""
    if plan is None or plan.get("reader") != reader(target):
        return {}
    out: dict[str, aot.Program | aot.DoesNotFit] = {
        row["program"]: aot.DoesNotFit(
            "", row["hbm_gb"] and row["hbm_gb"] * GB, lowered=row["program"])
        for row in plan["tried"] if not row["fits"]
    }
    return out | ({plan["program"]: _program(plan)} if plan["fits"] else {})


def _program(plan: Mapping[str, Any]) -> aot.Program:
    """Of a plan's figures what `_figures` makes them of, in fractions where these are sums."""
    memory = {name: round(size * GB) for name, size in plan["hbm_by_kind_gb"].items()}
    outputs, temporaries, code = (memory.pop(n) for n in ("outputs", "temporaries", "code"))
    exchanges = tuple(
        collectives.Collective(kind, row["count"], group=0, **{
            name: Fraction(row[name]) / row["count"] for name in ("bytes", "sent", "slice_sent")})
        for kind, row in plan["collectives"].items()
    )
    sent = sum(Fraction(row["sent"]) for row in plan["collectives"].values())
    beyond = sum(Fraction(row["slice_sent"]) for row in plan["collectives"].values())
    counts = plan["xla_counts"]
    return aot.Program(
        memory=aot.Memory(sum(memory.values()), outputs, temporaries, code),
        work=aot.Work(
            plan["flops"], plan["bytes"], plan["compiler_seconds"], float(sent - beyond),
            float(beyond),
        ),
        counted=counts and (counts["flops"], counts["bytes"], counts["seconds"]),
        unpriced=plan["operations_without_a_time"],
        loop_factors=(plan["loop_factors"]["flops"], plan["loop_factors"]["bytes"]),
        unknown_loops=plan["loops_counted_once"],
        collectives=exchanges,
        kernels=tuple(
            (row["name"], row["calls"], Fraction(row["flops"]) / row["calls"],
             Fraction(row["bytes"]) / row["calls"])
            for row in plan["kernels"]
        ),
        uncounted=tuple(plan["kernels_not_counted"]),
        lower_seconds=plan["lower_seconds"],
        compile_seconds=plan["compile_seconds"],
        sorts=plan["kernels_by_kind"],
        options=plan["compiler_options"],
        lowered=plan["program"],
    )


# --- a plan -----------------------------------------------------------------------------------


def with_batch(study: Study, kind: str, batch: int | None) -> Study:
    """The config with another batch: of training, or as lanes of sampling and decoding."""
    if batch is None:
        return study
    if kind.startswith(plan_parts.DISTILL):
        distill, stage = plan_parts.stage_of(study, kind)
        run = stage.run
        train = dataclasses.replace(getattr(distill, run), batch_size=batch)
        return plan_remedies.changed(study, distill.NAME, **{run: train})
    if kind == plan_parts.FINETUNE:
        train = dataclasses.replace(study.finetune.train, batch_size=batch)
        return plan_remedies.changed(study, "finetune", train=train)
    part = "sweep" if kind in ("sample", "decode") else "train"
    return plan_remedies.changed(study, part, batch_size=batch)


def make(
    study: Study, member: str, target: Target, kind: str, devices: list[jax.Device] | None = None,
    compile: Compile = compile_part,
) -> dict[str, Any]:
    """The plan of one part of a job, as JSON takes it.

    Args:
      study: the config.
      member: the network.
      target: where it shall run.
      kind: as `plan_parts.build`'s.
      devices: of the target; asked of its compiler if None.
      compile: what compiles.

    Raises:
      MissingPackageError: without the target's compiler.
      UserError: for a topology that is not known, or a batch that does not split.
    """
    if devices is None:
        devices = aot.topology(target.topology, target.num_slices)
    chip, shared = aot.chip_of(devices)
    its_key = key(study, member, target, kind)
    name, train = plan_parts.run_of(study, kind)
    study = dataclasses.replace(study, train=train)
    changed: dict[str, Any] = {}
    if study.mesh.data != -1 and study.mesh.data % target.num_slices:
        # Slices hold whole replicas: a config for one slice is spread over them.
        changed = {"mesh.data": study.mesh.data * target.num_slices}
        study = plan_remedies.changed(study, "mesh", data=changed["mesh.data"])
    found, tried = _attempt(study, member, kind, devices, compile, None)
    if found is None:
        for remedy in plan_remedies.of(study, kind, devices):
            remedy = remedy.of_run(name)
            found, row = _attempt(remedy.study, member, kind, devices, compile, remedy)
            tried, changed = tried + row, changed | remedy.keys
            if found:
                break
    capacity = chips.capacity(chip) / shared
    body = {
        "member": member, "topology": target.topology, "num_slices": target.num_slices,
        "kind": kind, "before": plan_parts.before(study, kind),
        "batch": _batch(study, kind), "chip": chip.name,
        "chips": len(devices) // shared, "devices_per_chip": shared,
        "fits": found is not None,
        "hbm_gb": None, "hbm_capacity_gb": capacity / GB,
        "seconds_per_step_bound": None, "days_bound": None, "chip_hours_bound": None,
        "mesh": None, "compile_seconds": None,
        "remedies": [f"--config.{k}={v}" for k, v in changed.items() if found],
        "tried": tried, "key": its_key, "program": None, "reader": reader(target),
        "versions": versions(target),
        "notes": list(GPU_NOTES if aot.on_gpu(devices) else NOTES),
    }
    if found is None:
        body["hbm_gb"] = tried[-1]["hbm_gb"]
        return body
    fitting, part, program = found
    return body | _figures(fitting, member, part, program, chip, shared, len(devices))


def _attempt(
    study: Study, member: str, kind: str, devices: list[jax.Device], compile: Compile,
    remedy: plan_remedies.Remedy | None,
) -> tuple[tuple[Study, Part, aot.Program] | None, list[dict[str, Any]]]:
    """Compiles; returns what fits, and what is to be said of it among the remedies."""
    row = {
        "remedy": remedy.name if remedy else None, "flags": remedy.flags if remedy else [],
    }
    part = plan_parts.build(study, member, devices, kind)
    try:
        program = compile(part)
    except aot.DoesNotFit as e:
        needed = e.needed / GB if e.needed else None
        return None, [row | {"fits": False, "hbm_gb": needed, "program": e.lowered}]
    if remedy is None:
        return (study, part, program), []
    times = _times(program, *aot.chip_of(devices))
    fits = {
        "fits": True, "hbm_gb": program.memory.total / GB,
        "seconds_per_step_bound": times["seconds_per_step_bound"],
    }
    return (study, part, program), [row | fits]


def _batch(study: Study, kind: str) -> int | None:
    """What the config says; the caches' batches are none of its keys."""
    batches = {"train": study.train.batch_size, "encode": None, "text": None}
    if kind.partition(":")[0] in (plan_parts.DISTILL, plan_parts.FINETUNE):
        return study.train.batch_size
    return batches.get(kind, study.sweep.batch_size)


def _times(program: aot.Program, chip: chips.Chip, shared: int) -> dict[str, Any]:
    roof = aot.roofline(program.work, chip, shared)
    slowest = max(roof, key=roof.get)
    bound = max(program.work.optimistic_seconds, roof[slowest])
    # Sums of the same kernels differ in their last digits.
    compiler = program.work.optimistic_seconds >= roof[slowest] * (1 - 1e-9)
    return {
        "compiler_seconds": program.work.optimistic_seconds,
        "roofline_seconds": roof,
        "roofline_binds": slowest,
        "binds": "compiler" if compiler else f"roofline: {slowest}",
        "seconds_per_step_bound": bound,
    }


def _figures(
    study: Study, member: str, part: Part, program: aot.Program, chip: chips.Chip, shared: int,
    devices: int,
) -> dict[str, Any]:
    memory, work = program.memory, program.work
    times = _times(program, chip, shared)
    seconds = times["seconds_per_step_bound"]
    rest = memory.arguments - sum(part.held.values())
    held = {**part.held, "other arguments and padding": rest}
    named = {"outputs": memory.outputs, "temporaries": memory.temporaries, "code": memory.code}
    out = {
        "program": program.lowered,
        "hbm_gb": memory.total / GB,
        "hbm_gib": memory.total / 2**30,
        "hbm_by_kind_gb": {name: size / GB for name, size in (held | named).items()},
        "mesh": {
            "data": part.mesh.shape["data"], "fsdp": mesh_lib.fsdp(part.mesh),
            "tensor": part.mesh.shape["tensor"],
        },
        "mesh_axes": dict(part.mesh.shape),
        "processes_side_by_side": part.copies,
        "batch": part.examples,
        "flops": work.flops,
        "bytes": work.bytes,
        "xla_counts": program.counted and dict(
            zip(("flops", "bytes", "seconds"), program.counted)
        ),
        "operations_without_a_time": program.unpriced,
        "compiler_options": program.options,
        "loop_factors": dict(zip(("flops", "bytes"), program.loop_factors)),
        "loops_counted_once": program.unknown_loops,
        "kernels": _kernels(program),
        "kernels_not_counted": list(program.uncounted),
        "kernels_by_kind": program.sorts,
        "collectives": program.by_kind(),
        **times,
        "examples_per_second_bound": part.examples * part.copies / seconds,
        "lower_seconds": program.lower_seconds,
        "compile_seconds": program.compile_seconds,
        "settings": _settings(study),
    }
    return out | _of_kind(study, member, part, work, seconds, devices, shared)


def _kernels(program: aot.Program) -> list[dict[str, Any]]:
    """Calls, FLOPs and bytes of all calls of each kernel."""
    out: dict[str, dict[str, Any]] = {}
    for name, times, flops, moved in program.kernels:
        row = out.setdefault(name, {"name": name, "calls": 0, "flops": 0.0, "bytes": 0.0})
        row["calls"] += times
        row["flops"] += times * flops
        row["bytes"] += times * moved
    return list(out.values())


def _settings(study: Study) -> dict[str, Any]:
    """What remedies may have changed."""
    return {
        "train.attention": study.train.attention, "train.remat": study.train.remat,
        "train.micro_batches": study.train.micro_batches,
        "train.moment_dtype": study.train.moment_dtype,
        "train.batch_size": study.train.batch_size, "sweep.batch_size": study.sweep.batch_size,
    }


def _of_kind(
    study: Study, member: str, part: Part, work: aot.Work, seconds: float, devices: int,
    shared: int,
) -> dict[str, Any]:
    """What is said of training or sampling alone."""
    if part.kind == "train":
        spec = plan_parts.spec_of(study, member)
        one = caching_cost.train_gflops(spec, study.data.text_length) * 1e9
        analytic = one * part.examples / devices
        steps = study.train.steps - study.start.passed
        days = steps * seconds / 86400
        share = None
        if not study.data.text_weights:
            frozen = 1e9 * (
                caching_cost.image_gflops(plan_parts.autoencoder_of(study), study.data.side)
                + caching_cost.text_gflops(
                    plan_parts.text_encoder.BertSpec(), study.data.text_length
                )
            )
            share = frozen / (frozen + one)
        return {
            "steps": steps, "days_bound": days,
            "chip_hours_bound": 24 * days * devices / shared,
            "analytic_flops": analytic, "flops_over_analytic": work.flops / analytic,
            "frozen_encoders_share_of_flops": share,
        }
    if part.kind.startswith(plan_parts.DISTILL):
        distill, stage = plan_parts.stage_of(study, part.kind)
        specs = plan_parts.distilled_specs(study, member, part.kind)
        one = student.flops_per_example(stage, distill, *specs, study.data.text_length)
        analytic = one * part.examples / devices
        days = study.train.steps * seconds / 86400
        return {
            "stage": stage.name, "steps": study.train.steps, "days_bound": days,
            "chip_hours_bound": 24 * days * devices / shared,
            "analytic_flops": analytic, "flops_over_analytic": work.flops / analytic,
        }
    if part.kind == plan_parts.FINETUNE:
        network = caching_cost.train_gflops(
            plan_parts.spec_of(study, member), study.data.text_length)
        autoencoder = plan_parts.autoencoder_of(study)
        # Of the picture, and of what is given of it.
        encoder = 2 * caching_cost.image_gflops(autoencoder, study.data.side)
        analytic = 1e9 * (network + encoder) * part.examples / devices
        days = study.train.steps * seconds / 86400
        return {
            "steps": study.train.steps, "days_bound": days,
            "chip_hours_bound": 24 * days * devices / shared,
            "analytic_flops": analytic, "flops_over_analytic": work.flops / analytic,
            "encoder_share_of_flops": encoder / (encoder + network),
        }
    if part.kind == "sample":
        spec = plan_parts.spec_of(study, member)
        one = cost.gflops(spec, study.data.text_length) * 1e9
        analytic = one * 2 * part.examples / part.mesh.size
        rate = part.examples * part.copies / seconds
        return {
            "analytic_flops": analytic, "flops_over_analytic": work.flops / analytic,
            "images_per_second_bound": {
                f"{steps} rows": rate / steps for steps in sorted({*study.sweep.steps})
            },
        }
    return {}


def frozen_share(plans: dict[str, dict[str, Any]]) -> float | None:
    """The share of the frozen encoders' seconds in a training step without caches, by the bounds
    of `train`, `encode` and `text`; None where one of them does not fit."""
    if not all(plans[kind]["fits"] for kind in ("train", "encode", "text")):
        return None
    rates = [plans[kind]["examples_per_second_bound"] for kind in ("encode", "text")]
    frozen = sum(1 / rate for rate in rates)
    return frozen / (frozen + 1 / plans["train"]["examples_per_second_bound"])


# --- what a plan depends on -------------------------------------------------------------------


def key(study: Study, member: str, target: Target, kind: str) -> str:
    """Hash of all that decides a plan: settings, code (but not its comments), versions."""
    tree = dataclasses.asdict(study)
    for run in (tree["train"], tree["autoencoder"]["train"]):
        for name in set(BOOKKEEPING) - {"attention", "averages"}:
            del run[name]
    kept = {name: tree[name] for name in ("autoencoder", "diffusion", "train", "mesh")}
    for part, names in (
        ("data", ("side", "text_length", "text_weights", "latent_dtype", "text_dtype")),
        ("sweep", ("batch_size", "steps")),
    ):
        kept[part] = {name: tree[part][name] for name in names}
    if kind.startswith(plan_parts.DISTILL):
        distill, stage = plan_parts.stage_of(study, kind)
        kept["distill"] = [distill.hash, stage.name, stage.train.attention]
    if kind == plan_parts.FINETUNE:
        kept["finetune"] = [study.finetune.hash, study.finetune.train.attention]
    spec = zoo.get(member).spec
    return files.sha256_of(
        [kept, member, spec, dataclasses.astuple(target), kind, code(), versions(target)]
    )


@functools.cache
def code() -> str:
    """Hash of the modules that programs are built from, without comments and docstrings."""
    paths = [p for room in _ROOMS for p in sorted((_ROOT / room).rglob("*.py"))]
    return _hash([*paths, *(_ROOT / "study" / f"{name}.py" for name in _FILES)])


@functools.cache
def reader(target: Target) -> str:
    """Hash of what makes figures of a lowered program: the compiler, and the code that reads what
    it compiled."""
    its = {name: version for name, version in versions(target).items()
           if name not in ("ldm_scaling", "jax", "flax", "optax")}
    paths = [_ROOT / "parallel" / f"{name}.py" for name in _READERS]
    return files.sha256_of([its, _bare(inspect.getsource(kernel_cost)), _hash(paths)])


def _hash(paths: list[Path]) -> str:
    return files.sha256_of([[str(p.relative_to(_ROOT)), _bare(p.read_text())] for p in paths])


def _bare(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
            body[0].value, ast.Constant
        ):
            body[0].value = ast.Constant("")
    return ast.unparse(tree)


def versions(target: Target) -> dict[str, str]:
    """Of what compiles."""
    out = {"ldm_scaling": ldm_scaling.__version__}
    compiler = aot_gpu.package() if aot_gpu.is_name(target.topology) else "libtpu"
    for name in ("jax", "jaxlib", compiler, "flax", "optax"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out
