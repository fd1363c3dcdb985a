"""What the cells of records cost in the unit of a budget."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import costing, labels
from ldm_scaling.study.costing import Counted, Price, Unit
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.records import TEXT_TO_IMAGE, First, Record

# What a budget counts, by its unit: the paper's cost as the paper has it; FLOPs and seconds as they
# are spent.
COUNTED: dict[Unit, Counted] = {
    "cost": costing.THE_PAPERS, "gflops": Counted(doubled=True), "seconds": costing.ALL,
}
# How much two counts of one network's FLOPs may differ by: XLA's versions do not agree to the last.
_SAME = 1e-3
# How much its FLOPs may differ by from those that were timed. A student that is told its rate has
# an embedding of it more: 2% of the smallest networks' at the usual width.
_TIMED, _TOLD = 0.01, 0.1
# Seconds of one measurement lie on a line, calls x a row's + the rest. Beyond these factors it is
# said that they do not, and that a network of fewer FLOPs is the slower one.
_APART, _SLOWER = 1.5, 1.1


def priced_here(
    points: Sequence[Point], unit: Unit, prices: Mapping[str, Price] | None, batch: int
) -> tuple[list[Point], list[str]]:
    """The points that have a price: in seconds those whose own were measured, or with `prices`
    those whose size was at this batch size. And a note of the others."""
    if prices is None:
        if unit != "seconds":
            return list(points), []
        kept = [p for p in points if p.seconds]
        if not kept:
            raise UserError(
                "no record of the reported seed blocks that advice could choose holds measured "
                "seconds (seconds_per_image is 0), and no other block's count: give a budget in "
                "cost or flops, or --device=KIND, with seconds that  ldm-scaling cost  measured"
            )
        return kept, [*filter(None, [without_seconds(points)])]
    device = next((p.device for p in prices.values()), "the device")
    lacking = sorted({p.model for p in points if not timed(prices.get(p.model), batch)})
    kept = [p for p in points if p.model not in lacking]
    if not kept:
        raise UserError(
            f"no measured seconds of {', '.join(lacking)} at batch size {batch} on {device}: run  "
            f"ldm-scaling cost --member={','.join(lacking)} --batch={batch}  there, with the "
            "study's --config if it has one"
        )
    if not lacking:
        return kept, []
    return kept, [f"{labels.listing(lacking)}: no measured seconds at batch size {batch} on "
                  f"{device}, so not taken into account."]


def timed(price: Price | None, batch: int) -> bool:
    """Whether all that a picture takes was measured at this batch size."""
    needed = ("network", "guided", "decoder")
    return price is not None and all((part, batch) in price.seconds for part in needed)


def counted_of(
    records: Sequence[Record], points: Sequence[Point], unit: Unit,
    prices: Mapping[str, Price] | None, batch: int,
) -> tuple[Counted, str]:
    """What is counted of a picture, and the unit in words."""
    if unit == "seconds" and prices is None:
        devices = devices_of(records)
        if len(devices) > 1:
            raise UserError(
                f"the records were measured on {labels.listing(devices)}, so their seconds do not "
                "compare: give --device=KIND, with seconds that  ldm-scaling cost  measured"
            )
        return COUNTED[unit], f"seconds a picture in the sweep's batches on {devices[0]}"
    if prices is None:
        return COUNTED[unit], costing.label(unit, COUNTED[unit])
    counted = counted_on(prices, {p.model for p in points}, unit, batch)
    return counted, costing.label(unit, counted, next(iter(prices.values())).device)


def counted_on(
    prices: Mapping[str, Price], members: Iterable[str], unit: Unit, batch: int
) -> Counted:
    """What is counted of these members' pictures on a device: where the text encoder was not timed,
    the rest."""
    counted = dataclasses.replace(COUNTED[unit], batch=batch)
    if all(("text", batch) in prices[m].seconds for m in members):
        return counted
    return dataclasses.replace(counted, text=False)


def of_points(
    records: Sequence[Record], unit: Unit, prices: Mapping[str, Price] | None, counted: Counted,
    one: float | None = None, training: Training | None = None,
) -> Callable[[Point], float]:
    """What a point of one task's records costs.

    Args:
      records, unit, prices, counted: see `options.of_records`.
      one: GFLOPs of what costs 1; the records' own if None.
      training: whose share is added, if any's.
    """
    # Records of earlier versions do not say how many pairs their table has: as others' of it.
    told: dict[tuple, set[int]] = {}
    for r in records:
        if r.guided_calls is not None:
            told.setdefault(_table(r), set()).add(r.guided_calls)
    pairs = {table: n for table, (n, *others) in told.items() if not others}
    cells = {
        (r.identity.model, r.identity.sampler, r.identity.steps):
        r if r.guided_calls is not None else
        dataclasses.replace(r, guided_calls=pairs.get(_table(r))) for r in records
    }

    def own(name: str, of: Record | First) -> Price:
        return Price(name, of.gflops, of.gflops / one if one else of.norm_cost)

    if unit == "seconds" and prices is None:
        return lambda p: p.seconds
    if prices is not None:
        _check_networks(cells.values(), prices)
    else:
        prices = {r.identity.model: own(r.identity.model, r) for r in cells.values()}

    def spent(price: Price, of: Record | First, guided: bool) -> float:
        return costing.sampling(price, of.calls, guided, unit, counted, of.guided_calls)

    def price(p: Point) -> float:
        record = cells[p.model, p.sampler, p.steps]
        guided, first = _guided(record, p.guidance), record.first
        taught = training.share(record) if training else 0.0
        if first is None:
            return taught + spent(prices[p.model], record, guided)
        both = first.upper_guidance != 1
        return spent(own(first.model, first), first, guided) + (
            spent(prices[p.model], record, both))

    return price


def _table(record: Record) -> tuple[str, int, str, str]:
    """What decides the rows of its table, within one study."""
    i = record.identity
    return i.sampler, i.steps, i.spacing, record.setting


def _check_networks(records: Iterable[Record], prices: Mapping[str, Price]) -> None:
    """Raises `UserError` where a name means different networks."""
    for r in records:
        price = prices.get(r.identity.model)
        if price is None:
            continue
        more = r.gflops / price.gflops - 1
        if not -_TIMED <= more <= (_TOLD if r.told else _TIMED):
            raise UserError(
                f"{r.identity.model} takes {r.gflops:.4g} GFLOPs a call in the records and "
                f"{price.gflops:.4g} in the measured seconds: they are of different networks, or "
                "of captions of other lengths: measure them by  ldm-scaling cost  with the study's "
                "--config; records of an earlier version are counted anew by  ldm-scaling sweep"
            )


def _evaluations(record: Record, guided: bool) -> float:
    """Calls, and of guided pairs the mean of both: of one kind of program seconds rise with it."""
    if not guided or record.guided_calls is None:
        return record.calls
    return (record.calls + record.guided_calls) / 2


def _guided(record: Record, guidance: float) -> bool:
    """Whether its calls at this rate are pairs."""
    return guidance != 1 and not record.told


# --- what costs 1 -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """The network of which one call costs 1.

    Attributes:
      model: its name; None where no record is of it.
      gflops: of a call.
    """

    model: str | None
    gflops: float

    @property
    def words(self) -> str:
        """It in a sentence."""
        return self.model or f"a network of {labels.number(self.gflops)} GFLOPs"

    @property
    def note(self) -> str:
        """What a cost of 1 is."""
        of = f", {labels.number(self.gflops)} GFLOPs" if self.model else ""
        return f"A cost of 1 is one call of {self.words}{of}."


def references(records: Iterable[Record]) -> list[Reference]:
    """What costs 1, by each of these records: one of one study, in FLOPs rising."""
    stages = [part for r in records for part in (r, r.first) if part]
    ones: list[float] = []
    for one in sorted({part.gflops / part.norm_cost for part in stages}):
        if not ones or one > ones[-1] * (1 + _SAME):
            ones.append(one)
    named = {
        part.gflops: part.identity.model if isinstance(part, Record) else part.model
        for part in stages if not getattr(part, "first", None)
    }
    return [
        Reference(min((name for gflops, name in named.items() if abs(gflops / one - 1) < _SAME),
                      default=None), one)
        for one in ones
    ]


def mixed(found: Sequence[Reference]) -> list[str]:
    """What is said of records that count cost in calls of several networks."""
    if len(found) < 2:
        return []
    named = [f"{one.words} ({labels.number(one.gflops)} GFLOPs)" if one.model else one.words
             for one in found]
    return [f"The records count cost in calls of {labels.listing(named)}: all are counted in those "
            f"of {found[-1].words} here."]


# --- training -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """What training takes, spread over the pictures that are drawn with what it made.

    Attributes:
      batch_size: examples of a step.
      pictures: that are drawn.
    """

    batch_size: int
    pictures: int

    def share(self, record: Record) -> float:
        """GFLOPs of a picture: of an example three calls' (the backward pass takes two)."""
        examples = record.identity.train_step * self.batch_size
        return 3 * record.gflops * examples / self.pictures

    def check(self, records: Iterable[Record], unit: Unit) -> None:
        """Raises `UserError` where it cannot be counted."""
        if unit != "gflops":
            raise UserError('--pictures goes with a budget in FLOPs, such as --budget="1 gflops"')
        for r in records:
            if r.task != TEXT_TO_IMAGE:
                raise UserError(
                    f"--pictures: records of {r.task} do not tell what trained their networks "
                    f"before: --task={TEXT_TO_IMAGE} is advice on members alone"
                )
            if not r.identity.train_step:
                raise UserError(f"--pictures: {r.identity.model} was not trained here")

    def notes(self, records: Iterable[Record]) -> list[str]:
        """What is counted, by size."""
        by = {r.identity.model: r for r in sorted(records, key=lambda r: r.gflops)}
        shares = [f"{name} {labels.number(self.share(r))}" for name, r in by.items()]
        return [
            f"Counted are sampling and a share of training, spread over {self.pictures:,} "
            f"pictures, in GFLOPs a picture: {labels.listing(shares)}. That is 3 x the GFLOPs of a "
            f"call x steps x {self.batch_size} examples, of the longest training that was measured "
            "(of an earlier checkpoint less, by its steps); the autoencoder's, captions' and the "
            "sweep's own work are not in it."
        ]


# --- measured seconds ---------------------------------------------------------------------------


def devices_of(records: Iterable[Record]) -> list[str]:
    """The devices on which seconds of records were measured."""
    return sorted({r.device for r in records if r.seconds_per_image})


def with_seconds(curves: Curves) -> Curves:
    """The curves of those points whose seconds were measured."""
    timed = {key: [p for p in curve if p.seconds] for key, curve in curves.items()}
    return {key: curve for key, curve in timed.items() if curve}


def without_seconds(points: Iterable[Point]) -> str:
    """A sentence on the points whose seconds were not measured; empty where all were."""
    points = list(points)
    lacking = [p for p in points if not p.seconds]
    if not lacking:
        return ""
    of = labels.listing(list(dict.fromkeys(p.model for p in lacking)))
    return (f"{len(lacking):,} of {len(points):,} configurations, of {of}, have no measured "
            "seconds and take no part in what is said in seconds.")


def incomparable(records: Iterable[Record]) -> str:
    """Why seconds of the records do not compare, as a sentence: there are none, or of several
    devices; empty where they do."""
    devices = devices_of(records)
    if not devices:
        return "The records hold no measured seconds"
    if len(devices) < 2:
        return ""
    return f"The records' seconds were measured on {labels.listing(devices)} and do not compare"


def doubts(records: Sequence[Record]) -> list[str]:
    """What speaks against the seconds of one device's records, the first sentence in short: a
    network whose own are not of one measurement, and one that is slower than a larger one of its
    family."""
    records = [r for r in records if r.seconds_per_image]
    lines: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    cells: dict[tuple, list[Record]] = defaultdict(list)
    family = {r.identity.model: zoo.family_of(r.identity.model) for r in records}
    for r in records:
        i, guided = r.identity, _guided(r, r.identity.guidance)
        kind = (r.task, r.setting, r.student_steps, i.first, guided)
        lines[i.model, *kind].append((_evaluations(r, guided), r.seconds_per_image))
        if family[i.model]:
            cells[*kind, i.sampler, i.steps, family[i.model]].append(r)
    apart: dict[str, float] = {}
    for (model, *_), points in lines.items():
        apart[model] = max(apart.get(model, 1.0), _spread(np.array(points)))
    uneven = sorted(model for model, times in apart.items() if times > _APART)
    slower = {
        (a.seconds_per_image / b.seconds_per_image, b.gflops / a.gflops, a.identity.model,
         b.identity.model)
        for own in cells.values() for a in own for b in own
        if b.gflops > 1.1 * a.gflops and a.seconds_per_image > _SLOWER * b.seconds_per_image
    }
    why = []
    if uneven:
        why.append(
            f"those of {labels.listing(uneven)} are not of one measurement each, for a call they "
            f"differ by up to {max(apart.values()):.1f} times"
        )
    if slower:
        times, flops, small, large = max(slower)
        why.append(
            f"{small} is up to {times:.1f} times slower than {large}, which takes {flops:.1f} "
            "times its FLOPs"
        )
    if not why:
        return []
    return [
        ("In seconds that are measured anew sizes may change places" if len(family) > 1 else
         "Seconds that are measured anew may differ") + f": {why[0]}.",
        *(f"By its records {other}." for other in why[1:]),
        "ldm-scaling cost  measures sizes one after the other, for --device=KIND.",
    ]


def doubt(records: Sequence[Record]) -> str:
    """The first of `doubts`; empty where there are none."""
    return next(iter(doubts(records)), "")


def _spread(points_N2: np.ndarray) -> float:
    """How many times the seconds of one (calls, seconds) are another's, at least, for whatever
    share of a picture's seconds is not its calls': 1 where all are of one measurement."""
    calls_N, seconds_N = points_N2.T
    rest_Q1 = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 500)])[:, None]  # in calls
    row_QN = seconds_N / (calls_N + rest_Q1)
    return float((row_QN.max(axis=1) / row_QN.min(axis=1)).min())
