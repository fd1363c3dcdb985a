"""The heaviest kernels of a train step and of sampling, and what share of its bound each reaches.

    python benchmarks/gpu/kernels.py --to=runs/gpu [--member=866m --batch=64]
    python benchmarks/gpu/kernels.py --toy --to=/tmp/toy

`jax.profiler` records some steps; `jax.profiler.ProfileData` reads the trace, so nothing else is
needed. A kernel's bound is the largest of its products over the chip's FLOP/s, of its operands' and
results' bytes over the bandwidth and of attention's exponentials over their rate, by the compiled
program's text: what a kernel that reads everything once could take. Kernels are launched one by
one: the profiler does not see into command buffers. The compiler's own counts of the whole program
stand beside.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import jax
import sampling
import train_step
from bench import Book, Piece

from ldm_scaling.parallel import hlo

TOP = 10
_STEPS = 5
_AROUND = ("while", "conditional", "call")


# --- what a kernel does, by the program's text ------------------------------------------------


def products(module: hlo.Module, computation: str, i: hlo.Instruction) -> float:
    """FLOPs of an instruction's products, those inside a fusion included; 0 where it has none.

    Of a product of sizes (m, k), (k, n) and (m, n), b of them at once, the three arrays together
    have b^3 (m k n)^2 elements; of a convolution, whichever of its three arrays is the result, the
    square of its multiply-adds over the window's taps. Attention's kernels are told by their name:
    two products forward, five backward.
    """
    called = i.attributes if i.opcode == "custom-call" else ""
    shapes = [dims for _, dims in (*module.operand_shapes(computation, i), *i.shapes)]
    if "fmha" in called:
        logits, width = _attended(shapes)
        return 2.0 * logits * width * (5 if "Backward" in called else 2)
    if i.opcode == "fusion":
        inside = [name for name in hlo.called_by(i) if name in module.computations]
        return sum(
            products(module, name, j)
            for name in inside for j in module.computations[name].values()
        )
    convolves = i.opcode == "convolution" or "cudnn$conv" in called
    if not convolves and i.opcode != "dot" and "gemm" not in called and "matmul" not in called:
        return 0.0
    if len(shapes) < 3:
        return 0.0
    three = (shapes[0], shapes[1], i.shapes[0][1])
    elements = math.prod(math.prod(dims) for dims in three)
    if convolves:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
        if not labels:
            return 0.0
        taps, small, large = sorted(
            math.prod(size for size, label in zip(dims, text) if label.isdigit())
            for dims, text in zip(three, labels.groups())
        )
        return 2.0 * math.sqrt(elements * taps * small / large)
    batched = re.search(r'lhs_batch_dim\w*"?[:=]\s*[{\[]([\d,"\s]*)[}\]]', i.attributes)
    dims = hlo.ints(batched.group(1).replace('"', "")) if batched else []
    return 2.0 * math.sqrt(elements / math.prod(shapes[0][d] for d in dims))


def exponentials(module: hlo.Module, computation: str, i: hlo.Instruction) -> float:
    """Of an attention kernel, one a logit, forward and backward; 0 of others."""
    if i.opcode != "custom-call" or "fmha" not in i.attributes:
        return 0.0
    return _attended([d for _, d in (*module.operand_shapes(computation, i), *i.shapes)])[0]


def _attended(shapes: Any) -> tuple[float, float]:
    """Logits and width of a head of an attention kernel; 0 where its arrays are not told. Its
    queries and keys are (B, length, heads, width) or (B, heads, length, width)."""
    whole = [dims for dims in shapes if len(dims) == 4]
    if len(whole) < 3:
        return 0.0, 0.0
    (batch, *one, width), (_, *other, _) = whole[:2]
    heads = min(set(one) & set(other), default=0)
    if not heads:
        return 0.0, 0.0
    return float(batch * heads) * (math.prod(one) // heads) * (math.prod(other) // heads), width


def kind(module: hlo.Module, i: hlo.Instruction) -> str:
    """What sort of kernel an instruction is."""
    called = i.attributes if i.opcode == "custom-call" else ""
    if "fmha" in called:
        return "attention"
    if i.opcode == "convolution" or "cudnn$conv" in called:
        return "convolution"
    if i.opcode == "dot" or "gemm" in called or "matmul" in called:
        return "product"
    inside = {i.opcode}
    for name in hlo.called_by(i) if i.opcode == "fusion" else ():
        inside |= {j.opcode for j in module.computations.get(name, {}).values()}
    for opcodes, told in (
        ({"convolution"}, "convolution"), ({"dot"}, "product"),
        ({"reduce", "reduce-window"}, "reduction"), ({"transpose"}, "transpose"),
    ):
        if inside & opcodes:
            return told
    return "copy" if inside <= {"copy", "fusion", "parameter"} else "elementwise"


def work(compiled: Any) -> dict[str, dict[str, Any]]:
    """FLOPs, bytes, the sort and a name of what each instruction of a program does."""
    module = hlo.parse(compiled.as_text())
    out = {}
    for name, i in module.instructions():
        moved = hlo.size_of(i.shapes) + hlo.size_of(module.operand_shapes(name, i))
        told = re.search(r'op_name="([^"]*)"', i.attributes)
        out[i.name] = {
            "flops": products(module, name, i), "bytes": moved,
            "exponentials": exponentials(module, name, i), "opcode": i.opcode,
            "kind": kind(module, i),
            "what": "/".join(told.group(1).split("/")[-3:]) if told else i.opcode,
        }
    return out


# --- what the profiler saw --------------------------------------------------------------------


def recorded(run: Any, steps: int) -> dict[str, tuple[float, int]]:
    """Seconds and executions of each instruction on the device, over so many calls of `run`."""
    with bench.turn(), tempfile.TemporaryDirectory() as folder:
        run()
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return read(jax.profiler.ProfileData.from_file(str(path)))


def read(data: Any) -> dict[str, tuple[float, int]]:
    """Seconds and executions by instruction: of the devices' planes, or of the host's where there
    are none."""
    planes = list(data.planes)
    on_device = [p for p in planes if p.name.startswith("/device:GPU")]
    seconds: dict[str, float] = collections.defaultdict(float)
    launched: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for plane in on_device or [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                told = dict(event.stats)
                # Lines of modules and of scopes hold the same time again.
                if "hlo_op" not in told or not (line.name.startswith("Stream") or not on_device):
                    continue
                seconds[str(told["hlo_op"])] += event.duration_ns / 1e9
                launched[str(told["hlo_op"])][event.name] += 1
    # An instruction may be several kernels, each of them launched once or more.
    return {name: (seconds[name], min(launched[name].values())) for name in seconds}


def heaviest(compiled: Any, seen: dict[str, tuple[float, int]], steps: int) -> dict[str, Any]:
    """The ten that took longest, alike instructions of all layers together, the sorts, and all."""
    does = work(compiled)
    # What holds other instructions would count their time twice.
    seen = {k: v for k, v in seen.items() if does.get(k, {}).get("opcode") not in _AROUND}
    total = sum(seconds for seconds, _ in seen.values())
    alike: dict[tuple, dict[str, Any]] = {}
    sorts: dict[str, dict[str, Any]] = {}
    for name, (seconds, times) in seen.items():
        one = does.get(name) or {
            "flops": 0.0, "bytes": 0.0, "exponentials": 0.0, "kind": "other", "what": name,
        }
        form = (one["kind"], one["flops"], one["bytes"], one["what"].split("/")[-1])
        for rows, key in ((alike, form), (sorts, one["kind"])):
            row = rows.setdefault(key, {
                "name": name, "kind": one["kind"], "what": one["what"], "calls": 0.0,
                "seconds": 0.0, "flops": 0.0, "bytes": 0.0, "bound": 0.0,
            })
            row["calls"] += times / steps
            row["seconds"] += seconds / steps
            row["flops"] += one["flops"] * times / steps
            row["bytes"] += one["bytes"] * times / steps
            row["bound"] += bound(one) * times / steps
    counted = compiled.cost_analysis() or {}
    held = compiled.memory_analysis()
    return {
        "kernels": _longest(alike, total / steps)[:TOP], "sorts": _longest(sorts, total / steps),
        "instructions": len(seen), "device_seconds": total / steps,
        "compiler": {
            "flops": counted.get("flops"), "bytes": counted.get("bytes accessed"),
            "temporary_bytes": held.temp_size_in_bytes if held else None,
        },
    }


def bound(one: dict[str, Any]) -> float:
    """Seconds of an instruction at the device's ceilings; 0 for a device that is in no table."""
    chip = bench.ceilings()
    return 0.0 if chip is None else max(
        one["flops"] / chip.flops, one["bytes"] / chip.bandwidth,
        one["exponentials"] / chip.exponentials,
    )


def _longest(rows: dict[Any, dict[str, Any]], total: float) -> list[dict[str, Any]]:
    found = sorted(rows.values(), key=lambda row: -row["seconds"])
    return [
        row | {"share": row["seconds"] / total if total else 0.0,
               "of_bound": row["bound"] / row["seconds"] if row["bound"] else None}
        for row in found
    ]


# --- pieces -----------------------------------------------------------------------------------


def training(args: Any, book: Book) -> dict[str, Any]:
    """Of a train step."""
    member, batch = ("toy", 2) if args.toy else (args.member, args.batch)
    ours = train_step.Ours(member, batch)
    seen = recorded(lambda: ours(1), _STEPS)
    return {"batch": batch} | heaviest(ours.compiled, seen, _STEPS)


def drawing(args: Any, book: Book) -> dict[str, Any]:
    """Of a guided pair of calls of the network, as sampling makes them."""
    member, batch = ("toy", 2) if args.toy else (args.member, args.lanes)
    job = sampling.Job(member, sampling.TOY_DECODER, 4)
    ours = sampling.Ours(job)
    given = (ours.params, *ours.given(batch, job.steps))
    compiled = ours.draw.lower(*given).compile()
    seen = recorded(lambda: jax.block_until_ready(compiled(*given)), 1)
    return {"batch": batch} | heaviest(compiled, seen, job.steps)


def pieces(args: Any) -> list[Piece]:
    """In order."""
    return [
        Piece("train_step", functools.partial(training, args), 4.0),
        Piece("sampling", functools.partial(drawing, args), 4.0),
    ]


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["kernel", "calls", "ms a step", "share", "GFLOP", "MB", "of bound", "what"]]
    for name, r in book.all().items():
        rows.append([
            f"{name}, batch {r['batch']}", str(r["instructions"]),
            bench.number(1e3 * r["device_seconds"]), "100%", "", "", "", "all",
        ])
        for told, found in (("kind", r["sorts"]), ("name", r["kernels"])):
            rows += [[
                k[told][:32], bench.number(k["calls"]), bench.number(1e3 * k["seconds"]),
                bench.percent(k["share"]), bench.number(k["flops"] / 1e9),
                bench.number(k["bytes"] / 1e6), bench.percent(k["of_bound"]),
                k["what"][-40:] if told == "name" else "all of this sort",
            ] for k in found]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--member", default="866m")
    parser.add_argument("--batch", type=int, default=16, help="of the train step")
    parser.add_argument("--lanes", type=int, default=16, help="samples that are drawn at a time")
    args = parser.parse_args(argv)
    if not args.toy:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
