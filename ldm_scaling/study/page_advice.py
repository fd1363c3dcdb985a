"""Page advice: what `ldm-scaling advise` says at every budget, as plain values for the page.

Advice changes only at budgets that just pay for one configuration more, so a few pieces hold it
for all budgets: the page looks one up and computes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

from ldm_scaling.study import advice, labels, pricing
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.advice import Advice
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.costing import Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.options import Options
from ldm_scaling.study.records import FROM_TEXT, TASKS, Record

# Unit -> its name in the choice of units, and as a budget is written.
_UNITS: dict[Unit, tuple[str, str]] = {
    "cost": ("sampling cost", "cost"), "seconds": ("seconds", "s"), "gflops": ("GFLOPs", "gflops"),
}


def weighed(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """The others that a budget can be spent on as well as on the page's own records."""
    own = {r.task for r in records}
    return [r for r in others if r.task not in own and {r.task, *own} <= set(FROM_TEXT)]


def units(
    records: Sequence[Record], metric: str, select: int, report: Sequence[int],
    others: Sequence[Record] = (),
) -> list[dict[str, Any]]:
    """The advice in every unit that the records can give, ready for JSON.

    Args:
      records: distinct ones, of which some are reported.
      metric: the measure that decides.
      select: seed block that chooses.
      report: seed blocks that are reported.
      others: of the same members' other tasks; those that are `weighed` take part.

    Returns:
      A dictionary for each unit. `points` are the configurations, cheapest first, and everything
      else names them by their number there: `front`, and `best` and `runner_up` of each of
      `pieces`, which holds for budgets of its `from` (within a billionth) and more. A point's
      `name` is its network's among all that take part: `model` where that is the page's own.
      Seconds are left out where the records were measured on several devices, or hold none.
      `flags` are those with which `ldm-scaling advise` says the same.
    """
    own = {r.task for r in records}
    every = [*records, *weighed(records, others)]

    @functools.cache
    def options(unit: Unit) -> Options:
        return options_lib.of_records(
            every, unit, metric, select_block=select, report_blocks=report
        )

    devices = pricing.devices_of(records)
    why = f"Seconds of {labels.listing(devices)} do not compare" if len(devices) > 1 else ""
    if not any(p.seconds for p in options("cost").points):
        why = "The configurations have no measured seconds"
    skipped = [f"{why}, so there are no budgets in seconds."] if why else []
    out: list[dict[str, Any]] = []
    # The folder may hold, or come to hold, records of another config's tasks, and the config name
    # blocks and a measure of its own.
    chosen = [task for task in TASKS if any(r.task == task for r in every)]
    flags = [
        f"--task={','.join(chosen)}", f"--metric={metric}", f"--select-block={select}",
        f"--report-blocks={','.join(map(str, report))}",
    ]
    for unit in _UNITS:
        if unit == "seconds" and skipped:
            continue
        found = options(unit)
        out.append(_unit(found, own, [*found.notes, *skipped]) | {"flags": flags})
    return out


def _unit(options: Options, own: Collection[str], notes: list[str]) -> dict[str, Any]:
    points = sorted(options.points, key=lambda p: (p.cost, p.chosen_by))
    place = {id(p): k for k, p in enumerate(points)}
    at = [advice.advise(options, Budget(p.cost, options.unit)) for p in points]
    # What a budget above all costs adds to the notes.
    whole = advice.advise(options, Budget(math.inf, options.unit))
    pieces: list[dict[str, Any]] = []
    for found in at:
        piece = _piece(found, place)
        if not pieces or any(pieces[-1][k] != piece[k] for k in ("best", "runner_up")):
            pieces.append(piece)
    name, written = _UNITS[options.unit]
    return {
        "unit": options.unit, "name": name, "written": written, "label": options.unit_label,
        "measure": options.measure, "points": [_row(p, own) for p in points], "pieces": pieces,
        "front": [place[id(p)] for p in whole.front], "notes": notes,
        "beyond": [note for note in whole.notes if note not in at[-1].notes],
    }


def _row(p: Point, own: Collection[str]) -> dict[str, Any]:
    return {
        "model": p.model, "task": p.task,
        "name": p.model if p.task in own else labels.network(p.model, p.task),
        "sampler": p.sampler, "label": labels.sampler(p.sampler), "steps": p.steps,
        "guidance": p.guidance, "cost": p.cost, "value": p.value, "low": p.low, "high": p.high,
    }


def _piece(found: Advice, place: dict[int, int]) -> dict[str, Any]:
    duel = found.duel
    return {
        "from": found.budget.value, "best": place[id(found.best)],
        "runner_up": None if found.runner_up is None else place[id(found.runner_up)],
        "probability": found.other_is_better,
        "advantage": duel and [duel.advantage, duel.low, duel.high],
        "notes": list(found.notes[len(found.options.notes):]),
    }
