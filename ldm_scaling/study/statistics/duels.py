"""Duels: two sizes at one budget, on the same prompts and noise. "83M beats 866M at cost 3"."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, compare
from ldm_scaling.study import labels, winners
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.statistics import bands, multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Duel:
    """Size a against size b, each at the best that it can do within the budget.

    Attributes:
      a, b: their cells, chosen on the selection block, valued on the report block.
      budget: the most that an image may cost, in units of `axis`.
      axis: "cost" or "seconds".
      advantage: how much better a is, in the measure's units; negative where it is worse.
      low, high: its 95% interval from paired replicates.
      probability: that a is better: the share of paired replicates (ties count half).
      p_value: two-sided, for "no difference", see `compare.p_of`.
      holm, bh: the p-value adjusted for the whole family it was judged in, see `multiple`.
    """

    a: Point
    b: Point
    budget: float
    axis: str
    advantage: float
    low: float
    high: float
    probability: float
    p_value: float
    holm: float
    bh: float


def duel(
    curves: Curves, metric: str, a: str, b: str, budget: float, axis: str = "cost",
    samplers: Collection[str] | None = None,
) -> Duel:
    """Size `a` against size `b` within a budget.

    Args:
      curves: from `curves.quality_curves`, with replicates.
      metric: the measure of the curves.
      a, b: names of the sizes.
      budget: the most that an image may cost.
      axis: "cost" or "seconds".
      samplers: the samplers allowed; None for all.

    Raises:
      UserError: when a size cannot afford any measured cell, or there are no paired replicates.
    """
    points = []
    for model in (a, b):
        pool = _pool(curves, model, samplers)
        point = winners.best_within(pool, budget, axis)
        if point is None:
            least = min((p.at(axis) for p in pool), default=None)
            hint = "it has no reported record" if least is None else f"its least is {least:.4g}"
            raise UserError(f"{model} cannot meet a budget of {budget:g} ({axis}): {hint}")
        points.append(point)
    return between(*points, metric, budget, axis)


def _pool(curves: Curves, model: str, samplers: Collection[str] | None) -> list[Point]:
    return [p for (m, s), curve in curves.items()
            if m == model and (samplers is None or s in samplers) for p in curve]


def between(a: Point, b: Point, metric: str, budget: float, axis: str) -> Duel:
    """Two given cells, of whatever sizes; `duel` has the arguments.

    Raises:
      UserError: when there are no paired replicates.
    """
    sign = labels.measure(metric).sign
    losses_2R = winners.paired([a, b], sign)
    if losses_2R is None:
        raise UserError(
            f"{a.model} and {b.model} have no paired replicates on the report block: run the sweep "
            "with sweep.replicates of 200 or more"
        )
    advantage_R = losses_2R[1] - losses_2R[0]
    advantage = sign * (b.value - a.value)
    low, high = bootstrap.interval(advantage_R, a.freedom)
    share = float((advantage_R > 0).mean() + 0.5 * (advantage_R == 0).mean())
    p_value = compare.p_of(advantage, advantage_R, a.freedom)
    return Duel(a, b, budget, axis, advantage, low, high, share, p_value, p_value, p_value)


def family(duels: Iterable[Duel]) -> list[Duel]:
    """The same duels with p-values adjusted for there being all of them."""
    duels = list(duels)
    p_values = [d.p_value for d in duels]
    adjusted = zip(duels, multiple.holm(p_values), multiple.benjamini_hochberg(p_values))
    return [dataclasses.replace(d, holm=float(h), bh=float(q)) for d, h, q in adjusted]


def all_pairs(
    curves: Curves, metric: str, sizes: Sequence[str], budgets: Sequence[float],
    axis: str = "cost", samplers: Collection[str] | None = None,
) -> list[Duel]:
    """Every two sizes at every budget that both can meet, as one family.

    Two budgets at which both sizes take the same cells are one comparison, named by the smaller.
    """
    out, seen = [], set()
    for budget in sorted(budgets):
        for a, b in itertools.combinations(sizes, 2):
            points = [winners.best_within(_pool(curves, model, samplers), budget, axis)
                      for model in (a, b)]
            if None in points or (cells := tuple(map(id, points))) in seen:
                continue
            seen.add(cells)
            out.append(between(*points, metric, budget, axis))
    return family(out)


def difference_band(
    curves: Curves, metric: str, a: str, b: str, axis: str = "cost",
    samplers: Collection[str] | None = None, level: float = 0.95,
) -> tuple[np.ndarray, bands.Band] | None:
    """Advantage of `a` over `b` along all budgets that both meet: (budgets_P, band).

    Where the simultaneous band lies above 0 (below it), a (b) is better at all of those budgets
    at once. None where they share no budget or have no replicates.
    """
    sign = labels.measure(metric).sign
    pools = [_pool(curves, model, samplers) for model in (a, b)]
    budgets, values, replicates = [], [], []
    for budget in winners.budgets([p for pool in pools for p in pool], axis):
        points = [winners.best_within(pool, budget, axis) for pool in pools]
        if None in points:
            continue
        losses_2R = winners.paired(points, sign)
        if losses_2R is None:
            return None
        budgets.append(budget)
        values.append(sign * (points[1].value - points[0].value))
        replicates.append(losses_2R[1] - losses_2R[0])
        freedom = points[0].freedom
    if not budgets:
        return None
    return np.array(budgets), bands.band(
        np.array(values), np.stack(replicates), level, freedom)


def sentence(one: Duel, metric: str) -> str:
    """The duel in words: who beats whom, where, by how much, and how probably."""
    first, second, probability = one.a, one.b, one.probability
    advantage, low, high = one.advantage, one.low, one.high
    if advantage < 0:
        first, second, probability = second, first, 1 - probability
        advantage, low, high = -advantage, -high, -low
    unit = "cost" if one.axis == "cost" else "seconds per image"
    return (
        f"At a budget of {labels.number(one.budget)} ({unit}) {first.model} "
        f"({labels.steps(first.steps)}) beats {second.model} ({labels.steps(second.steps)}) "
        f"with probability {labels.probability(probability)}: by {labels.number(advantage)} "
        f"{labels.interval(low, high)} in {labels.measure(metric).short}."
    )
