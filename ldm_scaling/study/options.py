"""What advice chooses from: the cells of records, with what each costs (`table_1` has the paper's).
Pure functions on records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, lengths, pricing, repeated, reported
from ldm_scaling.study.costing import Price, Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.lengths import Kind
from ldm_scaling.study.pricing import Reference, Training
from ldm_scaling.study.records import (
    CASCADE,
    CHOSEN,
    DISTILLED,
    FROM_TEXT,
    TASKS,
    Record,
)
from ldm_scaling.study.statistics import blocks


def kind(task: str, sampler: str) -> Kind:
    """The task, and of students the method, told by the sampler that they are drawn by: of
    consistency distillation there are two, CoDi's and LCM's."""
    return task, sampler.partition(", ")[0].partition(":")[0] if task in DISTILLED else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What there is to choose from.

    Attributes:
      points: configurations; their `cost` is in `unit`, whatever it is.
      unit: see `costing.sampling`.
      unit_label: the unit in words, with what is counted.
      measure: the measure in words, short.
      sign: 1 where less of it is better, -1 where more is.
      metric: its name in the records; None where there are none.
      notes: what a reader must know of them, in sentences.
      reference: what costs 1, in the unit `cost`.
      untimed: of the notes that on sizes without measured seconds; empty where all have some.
      steps_alone: the only number of steps that a published table has; 0 of records.
      places: decimals of published values; None of records.
      blocks: seed blocks that report, whose mean the points' values are.
      doubt: of the notes what speaks against a choice by seconds, in short: how they were measured,
        or that of some sizes they were not on the device; empty where nothing does.
      pictures: that training is spread over; 0 where it is not counted.
      lucky: whether replicates hold the luck of a training run, see `study.repeated`.
    """

    points: tuple[Point, ...]
    unit: Unit
    unit_label: str
    measure: str
    sign: int
    metric: str | None
    notes: tuple[str, ...]
    reference: Reference | None = None
    untimed: str = ""
    steps_alone: int = 0
    places: int | None = None
    blocks: int = 1
    doubt: str = ""
    pictures: int = 0
    lucky: bool = False

    def value(self, value: float) -> str:
        """A value of the measure for readers."""
        return labels.number(value) if self.places is None else f"{value:.{self.places}f}"


def only(
    options: Options, models: Collection[str] = (), samplers: Collection[str] = (),
    most_steps: int | None = None,
) -> Options:
    """The options that were asked for.

    Args:
      options: of which guidance was chosen for each.
      models, samplers: their names, and these with their options; all if empty.
      most_steps: their steps; any if None.

    Raises:
      UserError: naming what there is.
    """
    asked: list[str] = []

    def kept(points: Sequence[Point], flag: str, wanted: Collection[str], of: Any) -> list[Point]:
        there = sorted({of(p) for p in points})
        if lacking := [name for name in wanted if name not in there]:
            why = f". {options.untimed}" if options.untimed else ""
            raise UserError(f"--{flag}={lacking[0]}: there are {', '.join(there)}{why}")
        asked.extend(wanted)
        return [p for p in points if of(p) in wanted] if wanted else list(points)

    def base(p: Point) -> str:
        return p.sampler.partition(", ")[0]

    points = kept(options.points, "member", list(models), lambda p: p.model)
    there = {base(p) for p in points}
    points = kept(
        points, "sampler", [s if s in there else solvers.canonical(s) for s in samplers], base)
    if most_steps is not None:
        least = min(p.steps for p in points)
        if least > most_steps:
            raise UserError(f"--max-steps={most_steps}: the fewest that there are is {least}")
        asked.append(f"at most {most_steps} step{'s' * (most_steps > 1)}")
        points = [p for p in points if p.steps <= most_steps]
    if not asked:
        return options
    note = f"As asked, of {labels.listing(asked)} alone."
    return dataclasses.replace(options, points=tuple(points), notes=(*options.notes, note))


# --- from records -------------------------------------------------------------------------------


def metric_of(records: Sequence[Record], metric: str | None) -> str:
    """The measure asked for, or the one that chose the records' guidance.

    Raises:
      UserError: where no record has it.
    """
    have = curves_lib.measures(records)
    if metric is None and have:
        return reported.leading(records)
    if metric in have:
        return metric
    said = f"metric {metric!r} is in no record" if metric else "no record has a known measure"
    raise UserError(f"{said}; there are {', '.join(have) or 'none that have a name for readers'}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """What the records of one task, or of one of its methods, give.

    Attributes:
      found: distinct, of each size those of its longest training.
      pooled: the same with the blocks that report as one.
      chooser: the measure that chose guidance.
      points: its cells, their `cost` that of the paper.
    """

    found: Sequence[Record]
    pooled: Sequence[Record]
    chooser: str
    points: Sequence[Point]

    def differs(self, other: _Part, devices: bool) -> str:
        """How it was measured, in words, where values or replicates do not compare with another's;
        empty where they do.

        Args:
          other: the part that it is held against.
          devices: whether seconds are compared too.
        """
        # Of a race the hash tells the number of pictures too, which is foretold for.
        reference, theirs = ({r.identity.reference_hash for r in part.found if not r.round}
                             for part in (self, other))
        if reference != theirs:
            return "with other reference statistics"
        images, theirs = ({p.num_images for p in part.points} for part in (self, other))
        if images != theirs:
            return f"with {_counts(images)} pictures a cell and not {_counts(theirs)}"
        drawn, theirs = ({p.replicates_R.size for p in part.points} - {0} for part in (self, other))
        if drawn and theirs and drawn != theirs:
            return f"with {_counts(drawn)} replicates and not {_counts(theirs)}"
        here, theirs = (pricing.devices_of(part.found) for part in (self, other))
        if devices and here and theirs and here != theirs:
            return f"on {labels.listing(here)} and not {labels.listing(theirs)}"
        return ""


def _counts(values: Iterable[int]) -> str:
    return labels.listing([f"{n:,}" for n in sorted(values)])


def of_records(
    records: Sequence[Record], unit: Unit, metric: str | None = None, *, select_block: int = 0,
    report_blocks: Sequence[int] = (1,), prices: Mapping[str, Price] | None = None, batch: int = 1,
    settings: Sequence[str] = (), training: Training | None = None,
) -> Options:
    """Every measured cell at its chosen guidance.

    Records of several tasks that draw from text (`records.FROM_TEXT`: members, their students of
    every method, cascades) are weighed together, those of a task or method that cannot be are left
    out with a note. So are cells of other numbers of pictures than most have: with fewer a distance
    is larger.

    A sweep reports one guidance rate of each cell, the best by one measure. Another measure is
    then of that rate too, see `curves.chosen_curves`, and decides between cells alone.

    Args:
      records: of one study; of each size those of its longest training are used, and with
        `training` each earlier checkpoint as a network of its own.
      unit: of the budget; see `pricing.COUNTED` for what it counts.
      metric: the measure; see `metric_of` if None.
      select_block: chooses guidance, and between cells.
      report_blocks: are reported, pooled where there are several; see `reported.whole`.
      prices: member -> measured seconds, for a budget in seconds on another device; without them
        seconds are the records' own.
      batch: pictures drawn at a time, for `prices`.
      settings: to be preferred where there are several of a method, see `curves.one_setting`.
      training: counted too, in a budget in FLOPs, of members that were trained from the start.

    Raises:
      UserError: where records, blocks or measured seconds are missing, or tasks do not compare.
    """
    if training is not None:
        training.check(records, unit)
    records = repeated.merged(curves_lib.last_rounds(records))
    held = _by_kind(records, settings)
    left_out: list[str] = []
    cascades = CASCADE, ""
    if prices is not None and cascades in held:
        why = "cascades are timed in their sweep alone"
        if len(held) == 1:
            raise UserError(
                f"{why}: leave out --device for the records' own seconds, or give a budget in cost "
                "or flops"
            )
        del held[cascades]
        left_out.append(f"{why[0].upper()}{why[1:]}, so not weighed on another device.")
    named: dict[str, str] = {}
    every = held
    if training is not None:
        held, named = lengths.along(held)
    longest = {name: curves_lib.longest(own, settings) for name, own in held.items()}
    found = {}
    for name, own in longest.items():
        found[name], fewer = reported.of_one_number(curves_lib.distinct(own))
        left_out += fewer
    metric = metric_of([r for own in found.values() for r in own], metric)
    asked = report_blocks
    parts, report_blocks, lacking = _comparable(
        found, metric, select_block, asked, devices=unit == "seconds" and prices is None)
    cells = [p for part in parts.values() for p in part.points]
    points, untimed = pricing.priced_here(cells, unit, prices, batch)
    weighed = [r for part in parts.values() for r in part.found]
    counted, where = pricing.counted_of(weighed, points, unit, prices, batch)
    ones = pricing.references(weighed)
    one = ones[-1].gflops if len(ones) > 1 else None
    price = {
        name: pricing.of_points(part.found, unit, prices, counted, one, training)
        for name, part in parts.items()
    }
    measure = labels.measure(metric)
    images = sorted({p.num_images for p in points})
    where_reported = labels.listing([str(block) for block in report_blocks])
    notes = [
        *untimed,
        f"Chosen on seed block {select_block}, reported on {where_reported} "
        f"({labels.listing([f'{n:,}' for n in images])} pictures each): other prompts and noise. "
        + (repeated.words(weighed) or
           "Intervals and probabilities do not cover the chance of another training run."),
    ]
    if unit == "cost":
        notes += [ones[-1].note, *pricing.mixed(ones)]
    doubts = pricing.doubts(weighed) if unit == "seconds" and prices is None else []
    notes += doubts
    if training is not None:
        notes += training.notes(lengths.last_of(weighed, named))

    def part_of(p: Point) -> Kind:
        return lengths.ALONG if p.model in named else kind(p.task, p.sampler)

    if len(parts) > 1:
        notes += _together(parts, Counter(map(part_of, points)), unit)
    for chooser in sorted({part.chooser for part in parts.values()} - {metric}):
        notes.append(
            f"Guidance is the rate with the best {labels.measure(chooser).short} of each cell, "
            f"the one that is reported; between cells {measure.short} decides."
        )
    notes += filter(None, [reported.left_out(asked, report_blocks)])
    notes += lengths.notes({name: held[name] for name in parts}, longest, settings)
    for name in parts:
        notes += curves_lib.other_settings(held[name], settings)
    notes += [*left_out, *lacking]
    notes += _gaps(parts, every, longest, settings, select_block, report_blocks[0])
    if any(p.low is None for p in points):
        notes.append("Some points have no bootstrap replicates, so no interval.")
    taught = {r.identity.model: training.share(r) for r in weighed} if training else {}
    return Options(
        tuple(
            dataclasses.replace(p, model=named.get(p.model, p.model), cost=price[part_of(p)](p),
                                taught=taught.get(p.model, 0.0)) for p in points
        ),
        unit, where, measure.short, measure.sign, metric, tuple(notes),
        ones[-1] if unit == "cost" else None,
        " ".join([*untimed, *(lacking if training else ())]), blocks=len(report_blocks),
        doubt=next(iter(doubts if prices is None else untimed), ""),
        pictures=training.pictures if training else 0, lucky=repeated.luck_of(weighed) > 0,
    )


def _by_kind(records: Sequence[Record], settings: Sequence[str]) -> dict[Kind, list[Record]]:
    """Records by task, members first, and of students by method, first that of `settings`. Raises
    `UserError` for tasks that do not compare."""
    held: dict[str, list[Record]] = {}
    for task in TASKS:
        if own := [r for r in records if r.task == task]:
            held[task] = own
    if len(held) > 1 and not set(held) <= set(FROM_TEXT):
        alone = [task for task in held if task not in FROM_TEXT]
        together = ",".join(task for task in held if task in FROM_TEXT)
        raise UserError(
            "the records are of several tasks that do not compare: give "
            f"--task={' or '.join(sorted([*alone, *filter(None, [together])]))}"
        )
    out: dict[Kind, list[Record]] = {}
    for own in held.values():
        for r in sorted(own, key=lambda r: (r.setting not in settings, r.identity.sampler)):
            out.setdefault(kind(r.task, r.identity.sampler), [])
        for r in own:
            out[kind(r.task, r.identity.sampler)].append(r)
    return out


def _names(kinds: Collection[Kind]) -> dict[Kind, str]:
    """Each in words: the task, and the method where there are several of it."""
    methods = Counter(task for task, _ in {*kinds} - {lengths.ALONG})

    def which(task: str, method: str) -> str:
        if (task, method) == lengths.ALONG:
            return f" {method}"
        return f" by {labels.sampler(method)}" if methods[task] > 1 else ""

    return {name: labels.task(name[0]) + which(*name) for name in kinds}


def _comparable(
    found: Mapping[Kind, Sequence[Record]], metric: str, select_block: int, asked: Sequence[int],
    devices: bool,
) -> tuple[dict[Kind, _Part], list[int], list[str]]:
    """The kinds that one choice can be made from, the blocks that report (those of the first), and
    a note of each other; of one kind alone it is an error."""
    kept: dict[Kind, _Part] = {}
    report_blocks: list[int] = []
    notes: list[str] = []
    names = _names(found)
    for name, own in found.items():
        there = reported.whole(own, metric, select_block, asked)
        pooled = blocks.pooled(own, select_block, there)
        chooser, curves = curves_lib.chosen_curves(
            pooled, metric, metric, select_block, there[0])
        part = _Part(own, pooled, chooser, [p for curve in curves.values() for p in curve])
        try:
            _require_points(part, metric, select_block, there)
        except UserError as e:
            if len(found) == 1:
                raise
            notes.append(_no_part(names[name], str(e)))
            continue
        first = next(iter(kept.values()), part)
        how = part.differs(first, devices)
        if not how and kept and there != report_blocks:
            how = f"on seed blocks {there} and not {report_blocks}"
        if how:
            one = names[name] == labels.task(name[0])
            alone = f"--task={name[0]} is advice on it alone" if one else (
                "of each size its longest training is weighed alone" if name == lengths.ALONG else
                f"copy its records, whose sampler is {name[1]}, to a folder of their own for "
                "advice on it alone")
            notes.append(_no_part(
                names[name], f"it was measured {how}, which does not compare; {alone}"))
            continue
        kept[name], report_blocks = part, there
    if not kept:
        raise UserError(f"no task has what advice needs: {' '.join(notes)}")
    return kept, report_blocks, notes


def _no_part(name: str, why: str) -> str:
    return f"{name} takes no part: {why}."


def _require_points(
    part: _Part, metric: str, select_block: int, report_blocks: Sequence[int]
) -> None:
    there = blocks.blocks(part.found)
    if select_block not in there:
        one_rate = all(r.task not in CHOSEN for r in part.found) and (
            len({r.identity.guidance for r in part.found}) == 1)
        remedy = (
            "it was measured at one guidance rate, and so on the blocks that report alone: give "
            "its sweep a second rate" if one_rate else
            "measure that block too, or give --select-block and --report-blocks, two different ones"
        )
        raise UserError(
            f"advice chooses between configurations on seed block {select_block}, of which there "
            f"is no record, and reports them on others (the records are of {_named(there)}): "
            f"{remedy}"
        )
    if not part.points:
        raced = any(r.round for r in part.found) and any(metric in r.metrics for r in part.found)
        remedy = (
            "rates raced, and rounds hold what is foretold alone: name another measure" if raced
            else "finish the sweep, or give --select-block and --report-blocks"
        )
        raise UserError(
            f"no configuration has {metric} on seed block {select_block} and, at the guidance "
            f"chosen there, on {_named(report_blocks)}; the records are of {_named(there)}: "
            f"{remedy}"
        )


def _named(some: Sequence[int]) -> str:
    return f"block{'s' * (len(some) > 1)} {labels.listing([str(block) for block in some])}"


def _together(parts: Mapping[Kind, _Part], cells: Mapping[Kind, int], unit: Unit) -> list[str]:
    """What is said of several kinds, of which so many cells are weighed."""
    of = [f"{text} ({cells[name]:,} {'cell' if cells[name] == 1 else 'cells'})"
          for name, text in _names(parts).items() if cells[name]]
    out = [f"Weighed together: {labels.listing(of)}; what has more cells has more to choose from."]
    if any(task in DISTILLED for task, _ in parts):
        out.append(
            "In brackets stands by what a size's student was distilled; what training cost is not "
            "counted."
        )
    told = {r.told for part in parts.values() for r in part.found}
    if unit == "cost" and len(told) > 1:
        out.append(
            "A guided pair of calls counts once, as in the paper, and so does the one call of a "
            "student that is told its rate: a budget in flops counts two and one."
        )
    return out


def _gaps(
    parts: Mapping[Kind, _Part], held: Mapping[Kind, Sequence[Record]],
    longest: Mapping[Kind, Sequence[Record]], settings: Sequence[str], select_block: int,
    report_block: int,
) -> list[str]:
    """What is said of cells that take no part."""
    out, lacks = [], {}
    parts = dict(parts)
    along = parts.pop(lengths.ALONG, None)
    for name, part in parts.items():
        lacks |= lengths.lacking(part.points, held.get(name, ()), longest[name], settings)
    before = {cell for cells in lacks.values() for cell in cells}
    gaps = [
        g for part in parts.values()
        for g in curves_lib.gaps(part.pooled, part.chooser, select_block, report_block)
        if not g.reported and lengths.base(*g.cell) not in before
    ]
    if gaps:
        there = sum(len(part.points) for part in parts.values())
        out.append(f"{len(gaps)} of {len(gaps) + there} cells of the grid are not measured and "
                   "take no part.")
    if along is None:
        return out + lengths.said_of_lacking(lacks)
    have = {lengths.base(p.model, p.sampler, p.steps) for p in along.points}
    if half := {lengths.cell(r) for r in along.found} - have:
        some = labels.listing(sorted({model for model, _, _ in half}))
        out.append(f"{labels.counted(len(half), 'cell')} of {some} take{'s' * (len(half) == 1)} no "
                   "part: not measured on all seed blocks.")
    return out
