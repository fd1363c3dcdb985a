"""What the cells of records cost in the unit of a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from ldm_scaling.errors import UserError
from ldm_scaling.study import costing, labels
from ldm_scaling.study.costing import Counted, Price, Unit
from ldm_scaling.study.curves import Point
from ldm_scaling.study.records import Record

# What a budget counts, by its unit: the paper's cost as the paper has it; FLOPs and seconds as they
# are spent.
COUNTED: dict[Unit, Counted] = {
    "cost": costing.THE_PAPERS, "gflops": Counted(doubled=True), "seconds": costing.ALL,
}


def priced_here(
    points: Sequence[Point], prices: Mapping[str, Price] | None, batch: int
) -> tuple[list[Point], list[str]]:
    """The points whose size was measured at this batch size, and a note of the others."""
    if prices is None:
        return list(points), []
    device = next((p.device for p in prices.values()), "the device")
    lacking = sorted({p.model for p in points if not timed(prices.get(p.model), batch)})
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
        devices = sorted({r.device for r in records})
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
    records: Sequence[Record], unit: Unit, prices: Mapping[str, Price] | None, counted: Counted
) -> Callable[[Point], float]:
    """What a point of one task's records costs."""
    cells = {(r.identity.model, r.identity.sampler, r.identity.steps): r for r in records}
    if unit == "seconds" and prices is None:
        return lambda p: p.seconds
    if prices is not None:
        _check_networks(cells.values(), prices)
    else:
        prices = {
            r.identity.model: Price(r.identity.model, r.gflops, r.norm_cost) for r in cells.values()
        }

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

    return price


def _check_networks(records: Iterable[Record], prices: Mapping[str, Price]) -> None:
    """Raises `UserError` where a name means different networks."""
    for r in records:
        price = prices.get(r.identity.model)
        if price is not None and abs(r.gflops / price.gflops - 1) > 0.01:
            raise UserError(
                f"{r.identity.model} takes {r.gflops:.4g} GFLOPs a call in the records and "
                f"{price.gflops:.4g} in the measured seconds: they are of different networks"
            )
