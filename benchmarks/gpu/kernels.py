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
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import jax
import sampling
import train_step
from bench import Book, Piece

from ldm_scaling.parallel import gpu_program, hlo

TOP = 10
_STEPS = 5
_AROUND = ("while", "conditional", "call")


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
    module = hlo.parse(compiled.as_text())
    does = {
        i.name: gpu_program.kernel(module, name, i) for name, i in module.instructions()
    }
    # What holds other instructions would count their time twice.
    around = {i.name for _, i in module.instructions() if i.opcode in _AROUND}
    seen = {k: v for k, v in seen.items() if k not in around}
    total = sum(seconds for seconds, _ in seen.values())
    alike: dict[tuple, dict[str, Any]] = {}
    sorts: dict[str, dict[str, Any]] = {}
    for name, (seconds, times) in seen.items():
        one = does.get(name) or gpu_program.Kernel(name, "other", 1, 0.0, 0.0, 0.0, False, name)
        form = (one.kind, one.flops, one.bytes, one.what.split("/")[-1])
        for rows, key in ((alike, form), (sorts, one.kind)):
            row = rows.setdefault(key, {
                "name": name, "kind": one.kind, "what": one.what, "calls": 0.0,
                "seconds": 0.0, "flops": 0.0, "bytes": 0.0, "bound": 0.0,
            })
            row["calls"] += times / steps
            row["seconds"] += seconds / steps
            row["flops"] += one.flops * times / steps
            row["bytes"] += one.bytes * times / steps
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


def bound(one: gpu_program.Kernel) -> float:
    """Seconds of a run of a kernel at the device's ceilings; 0 for one that is in no table."""
    chip = bench.ceilings()
    return 0.0 if chip is None else one.once(
        chip.flops, chip.wide_flops, chip.bandwidth, chip.exponentials
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
