"""What advice chooses from: the cells of records, or the paper's Table 1, with what each costs.
Pure functions on records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, zoo
from ldm_scaling.study import costing, labels, pricing, reported
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study.costing import Price, Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.records import (
    CASCADE,
    CHOSEN,
    DISTILLED,
    FROM_TEXT,
    TASKS,
    Record,
)
from ldm_scaling.study.statistics import blocks

PUBLISHED_STEPS, PUBLISHED_RATE, PUBLISHED_IMAGES = 50, 7.5, 30_000


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
    """

    points: tuple[Point, ...]
    unit: Unit
    unit_label: str
    measure: str
    sign: int
    metric: str | None
    notes: tuple[str, ...]


# --- from records -------------------------------------------------------------------------------


def metric_of(records: Sequence[Record], metric: str | None) -> str:
    """The measure asked for, or the first that the records have.

    Raises:
      UserError: where no record has it.
    """
    have = curves_lib.measures(records)
    if metric is None and have:
        return have[0]
    if metric in have:
        return metric
    said = f"metric {metric!r} is in no record" if metric else "no record has a known measure"
    raise UserError(f"{said}; there are {', '.join(have) or 'none that have a name for readers'}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """What the records of one task give.

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
        here, theirs = ({r.device for r in part.found} for part in (self, other))
        if devices and here != theirs:
            return f"on {labels.listing(sorted(here))} and not {labels.listing(sorted(theirs))}"
        return ""


def _counts(values: Iterable[int]) -> str:
    return labels.listing([f"{n:,}" for n in sorted(values)])


def of_records(
    records: Sequence[Record], unit: Unit, metric: str | None = None, *, select_block: int = 0,
    report_blocks: Sequence[int] = (1,), prices: Mapping[str, Price] | None = None, batch: int = 1,
    settings: Sequence[str] = (),
) -> Options:
    """Every measured cell at its chosen guidance.

    Records of several tasks that draw from text (`records.FROM_TEXT`: members, their students,
    cascades) are weighed together, those of a task that cannot be are left out with a note.

    A sweep reports one guidance rate of each cell, the best by one measure. Another measure is
    then of that rate too, see `curves.chosen_curves`, and decides between cells alone.

    Args:
      records: of one study; of each size those of its longest training are used.
      unit: of the budget; see `pricing.COUNTED` for what it counts.
      metric: the measure; the first that the records have if None.
      select_block: chooses guidance, and between cells.
      report_blocks: are reported, pooled where there are several; see `reported.whole`.
      prices: member -> measured seconds, for a budget in seconds on another device; without them
        seconds are the records' own.
      batch: pictures drawn at a time, for `prices`.
      settings: to be preferred where there are several, see `curves.one_setting`.

    Raises:
      UserError: where records, blocks or measured seconds are missing, or tasks do not compare.
    """
    held = _by_task(records)
    left_out: list[str] = []
    if prices is not None and CASCADE in held:
        why = "cascades are timed in their sweep alone"
        if len(held) == 1:
            raise UserError(
                f"{why}: leave out --device for the records' own seconds, or give a budget in cost "
                "or flops"
            )
        del held[CASCADE]
        left_out.append(f"{why[0].upper()}{why[1:]}, so not weighed on another device.")
    longest = {task: curves_lib.longest(own, settings) for task, own in held.items()}
    found = {task: curves_lib.distinct(own) for task, own in longest.items()}
    metric = metric_of([r for own in found.values() for r in own], metric)
    asked = report_blocks
    parts, report_blocks, lacking = _comparable(
        found, metric, select_block, asked, devices=unit == "seconds" and prices is None)
    points, untimed = pricing.priced_here(
        [p for part in parts.values() for p in part.points], prices, batch)
    counted, where = pricing.counted_of(
        [r for part in parts.values() for r in part.found], points, unit, prices, batch)
    price = {
        task: pricing.of_points(part.found, unit, prices, counted) for task, part in parts.items()
    }
    measure = labels.measure(metric)
    images = sorted({p.num_images for p in points})
    where_reported = labels.listing([str(block) for block in report_blocks])
    notes = [
        f"Chosen on seed block {select_block}, reported on {where_reported} "
        f"({labels.listing([f'{n:,}' for n in images])} pictures each): other prompts and noise. "
        "Intervals and probabilities do not cover the chance of another training run.",
    ]
    if len(parts) > 1:
        notes += _together(parts, points, unit)
    for chooser in sorted({part.chooser for part in parts.values()} - {metric}):
        notes.append(
            f"Guidance is the rate with the best {labels.measure(chooser).short} of each cell, "
            f"the one that is reported; between cells {measure.short} decides."
        )
    notes += filter(None, [reported.left_out(asked, report_blocks)])
    notes += _lengths({task: held[task] for task in parts}, longest, settings)
    kept = [r for task in parts for r in held[task]]
    notes += [*curves_lib.other_settings(kept, settings), *untimed, *left_out, *lacking]
    gaps = [
        g for part in parts.values()
        for g in curves_lib.gaps(part.pooled, part.chooser, select_block, report_blocks[0])
        if not g.reported
    ]
    if gaps:
        notes.append(f"{len(gaps)} of {len(gaps) + len(points)} cells of the grid are not measured "
                     "and take no part.")
    if any(p.low is None for p in points):
        notes.append("Some points have no bootstrap replicates, so no interval.")
    return Options(
        tuple(dataclasses.replace(p, cost=price[p.task](p)) for p in points), unit,
        where, measure.short, measure.sign, metric, tuple(notes),
    )


def _by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by task, members first. Raises `UserError` for tasks that do not compare."""
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
    return held


def _comparable(
    found: Mapping[str, Sequence[Record]], metric: str, select_block: int, asked: Sequence[int],
    devices: bool,
) -> tuple[dict[str, _Part], list[int], list[str]]:
    """The tasks that one choice can be made from, the blocks that report (those of the first task),
    and a note of each other task; of one task alone it is an error."""
    kept: dict[str, _Part] = {}
    report_blocks: list[int] = []
    notes: list[str] = []
    for task, own in found.items():
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
            notes.append(_no_part(task, str(e)))
            continue
        first = next(iter(kept.values()), part)
        how = part.differs(first, devices)
        if not how and kept and there != report_blocks:
            how = f"on seed blocks {there} and not {report_blocks}"
        if how:
            notes.append(_no_part(
                task, f"it was measured {how}, which does not compare; --task={task} is advice on "
                "it alone"))
            continue
        kept[task], report_blocks = part, there
    if not kept:
        raise UserError(f"no task has what advice needs: {' '.join(notes)}")
    return kept, report_blocks, notes


def _no_part(task: str, why: str) -> str:
    return f"{labels.task(task)} takes no part: {why}."


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
            f"is no record, and reports them on others (the records are of blocks {there}): "
            f"{remedy}"
        )
    if not part.points:
        raise UserError(
            f"no configuration has {metric} on seed block {select_block} and, at the guidance "
            f"chosen there, on {list(report_blocks)}; the records are of blocks {there}: "
            "finish the sweep, or give --select-block and --report-blocks"
        )


def _together(parts: Mapping[str, _Part], points: Sequence[Point], unit: Unit) -> list[str]:
    """What is said of several tasks."""
    cells = {task: sum(p.task == task for p in points) for task in parts}
    of = [f"{labels.task(task)} ({n:,} {'cell' if n == 1 else 'cells'})"
          for task, n in cells.items() if n]
    out = [f"Weighed together: {labels.listing(of)}; what has more cells has more to choose from."]
    if any(task in DISTILLED for task in parts):
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


def _lengths(
    held: Mapping[str, Sequence[Record]], longest: Mapping[str, Sequence[Record]],
    settings: Sequence[str],
) -> list[str]:
    """What is said of lengths of training that were left out."""
    out, of = [], []
    for task, own in held.items():
        if any(r.student_steps for r in longest[task]):
            out.append(
                "Of students by halving each number of steps has that which was made for it, or "
                "for the nearest."
            )
        elif len(longest[task]) < len(curves_lib.one_setting(own, settings)):
            of += longest[task]
    if of:
        steps = sorted({r.identity.train_step for r in of})
        out.append(
            "Of each size its longest training is used "
            f"({labels.listing([f'{n:,}' for n in steps], 'or')} steps), no earlier checkpoint."
        )
    return list(dict.fromkeys(out))


# --- from the paper -----------------------------------------------------------------------------

_PUBLISHED = {"fid": ("FID", 1), "clip": ("CLIP score", -1)}
_NONE_R = np.zeros(0)


def of_published(
    unit: Unit, metric: str | None = None, *, prices: Mapping[str, Price] | None = None,
    batch: int = 1,
) -> Options:
    """The paper's Table 1: eleven sizes, each at 50 DDIM steps and guidance 7.5.

    Costs are as printed; FLOPs are XLA's count of the same networks, as the table's own hold a
    misprint.

    Args:
      unit: of the budget.
      metric: "fid" (also if None) or "clip".
      prices, batch: as `of_records`'; sizes without measured seconds take no part.

    Raises:
      UserError: for another metric, or seconds that were measured of none of these sizes.
    """
    metric = metric or "fid"
    if metric not in _PUBLISHED:
        raise UserError(f"metric {metric!r} is not in Table 1; there are {', '.join(_PUBLISHED)}")
    short, sign = _PUBLISHED[metric]
    members = [m for m in zoo.PAPER if prices is None or pricing.timed(prices.get(m.name), batch)]
    if unit == "seconds" and prices is None:
        raise UserError("Table 1 has no seconds: give --device=KIND, with seconds that  "
                        "ldm-scaling cost  measured, or a budget in cost or flops")
    if not members:
        raise UserError(
            f"no measured seconds of the paper's sizes at batch size {batch} there: run  "
            f"ldm-scaling cost --members={','.join(m.name for m in zoo.PAPER)} --batch={batch}  on "
            "that device"
        )
    counted = dataclasses.replace(pricing.COUNTED[unit], batch=batch) if prices is None else \
        pricing.counted_on(prices, [m.name for m in members], unit, batch)
    calls = costing.calls("ddim", PUBLISHED_STEPS)
    device = next(iter(prices.values())).device if prices else ""

    def point(m: zoo.Member) -> Point:
        price = prices[m.name] if prices else Price(
            m.name, cost.gflops(m.spec) if unit == "gflops" else 1.0, m.published.norm_cost
        )
        value = getattr(m.published, metric)
        spent = costing.sampling(price, calls, True, unit, counted)
        return Point(
            m.name, "ddim", PUBLISHED_STEPS, PUBLISHED_RATE, spent, float("nan"), value, None, None,
            sign * value, _NONE_R, PUBLISHED_IMAGES,
        )

    notes = (
        "From the paper's Table 1 (arXiv 2404.01367) alone, which supports little: one sampler "
        f"(DDIM), one step count ({PUBLISHED_STEPS}), one guidance rate ({PUBLISHED_RATE}).",
        "It says which size to take where that many steps are affordable, and nothing of whether a "
        "larger size with fewer steps, or a smaller one with other settings, would do better.",
        "It has no error bars: each size was trained once. Half of the neighbouring sizes differ "
        "by less than 2% in FID; whether one is truly better is not known.",
        "Records of your own say more: ldm-scaling sweep, then --records=DIR.",
    )
    lacking = [m.name for m in zoo.PAPER if m not in members]
    if lacking:
        without = labels.listing(lacking)
        notes += (f"Without measured seconds, so not taken into account: {without}.",)
    return Options(
        tuple(map(point, members)), unit, costing.label(unit, counted, device), short, sign, None,
        notes,
    )
