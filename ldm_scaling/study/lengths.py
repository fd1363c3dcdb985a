"""Lengths of training that advice chooses from: of each size the longest, or each checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels
from ldm_scaling.study.curves import Cell, Point
from ldm_scaling.study.records import TEXT_TO_IMAGE, Record

Kind = tuple[str, str]
"""(task, method): what is weighed as one part, see `options.kind`."""
ALONG: Kind = (TEXT_TO_IMAGE, "along training")
"""Of members the earlier checkpoints, where each is an option of its own."""


def along(
    held: Mapping[Kind, list[Record]],
) -> tuple[dict[Kind, list[Record]], dict[str, str]]:
    """Members' records in two kinds, of each size's longest training and of its earlier
    checkpoints, these by names of their own; and the sizes that such names are of."""
    ((members, own),) = held.items()
    last = {r.identity.model: r.identity.train_step for r in curves_lib.longest(own)}
    out: dict[Kind, list[Record]] = {members: []}
    named = {}
    for r in own:
        i = r.identity
        if i.train_step == last[i.model]:
            out[members].append(r)
            continue
        name = f"{i.model} after {i.train_step:,} steps"
        named[name] = i.model
        out.setdefault(ALONG, []).append(
            dataclasses.replace(r, identity=dataclasses.replace(i, model=name)))
    return out, named


def base(model: str, sampler: str, steps: int) -> Cell:
    """A cell by its sampler's name, without its options."""
    return model, sampler.partition(", ")[0], steps


def cell(record: Record) -> Cell:
    """That of a record, as `base` has it."""
    i = record.identity
    return base(i.model, i.sampler, i.steps)


def last_of(records: Sequence[Record], named: Mapping[str, str]) -> list[Record]:
    """Of each size one record of the longest training, by the size's own name."""
    out: dict[str, Record] = {}
    for r in records:
        size = named.get(r.identity.model, r.identity.model)
        if size not in out or r.identity.train_step > out[size].identity.train_step:
            out[size] = dataclasses.replace(
                r, identity=dataclasses.replace(r.identity, model=size))
    return list(out.values())


def lacking(
    points: Sequence[Point], held: Sequence[Record], longest: Sequence[Record],
    settings: Sequence[str],
) -> dict[tuple[str, int, int], set[Cell]]:
    """The cells that only a shorter training has, by size, its longest training and that one."""
    last = {r.identity.model: r.identity.train_step for r in longest}
    have = {base(p.model, p.sampler, p.steps) for p in points}
    steps: dict[Cell, int] = {}
    for r in sorted(curves_lib.one_setting(held, settings), key=lambda r: r.gflops):
        i, one = r.identity, cell(r)
        if not r.student_steps and i.train_step < last.get(i.model, 0) and one not in have:
            steps[one] = max(steps.get(one, 0), i.train_step)
    out: dict[tuple[str, int, int], set[Cell]] = {}
    for one, before in steps.items():
        out.setdefault((one[0], last[one[0]], before), set()).add(one)
    return out


def said_of_lacking(lacks: Mapping[tuple[str, int, int], set[Cell]]) -> list[str]:
    """What is said of these cells, those that are alike together."""
    alike: dict[tuple[int, int, int], list[str]] = {}
    for (model, last, steps), cells in lacks.items():
        alike.setdefault((last, steps, len(cells)), []).append(model)
    each = [
        f"{n} {'each ' * (len(of) > 1)}of {labels.listing(of)} after {last:,} steps, measured "
        f"after {steps:,}" for (last, steps, n), of in alike.items()
    ]
    return [f"Cells that only a shorter training has take no part: {labels.listing(each)}."
            ] if each else []


def notes(
    held: Mapping[Kind, Sequence[Record]], longest: Mapping[Kind, Sequence[Record]],
    settings: Sequence[str],
) -> list[str]:
    """What is said of lengths of training that were left out."""
    out, of = [], []
    for name, own in held.items():
        if any(r.student_steps for r in longest[name]):
            out.append(
                "Of students by halving each number of steps has that which was made for it, or "
                "for the nearest."
            )
        elif len(longest[name]) < len(curves_lib.one_setting(own, settings)):
            of += longest[name]
    if of:
        steps = sorted({r.identity.train_step for r in of})
        out.append(
            "Of each size its longest training is used "
            f"({labels.listing([f'{n:,}' for n in steps], 'or')} steps), no earlier checkpoint."
        )
    return list(dict.fromkeys(out))
