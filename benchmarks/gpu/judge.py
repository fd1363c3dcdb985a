"""What XLA's compiler for GPUs makes of a train step and of a row of sampling, without a GPU.

    pip install -e '.[gpu-plan]'
    python benchmarks/gpu/judge.py [PROGRAM ...] --topology=h200:1 --member=866m --batch=16
    python benchmarks/gpu/judge.py --toy

Kernels by what they do: how many, their FLOPs, the bytes of their operands and results, and the
time that these take at the card's peaks, whichever is longest in each. What is judged so is what a
change saves; whether a kernel comes near its bound, only a card can tell. On an H200 the kernels
were the same ones (NOTES.md). `train` and `sample` are what `ldm-scaling` runs; the others have one
thing otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import group_norm
import jax
import layouts

from ldm_scaling import config, files, machine, recipes
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import narrowing
from ldm_scaling.parallel import aot
from ldm_scaling.study import plan, plan_parts, plan_remedies
from ldm_scaling.study.plan_parts import Part

GB = 1e9


@contextlib.contextmanager
def _not_narrowed():
    """What is traced within converts its parameters in every row."""
    before = narrowing.of
    narrowing.of = lambda spec, dtype: lambda params: params
    try:
        yield
    finally:
        narrowing.of = before


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that is judged.

    Attributes:
      kind: of `plan_parts.KINDS`.
      what: one thing that is otherwise, in words.
      within: the context that it is built and traced in.
      changed: what is done to it.
      options: the compiler's.
    """

    kind: str
    what: str
    within: Callable[[], Any] = contextlib.nullcontext
    changed: Callable[[Part], Part] = lambda part: part
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PROGRAMS = {
    "train": Program("train", "as it is"),
    "train:layout": Program(
        "train", "convolutions' kernels held as cuDNN takes them", changed=layouts.of_part
    ),
    "train:norms": Program(
        "train", "group norms' sums by kernels of our own",
        within=lambda: group_norm.in_networks(interpret=False),
    ),
    "train:rounded": Program(
        "train", "what is rounded to bfloat16 stays so",
        options={"xla_allow_excess_precision": False},
    ),
    "sample": Program("sample", "as it is"),
    "sample:converting": Program(
        "sample", "parameters converted in every row", within=_not_narrowed
    ),
}


def study_of(member: str) -> Study:
    """The family's config for one GPU: no blocks recomputed, nothing in shards."""
    args = ("39m", "local") if member == "toy" else (member,)
    study = config.parse(recipes.text_to_image(*args))
    study = plan_remedies.changed(study, "mesh", data=1, fsdp=1, tensor=1)
    return plan_remedies.changed(study, "train", remat="none")


def judged(program: Program, member: str, batch: int, devices: list[jax.Device]) -> dict[str, Any]:
    """Its figures."""
    study = plan.with_batch(study_of(member), program.kind, batch)
    name = study.members[0] if member == "toy" else member
    with program.within():
        part = program.changed(plan_parts.build(study, name, devices, program.kind))
        found = aot.compile(
            part.program, *part.args, mesh=part.mesh, options=program.options
        )
    return {
        "what": program.what, "seconds": found.work.optimistic_seconds,
        "bytes": found.work.bytes, "flops": found.work.flops, "memory": found.memory.total,
        "kernels": found.sorts, "compile_seconds": found.compile_seconds,
    }


def lines(name: str, row: dict[str, Any]) -> list[str]:
    """A program's table."""
    out = [
        f"{name}: {row['what']}; {row['memory'] / GB:.1f} GB of memory, compiled in "
        f"{row['compile_seconds']:.0f} s",
        f"  {'kernels':<12}{'number':>8}{'TFLOP':>9}{'GB':>9}{'ms at least':>13}",
    ]
    total = {
        "count": sum(one["count"] for one in row["kernels"].values()),
        **{key: row[key] for key in ("flops", "bytes", "seconds")},
    }
    for kind, one in (*row["kernels"].items(), ("all", total)):
        out.append(
            f"  {kind:<12}{one['count']:>8.0f}{one['flops'] / 1e12:>9.2f}"
            f"{one['bytes'] / GB:>9.2f}{1e3 * one['seconds']:>13.2f}"
        )
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("--topology", default="h200:1", help="one GPU, e.g. a100-80gb:1")
    parser.add_argument("--member", default="866m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--to", type=Path, metavar="FILE.json")
    parser.add_argument("--toy", action="store_true", help="a very small network")
    args = parser.parse_args(argv)
    unknown = [name for name in args.programs if name not in PROGRAMS]
    if unknown:
        parser.error(f"no program {unknown[0]!r}: choose from {', '.join(PROGRAMS)}")
    machine.quiet_cuda()
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {}
    try:
        devices = aot.topology(args.topology)
        member, batch = ("toy", 2) if args.toy else (args.member, args.batch)
        for name in args.programs or PROGRAMS:
            found[name] = judged(PROGRAMS[name], member, batch, devices)
            print("\n".join(lines(name, found[name])), flush=True)
    except aot.DoesNotFit as e:
        print(f"{name}: does not fit, {e}: give a smaller --batch", file=sys.stderr)
        return 2
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    if args.to:
        body = {
            "topology": args.topology, "member": member, "batch": batch,
            "versions": plan.versions(plan.Target(args.topology)), "programs": found,
        }
        files.write_json(args.to, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
