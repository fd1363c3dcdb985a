"""Cascades against single networks at equal sampling cost, and how a budget is best spent over two
stages. Pure functions on records and curves.

As with families, what enters a budget is the one cell that was best on the selection block, valued
on the report block: of single networks size, sampler, steps and guidance are chosen so, of cascades
both networks, both step counts and the first stage's guidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ldm_scaling.config.cascade import TASK
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import families, labels, repeated, winners
from ldm_scaling.study.curves import Cell, Curves, Point
from ldm_scaling.study.families import Family
from ldm_scaling.study.records import TEXT_TO_IMAGE, First, Record
from ldm_scaling.study.statistics import blocks, words
from ldm_scaling.study.winners import Winner

SINGLE, CASCADE = "one network", "cascade"


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """How a budget is best spent over two stages.

    Attributes:
      budget: the most that a picture may cost.
      point: the cascade's cell, chosen on the selection block.
      first: its first stage.
      share: of the cost that the first stage takes.
      low, high: shares of the cells that are best on the report block in 95% of the paired
        replicates; None without any.
    """

    budget: float
    point: Point
    first: First
    share: float
    low: float | None
    high: float | None


def firsts(records: Sequence[Record]) -> dict[Cell, First]:
    """The first stage of each cell of distinct records."""
    return {(r.identity.model, r.identity.sampler, r.identity.steps): r.first for r in records
            if r.first}


def cell(point: Point) -> Cell:
    """A point's."""
    return point.model, point.sampler, point.steps


def compared(
    single: Curves, cascades: Curves, metric: str
) -> tuple[list[Family], list[Winner]]:
    """Single networks and cascades as two families, see `families.of_pools`."""
    pools = {SINGLE: single, CASCADE: cascades}
    pools = {name: [p for c in some.values() for p in c] for name, some in pools.items()}
    return families.of_pools({name: pool for name, pool in pools.items() if pool}, metric)


def splits(cascades: Curves, records: Sequence[Record], metric: str) -> list[Split]:
    """The best split at every budget at which it changes, rising.

    Args:
      cascades: curves.
      records: the distinct records that they are made of.
      metric: the measure.
    """
    sign, found, out = labels.measure(metric).sign, firsts(records), []
    every = [p for curve in cascades.values() for p in curve]
    share = {cell(p): found[cell(p)].cost / p.cost for p in every}
    losses_MR = winners.paired(every, sign) if every else None
    costs_M = np.array([p.cost for p in every])
    shares_M = np.array([share[cell(p)] for p in every])
    for budget in winners.budgets(every, "cost"):
        point = winners.best_within(every, budget, "cost")
        if out and out[-1].point is point:
            continue
        low = high = None
        if losses_MR is not None:
            met_M = costs_M <= budget
            best_R = shares_M[met_M][np.argmin(losses_MR[met_M], axis=0)]
            low, high = np.percentile(best_R, (2.5, 97.5)).tolist()
        out.append(Split(budget, point, found[cell(point)], share[cell(point)], low, high))
    return out


def sentences(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int]
) -> list[str]:
    """Whether cascades or single networks are better at the smallest budget that both can afford
    and at the largest, and how the largest is spent. None without cascades.

    Args:
      records: of both, of one study.
      metric: what they are compared by.
      select_block, report_blocks: that choose, and are reported.
    """
    pooled = blocks.pooled(repeated.merged(records), select_block, report_blocks)

    def of(task: str) -> tuple[list[Record], Curves]:
        own = [r for r in pooled if r.task == task and metric in r.metrics]
        own = curves_lib.distinct(curves_lib.longest(own))
        both = select_block, report_blocks[0]
        return own, curves_lib.quality_curves(own, metric, None, *both)

    (_, single), (own, cascades) = of(TEXT_TO_IMAGE), of(TASK)
    found, won = compared(single, cascades, metric)
    met = [w for w in won if w.complete]
    if not met:
        return []
    at = {f.name: dict(f.frontier) for f in found}
    stages = firsts(own)

    def named(w: Winner) -> str:
        point = at[w.best.model][w.budget]
        if w.best.model == SINGLE:
            return f"{point.model} alone in {labels.steps(point.steps)}"
        first = stages[cell(point)]
        return (f"the cascade {point.model} in {first.steps} + {labels.steps(point.steps)} "
                f"({100 * first.cost / point.cost:.0f}% of the cost in the first stage)")

    def one(w: Winner) -> str:
        return (
            f"at a budget of {labels.number(w.budget)} {named(w)} is best, "
            f"{words.reached(metric, w.best)} ({words.sure(w.best.probability)})"
        )

    ends = [met[0]] if met[0].budget == met[-1].budget else [met[0], met[-1]]
    cells = {name: sum(map(len, c.values())) for name, c in ((SINGLE, single), (CASCADE, cascades))}
    return [
        f"Of single networks ({cells[SINGLE]} cells) and cascades ({cells[CASCADE]} cells), each "
        f"at its best networks and steps: {'; '.join(map(one, ends))}. What has more cells has "
        "more to choose from."
    ]
