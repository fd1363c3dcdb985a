"""The paper's Table 1 as something to choose from: one sampler, one number of steps, one rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, zoo
from ldm_scaling.study import costing, labels, pricing
from ldm_scaling.study.costing import Price, Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.options import Options
from ldm_scaling.study.pricing import Reference

STEPS, RATE, IMAGES = 50, 7.5, 30_000
_NONE_R = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class _Measure:
    """A column: its name for readers, 1 where less of it is better and -1 where more is, its
    decimals, and how near neighbouring sizes lie."""

    short: str
    sign: int
    places: int
    near: str


_MEASURES = {
    "fid": _Measure("FID", 1, 2, "Half of the neighbouring sizes differ by less than 2% in FID"),
    "clip": _Measure(
        "CLIP score", -1, 3,
        "All neighbouring sizes differ by less than 1% in CLIP score, and from 430m to 2b it is "
        "the same to its last digit"),
}


def options(
    unit: Unit, metric: str | None = None, *, prices: Mapping[str, Price] | None = None,
    batch: int = 1,
) -> Options:
    """The eleven sizes, each at 50 DDIM steps and guidance 7.5.

    Costs are as printed; FLOPs are XLA's count of the same networks, as the table's own hold a
    misprint.

    Args:
      unit: of the budget.
      metric: "fid" (also if None) or "clip".
      prices, batch: as `options.of_records`'; sizes without measured seconds take no part.

    Raises:
      UserError: for another metric, or seconds that were measured of none of these sizes.
    """
    metric = metric or "fid"
    if metric not in _MEASURES:
        raise UserError(f"metric {metric!r} is not in Table 1; there are {', '.join(_MEASURES)}")
    measure = _MEASURES[metric]
    members = [m for m in zoo.PAPER if prices is None or pricing.timed(prices.get(m.name), batch)]
    if unit == "seconds" and prices is None:
        raise UserError("Table 1 has no seconds: give --device=KIND, with seconds that  "
                        "ldm-scaling cost  measured, or a budget in cost or flops")
    if not members:
        raise UserError(
            f"no measured seconds of the paper's sizes at batch size {batch} there: run  "
            f"ldm-scaling cost --member={','.join(m.name for m in zoo.PAPER)} --batch={batch}  on "
            "that device"
        )
    counted = dataclasses.replace(pricing.COUNTED[unit], batch=batch) if prices is None else \
        pricing.counted_on(prices, [m.name for m in members], unit, batch)
    calls = costing.calls("ddim", STEPS)
    device = next(iter(prices.values())).device if prices else ""

    def point(m: zoo.Member) -> Point:
        price = prices[m.name] if prices else Price(
            m.name, cost.gflops(m.spec) if unit == "gflops" else 1.0, m.published.norm_cost
        )
        value = getattr(m.published, metric)
        spent = costing.sampling(price, calls, True, unit, counted)
        return Point(
            m.name, "ddim", STEPS, RATE, spent, float("nan"), value, None, None,
            measure.sign * value, _NONE_R, IMAGES,
        )

    reference, untimed = None, ""
    notes = [
        "From the paper's Table 1 (arXiv 2404.01367) alone, which supports little: one sampler "
        f"(DDIM), one step count ({STEPS}), one guidance rate ({RATE}).",
        "It says which size to take where that many steps are affordable, and nothing of whether a "
        "larger size with fewer steps, or a smaller one with other settings, would do better.",
        f"It has no error bars: each size was trained once. {measure.near}; whether one is truly "
        "better is not known.",
        "Records of your own say more: ldm-scaling sweep, then --records=DIR.",
    ]
    if unit == "cost":
        name = zoo.PAPER_REFERENCE
        reference = Reference(name, cost.gflops(zoo.get(name).spec))
        notes.append(
            f"{reference.note} Costs are as printed, with two decimals, and FLOPs as counted "
            "(318m: 0.40 and 0.404): near what a size costs the two may name neighbours."
        )
    if lacking := [m.name for m in zoo.PAPER if m not in members]:
        without = labels.listing(lacking)
        untimed = f"Without measured seconds, so not taken into account: {without}."
        notes.insert(0, untimed)
    return Options(
        tuple(map(point, members)), unit, costing.label(unit, counted, device), measure.short,
        measure.sign, None, tuple(notes), reference, untimed, STEPS, measure.places,
        doubt=untimed,
    )
