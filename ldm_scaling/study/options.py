"""What advice chooses from: the cells of records, or the paper's Table 1, with what each costs.
Pure functions on records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, zoo
from ldm_scaling.study import costing, labels, reported
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study.costing import Counted, Price, Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import blocks

# What a budget counts, by its unit: the paper's cost as the paper has it; FLOPs and seconds as they
# are spent.
COUNTED: dict[Unit, Counted] = {
    "cost": costing.THE_PAPERS, "gflops": Counted(doubled=True), "seconds": costing.ALL,
}
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


def of_records(
    records: Sequence[Record], unit: Unit, metric: str | None = None, *, select_block: int = 0,
    report_blocks: Sequence[int] = (1,), prices: Mapping[str, Price] | None = None, batch: int = 1,
    settings: Sequence[str] = (),
) -> Options:
    """Every measured cell at its chosen guidance.

    A sweep reports one guidance rate of each cell, the best by one measure. Another measure is
    then of that rate too, see `_chooser`, and decides between cells alone.

    Args:
      records: of one study; of each size those of its longest training are used.
      unit: of the budget; see `COUNTED` for what it counts.
      metric: the measure; the first that the records have if None.
      select_block: chooses guidance, and between cells.
      report_blocks: are reported, pooled where there are several; see `reported.whole`.
      prices: member -> measured seconds, for a budget in seconds on another device; without them
        seconds are the records' own.
      batch: pictures drawn at a time, for `prices`.
      settings: to be preferred where there are several, see `curves.one_setting`.

    Raises:
      UserError: where records, blocks or measured seconds are missing.
    """
    if prices is not None and any(r.first for r in records):
        raise UserError(
            "cascades are timed in their sweep alone: leave out --device for the records' own "
            "seconds, or give a budget in cost or flops"
        )
    longest = curves_lib.longest(records, settings)
    found = curves_lib.distinct(longest)
    metric = metric_of(found, metric)
    there = blocks.blocks(found)
    if select_block not in there:
        raise UserError(
            f"advice chooses between configurations on seed block {select_block}, of which there "
            f"is no record, and reports them on others (the records are of blocks {there}): "
            "measure that block too, or give --select-block and --report-blocks, two different ones"
        )
    asked = report_blocks
    report_blocks = reported.whole(found, metric, select_block, asked)
    pooled = blocks.pooled(found, select_block, report_blocks)
    chooser, points = _chooser(pooled, metric, select_block, report_blocks[0])
    if not points:
        raise UserError(
            f"no configuration has {metric} on seed block {select_block} and, at the guidance "
            f"chosen there, on {report_blocks}; the records are of blocks {there}: "
            "finish the sweep, or give --select-block and --report-blocks"
        )
    points, left_out = _priced_here(points, prices, batch)
    price, where = _pricing(found, points, unit, prices, batch)
    measure = labels.measure(metric)
    images = sorted({p.num_images for p in points})
    where_reported = labels.listing([str(block) for block in report_blocks])
    notes = [
        f"Chosen on seed block {select_block}, reported on {where_reported} "
        f"({labels.listing([f'{n:,}' for n in images])} pictures each): other prompts and noise. "
        "Intervals and probabilities do not cover the chance of another training run.",
    ]
    if chooser != metric:
        notes.append(
            f"Guidance is the rate with the best {labels.measure(chooser).short} of each cell, "
            f"the one that is reported; between cells {measure.short} decides."
        )
    notes += filter(None, [reported.left_out(asked, report_blocks)])
    if any(r.student_steps for r in longest):
        notes.append(
            "Of students by halving each number of steps has that which was made for it, or for "
            "the nearest."
        )
    elif len(longest) < len(curves_lib.one_setting(records, settings)):
        steps = sorted({r.identity.train_step for r in longest})
        notes.append(
            "Of each size its longest training is used "
            f"({labels.listing([f'{n:,}' for n in steps], 'or')} steps), no earlier checkpoint."
        )
    notes += [*curves_lib.other_settings(records, settings), *left_out]
    gaps = [g for g in curves_lib.gaps(pooled, chooser, select_block, report_blocks[0])
            if not g.reported]
    if gaps:
        notes.append(f"{len(gaps)} of {len(gaps) + len(points)} cells of the grid are not measured "
                     "and take no part.")
    if any(p.low is None for p in points):
        notes.append("Some points have no bootstrap replicates, so no interval.")
    return Options(
        tuple(dataclasses.replace(p, cost=price(p)) for p in points), unit,
        where, measure.short, measure.sign, metric, tuple(notes),
    )


def _chooser(
    records: Sequence[Record], metric: str, select: int, report: int
) -> tuple[str, list[Point]]:
    """The measure that chooses guidance, and the points of `metric`.

    It is the measure at whose best rates most cells are reported: the one that the sweep chose by,
    `metric` itself where it does as well. `chosen_by` is of `metric` all the same.
    """
    at = {(r.identity.model, r.identity.sampler, r.identity.steps, r.identity.guidance): r.metrics
          for r in records if r.identity.seed_block == select}
    sign = labels.measure(metric).sign

    def points(chooser: str) -> list[Point]:
        curves = curves_lib.quality_curves(records, metric, chooser, select, report)
        return [
            dataclasses.replace(p, chosen_by=sign * chosen)
            for curve in curves.values() for p in curve
            if (chosen := at[p.model, p.sampler, p.steps, p.guidance].get(metric)) is not None
        ]

    choosers = dict.fromkeys([metric, *curves_lib.measures(records)])
    return max(((name, points(name)) for name in choosers), key=lambda c: len(c[1]))


def _priced_here(
    points: Sequence[Point], prices: Mapping[str, Price] | None, batch: int
) -> tuple[list[Point], list[str]]:
    """The points whose size was measured at this batch size, and a note of the others."""
    if prices is None:
        return list(points), []
    device = next((p.device for p in prices.values()), "the device")
    lacking = sorted({p.model for p in points if not _timed(prices.get(p.model), batch)})
    kept = [p for p in points if p.model not in lacking]
    if not kept:
        raise UserError(
            f"no measured seconds of {', '.join(lacking)} at batch size {batch} on {device}: run  "
            f"ldm-scaling cost --members={','.join(lacking)} --batch={batch}  there, with the "
            "study's --config if it has one"
        )
    if not lacking:
        return kept, []
    return kept, [f"{labels.listing(lacking)}: no measured seconds at batch size {batch} on "
                  f"{device}, so not taken into account."]


def _timed(price: Price | None, batch: int) -> bool:
    needed = ("network", "guided", "decoder")
    return price is not None and all((part, batch) in price.seconds for part in needed)


def _pricing(
    records: Sequence[Record], points: Sequence[Point], unit: Unit,
    prices: Mapping[str, Price] | None, batch: int,
) -> tuple[Callable[[Point], float], str]:
    """What a point costs, and the unit in words."""
    cells = {(r.identity.model, r.identity.sampler, r.identity.steps): r for r in records}
    if unit == "seconds" and prices is None:
        devices = sorted({r.device for r in records})
        if len(devices) > 1:
            raise UserError(
                f"the records were measured on {labels.listing(devices)}, so their seconds do not "
                "compare: give --device=KIND, with seconds that  ldm-scaling cost  measured"
            )
        return (lambda p: p.seconds), f"seconds a picture in the sweep's batches on {devices[0]}"
    if prices is not None:
        _check_networks(cells.values(), prices)
        counted = dataclasses.replace(COUNTED[unit], batch=batch)
        # Where the text encoder was not timed, the rest is counted, and the label says so.
        texts = [("text", batch) in prices[m].seconds for m in {p.model for p in points}]
        if not all(texts):
            counted = dataclasses.replace(counted, text=False)
        device = next(iter(prices.values())).device
    else:
        prices = {
            r.identity.model: Price(r.identity.model, r.gflops, r.norm_cost) for r in cells.values()
        }
        counted, device = COUNTED[unit], ""

    def price(p: Point) -> float:
        record = cells[p.model, p.sampler, p.steps]
        guided = p.guidance != 1 and not record.told
        if record.first is None:
            return costing.sampling(prices[p.model], record.calls, guided, unit, counted)
        first = record.first
        own = Price(first.model, first.gflops, first.norm_cost)
        both = first.upper_guidance != 1
        return costing.sampling(own, first.calls, guided, unit, counted) + costing.sampling(
            prices[p.model], record.calls, both, unit, counted)

    return price, costing.label(unit, counted, device)


def _check_networks(records: Iterable[Record], prices: Mapping[str, Price]) -> None:
    """Raises `UserError` where a name means different networks."""
    for r in records:
        price = prices.get(r.identity.model)
        if price is not None and abs(r.gflops / price.gflops - 1) > 0.01:
            raise UserError(
                f"{r.identity.model} takes {r.gflops:.4g} GFLOPs a call in the records and "
                f"{price.gflops:.4g} in the measured seconds: they are of different networks"
            )


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
    members = [m for m in zoo.PAPER if prices is None or _timed(prices.get(m.name), batch)]
    if unit == "seconds" and prices is None:
        raise UserError("Table 1 has no seconds: give --device=KIND, with seconds that  "
                        "ldm-scaling cost  measured, or a budget in cost or flops")
    if not members:
        raise UserError(
            f"no measured seconds of the paper's sizes at batch size {batch} there: run  "
            f"ldm-scaling cost --members={','.join(m.name for m in zoo.PAPER)} --batch={batch}  on "
            "that device"
        )
    counted = dataclasses.replace(COUNTED[unit], batch=batch)
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
