"""What `ldm-scaling plan` says: one plan on a terminal, the family's as a Markdown table."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm_scaling import terminal
from ldm_scaling.models import zoo
from ldm_scaling.parallel import gpus
from ldm_scaling.study import plan as plan_lib

Plan = Mapping[str, Any]
_BOUND = (
    "Bounds by the compiler's estimate, not measurements: a job can be slower than this, not faster"
)

_ON_GPU = (
    "Estimates at the card's peaks, not measurements: a job is slower, small networks by their "
    "launches"
)
# Seconds, about, that a GPU needs from one kernel to the next outside of a CUDA graph.
_LAUNCH = 2e-6


def text(plans: Sequence[Plan], frozen_share: float | None = None) -> str:
    """Plans of a job's parts for a terminal.

    Args:
      plans: of one member and target.
      frozen_share: of the frozen encoders in a step without caches, by their bounds.
    """
    console = terminal.console(None if sys.stdout.isatty() else 110)
    for one in plans:
        _one(console, one)
    if frozen_share is not None:
        console.print(
            f"Frozen encoders: {frozen_share:.1%} of a training step's seconds, were they run in "
            "it instead of once for the caches"
        )
    told = _ON_GPU if plans and _on_gpu(plans[0]) else _BOUND
    console.print(f"{told}. Capacity and counts: docs/plan.md.")
    return terminal.text(console)


def _one(console: Console, one: Plan) -> None:
    where = f"{one['num_slices']} x {one['topology']}" if one["num_slices"] > 1 \
        else one["topology"]
    batch = "" if one["batch"] is None else f"batch {one['batch']} "
    console.print(
        f"\n{one['member']}, {one['kind']}: {batch}on {where} ({one['chips']} "
        f"{_things(one, one['chips'])})"
    )
    for what in one.get("before", ()):
        console.print(f"  of the members before {what}", soft_wrap=True)
    for row in one["tried"]:
        console.print(f"  {_remedy(row)}", soft_wrap=True)
    if not one["fits"]:
        needed = "" if one["hbm_gb"] is None else f": {one['hbm_gb']:.3f} GB"
        console.print(
            f"  does not fit{needed}, of {one['hbm_capacity_gb']:.3f} GB, with any remedy: "
            f"take more {_things(one)} or a smaller batch"
        )
        return
    mesh = ", ".join(f"{name} {size}" for name, size in one["mesh"].items())
    aside = f", {one['processes_side_by_side']} processes side by side" \
        if one["processes_side_by_side"] > 1 else ""
    console.print(f"  mesh: {mesh}{aside}")
    console.print(_memory(one))
    console.print(_time(one))
    if one.get("kernels_by_kind"):
        console.print(_kernels(one))
    if one["collectives"]:
        console.print(_collectives(one))
    for line in _words(one):
        console.print(f"  {line}", soft_wrap=True)


def _on_gpu(one: Plan) -> bool:
    return one["chip"] in gpus.GPUS


def _things(one: Plan, number: int = 2) -> str:
    return ("GPU" if _on_gpu(one) else "chip") + "s" * (number != 1)


_table = functools.partial(terminal.table, edge=True)


def _memory(one: Plan) -> Table:
    device = _things(one, 1) if one["devices_per_chip"] == 1 else "device"
    table = _table(f"memory of each {device}", "GB")
    for name, size in one["hbm_by_kind_gb"].items():
        table.add_row(name, f"{size:.3f}")
    share = one["hbm_gb"] / one["hbm_capacity_gb"]
    table.add_row("all", f"{one['hbm_gb']:.3f}", end_section=True)
    table.add_row("capacity", f"{one['hbm_capacity_gb']:.3f}  ({share:.0%} used)")
    return table


def _time(one: Plan) -> Table:
    table = _table("seconds of a call, at least", "s", "for")
    first = "kernels one after the other" if _on_gpu(one) else "the compiler's estimate"
    table.add_row(first, _seconds(one["compiler_seconds"]), "")
    sent, beyond = (
        sum(c[name] for c in one["collectives"].values()) for name in ("sent", "slice_sent"))
    work = {
        "compute": f"{one['flops'] / 1e12:.3g} TFLOP", "memory": f"{one['bytes'] / 1e9:.3g} GB",
        "links": f"{(sent - beyond) / 1e9:.3g} GB", "network": f"{beyond / 1e9:.3g} GB",
    }
    for name, value in one["roofline_seconds"].items():
        table.add_row(f"roofline: {name}", _seconds(value), work.get(name, ""))
    binds = "kernels bind" if _on_gpu(one) and one["binds"] == "compiler" \
        else f"{one['binds']} binds"
    table.add_row("bound", _seconds(one["seconds_per_step_bound"]), binds)
    return table


def _kernels(one: Plan) -> Table:
    table = _table("kernels", "number", "TFLOP", "GB", "s at least")
    for kind, row in one["kernels_by_kind"].items():
        table.add_row(
            kind, f"{row['count']:.0f}", f"{row['flops'] / 1e12:.3g}", f"{row['bytes'] / 1e9:.3g}",
            _seconds(row["seconds"]),
        )
    return table


def _collectives(one: Plan) -> Table:
    table = _table("exchanges", "number", "whole GB", "sent GB")
    for kind, row in sorted(one["collectives"].items()):
        table.add_row(
            kind, str(row["count"]), f"{row['bytes'] / 1e9:.3f}", f"{row['sent'] / 1e9:.3f}"
        )
    return table


def _words(one: Plan) -> list[str]:
    out = []
    unit = {**dict.fromkeys(("train", "distill", "finetune"), "examples"),
            "sample": "rows of samples", "text": "captions"}
    unit = unit.get(one["kind"].partition(":")[0], "pictures")
    rate = f"{one['examples_per_second_bound']:,.0f} {unit}/s at most"
    if one["days_bound"] is not None:
        rate += (
            f"; {one['days_bound']:.1f} days to {one['steps']:,} steps and "
            f"{one['chip_hours_bound']:,.0f} {_things(one, 1)}-hours at least"
        )
    out.append(rate)
    for rows, value in one.get("images_per_second_bound", {}).items():
        out.append(f"pictures of {rows}: {value:,.1f}/s at most")
    if "flops_over_analytic" in one:
        out.append(
            f"FLOPs: {one['flops_over_analytic']:.2f} of the network's own, counted from its layers"
        )
    if one.get("frozen_encoders_share_of_flops") is not None:
        out.append(
            f"frozen encoders: {one['frozen_encoders_share_of_flops']:.1%} of a step's FLOPs, were "
            "they run in it instead of once for the caches"
        )
    if "encoder_share_of_flops" in one:
        out.append(
            f"frozen encoder: {one['encoder_share_of_flops']:.1%} of a step's FLOPs, over pictures "
            "and what is given of them"
        )
    if one["kernels"]:
        flops = sum(k["flops"] for k in one["kernels"])
        calls = sum(k["calls"] for k in one["kernels"])
        out.append(f"of these {flops / 1e12:.3g} TFLOP in {calls} Pallas calls, counted by hand")
    beyond = sum(row["slice_sent"] for row in one["collectives"].values())
    if _on_gpu(one) and beyond and "network" not in one["roofline_seconds"]:
        out.append(
            f"{beyond / 1e9:.3g} GB to other hosts are in no bound: no network is known for this "
            "card"
        )
    if one.get("kernels_by_kind"):
        launches = sum(row["count"] for row in one["kernels_by_kind"].values())
        out.append(
            f"{launches:,.0f} kernels: launched one by one, {1e6 * _LAUNCH:.0f} us each, they "
            f"would take {_seconds(launches * _LAUNCH)} s"
        )
    if one["kernels_not_counted"]:
        out.append(f"not counted: {', '.join(one['kernels_not_counted'])}")
    if one["loop_factors"]["flops"] != 1:
        out.append(f"loops: XLA's FLOPs x {one['loop_factors']['flops']:.3f} for their iterations")
    if one["operations_without_a_time"]:
        out.append(
            f"{one['operations_without_a_time']} operations for which the compiler has no time are "
            "taken for 0 s in its estimate"
        )
    for name, value in one.get("compiler_options", {}).items():
        out.append(
            f"compiled with {name}={value}: the compiler finds no tiles for some products without "
            "a card to try them on"
        )
    compiler = next(n for n in one["versions"] if n == "libtpu" or n.startswith("jax-cuda"))
    out.append(
        f"compiled in {one['compile_seconds']:.0f} s by {compiler} {one['versions'][compiler]}, "
        f"jax {one['versions']['jax']}"
    )
    return out


def _remedy(row: Plan) -> str:
    if row["remedy"] is None:
        size = "" if row["hbm_gb"] is None else f": {row['hbm_gb']:.3f} GB"
        return f"as the config says it does not fit{size}"
    size = "" if row["hbm_gb"] is None else f", {row['hbm_gb']:.3f} GB"
    end = f", {_seconds(row['seconds_per_step_bound'])} s a call" if row["fits"] else ""
    verdict = "fits" if row["fits"] else "does not fit"
    return f"with {row['remedy']} ({' '.join(row['flags'])}) it {verdict}{size}{end}"


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value >= 0.01 else f"{value:.2e}"


# --- the family -------------------------------------------------------------------------------


def markdown(plans: Iterable[Plan], stale: int = 0, missing: Sequence[str] = ()) -> str:
    """The family's plans as a page; of so many the key is another by now, and of what is `missing`
    no plan was made."""
    plans = list(plans)
    lines = [
        "# Plans of the family", "",
        "Made by `ldm-scaling plan --all`; [docs/plan.md](../../docs/plan.md) says what each "
        f"number is. **{_BOUND}.**", "",
    ]
    versions = {tuple(sorted(one["versions"].items())) for one in plans}
    for found in sorted(versions):
        lines.append("Compiled with " + ", ".join(f"{n} {v}" for n, v in found) + ".")
    lines += ["", *_age(plans, stale)]
    lines += [f"Not made yet: {', '.join(missing)}."] if missing else []
    trained = [one for one in plans if one["kind"] == "train"]
    unets = [one for one in trained if zoo.family_of(one["member"]) == "unet"]
    others = [one for one in trained if one not in unets]
    for title, some in (
        ("Training at a glance", unets),
        ("Other backbones at a glance, the largest of each", others),
    ):
        lines += ["", f"## {title}", "", *glance(some, some is unets)] if some else []
    for kind in dict.fromkeys(one["kind"] for one in plans):
        lines += ["", f"## {kind}", ""]
        lines += _rows(kind, [one for one in plans if one["kind"] == kind])
    lines += ["", "## How these figures come about", ""]
    lines += [f"- {note}" for note in plan_lib.NOTES]
    return "\n".join(lines) + "\n"


def _age(plans: Sequence[Plan], stale: int) -> list[str]:
    """When and of which code plans were made, and how many are of another code than there is."""
    made: dict[str, int] = {}
    for one in plans:
        when = one.get("made", {})
        words = f"made on {when['date']}" if "date" in when else (
            f"that came on {when['came']}" if "came" in when else "of which no day is known")
        by = "with" if "came" in when else "by the code of"
        words += f" {by} commit {when['commit']}" if "commit" in when else ""
        made[words] = made.get(words, 0) + 1
    told = ", ".join(f"{n} {words}" for words, n in made.items())
    out = [f"{len(plans)} plans: {told}."] if plans else []
    if stale:
        which = "All" if stale == len(plans) else f"{stale} of them"
        out.append(
            f"**{which} are of an earlier version of the code, its config or its compiler**: "
            "their keys no longer hold, which says nothing of their figures. `ldm-scaling plan "
            "--all` lowers those whose program is named, in a minute each, and keeps the figures "
            "where it is the same."
        )
    if unnamed := sum("reader" not in one for one in plans):
        out.append(
            f"{unnamed} name no program, for they are from before plans did: where their key does "
            "not hold they are compiled anew."
        )
    return out


def glance(plans: list[Plan], family: bool = True) -> list[str]:
    """The lines of a small table of training: networks down, topologies across, and the chip-hours
    of all where they are one family."""
    where = list(dict.fromkeys(_where(one) for one in plans))
    found = {(one["member"], _where(one)): one for one in plans}
    lines = [f"| s a step, GB a chip | {' | '.join(where)} |", "|" + "---|" * (1 + len(where))]
    for member in dict.fromkeys(one["member"] for one in plans):
        cells = [_short(found.get((member, place))) for place in where]
        lines.append(f"| {member} | {' | '.join(cells)} |")
    members = {one["member"] for one in plans}
    hours = []
    for place in where:
        here = [found.get((member, place)) for member in members]
        whole = all(one and one["fits"] for one in here)
        hours.append(f"{sum(one['chip_hours_bound'] for one in here):,.0f}" if whole else "")
    lines += [f"| chip-hours of all | {' | '.join(hours)} |"] if family else []
    if any(one["remedies"] for one in plans):
        lines += ["", "Starred: with settings that make it fit, see below."]
    return lines


def _short(one: Plan | None) -> str:
    if one is None:
        return ""
    if not one["fits"]:
        return "does not fit"
    star = "*" * bool(one["remedies"])
    return f"{one['seconds_per_step_bound']:.3f}, {one['hbm_gb']:.1f}{star}"


def _where(one: Plan) -> str:
    slices = f"{one['num_slices']} x " if one["num_slices"] > 1 else ""
    return f"{slices}{one['topology']}"


# Beside what every kind has: of a plan's rate, its unit, and what follows from it.
_ENDS = {
    "train": ("examples/s", "days to the last step", "chip-hours"),
    "sample": ("rows/s", "s for 50 rows", "pictures/s of 50 rows"),
}


def _rows(kind: str, plans: list[Plan]) -> list[str]:
    heads = ["network", "topology", "batch", "HBM GB", "of", "s", "binds",
             *_ENDS.get(kind, ("examples/s",)), "settings that make it fit"]  # fmt: skip
    out = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in plans:
        out.append(f"| {' | '.join(_row(one))} |")
    return out


def _row(one: Plan) -> list[str]:
    start = [one["member"], _where(one), f"{one['batch']}"]
    capacity = f"{one['hbm_capacity_gb']:.1f}"
    size = "-" if one["hbm_gb"] is None else f"{one['hbm_gb']:.2f}"
    if not one["fits"]:
        rest = ["-"] * (2 + len(_ENDS.get(one["kind"], ("",))))
        return [*start, size, capacity, *rest, "does not fit"]
    seconds, rate = one["seconds_per_step_bound"], one["examples_per_second_bound"]
    end = {
        "train": lambda: [f"{one['days_bound']:.2f}", f"{one['chip_hours_bound']:,.0f}"],
        "sample": lambda: [f"{50 * seconds:.2f}", f"{rate / 50:,.0f}"],
    }.get(one["kind"], list)
    settings = " ".join(flag.removeprefix("--config.") for flag in one["remedies"])
    return [
        *start, size, capacity, _seconds(seconds), one["binds"], f"{rate:,.0f}", *end(), settings,
    ]
