"""Winners: which size is best at each sampling budget, and how sure that is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import labels
from ldm_scaling.study.curves import Curves, Point


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """The best that one size can do within a budget.

    Attributes:
      point: its cell, chosen on the selection block, valued on the report block.
      probability: share of the paired replicates in which this size is the best of the
        contenders (ties shared); None without replicates.
    """

    point: Point
    probability: float | None

    @property
    def model(self) -> str:
        """The size's name."""
        return self.point.model


@dataclasses.dataclass(frozen=True, eq=False)
class Winner:
    """The outcome at one budget.

    Attributes:
      budget: the most that an image may cost, in units of the axis.
      contenders: one per size that can afford anything, smallest size first.
      best: the contender with the best value on the report block.
      runner_up: the next best, or None.
      advantage: how much better the best is than the runner-up (>= 0, in the measure's units).
      advantage_interval: its 95% interval from paired replicates, or None.
      complete: whether every size can afford at least one measured cell.
    """

    budget: float
    contenders: tuple[Contender, ...]
    best: Contender
    runner_up: Contender | None
    advantage: float | None
    advantage_interval: tuple[float, float] | None
    complete: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Crossover:
    """Whether smaller sizes win small budgets and larger sizes win large ones (claim 3).

    Attributes:
      low: the outcome at the smallest budget that every size can afford. Below it the largest
        sizes lose because they cannot take part, which says nothing.
      high: the outcome at the largest budget measured.
      small_wins: share of replicates in which a size other than the largest wins at `low`.
      small_alone: one less the chance that the best single one of the smaller sizes beats the
        largest there by luck, for as many sizes as try (Bonferroni); 0 or more. Of equal sizes some
        smaller one nearly always wins, and `small_wins` alone would show nothing.
      large_alone: the same of the sizes larger than the best one at `low`, of which a single one
        beats that one at `high`; 0 where none is larger.
      probability: share in which the winner at `high` is larger than the winner at `low` (so the
        largest does not win at `low`); None without replicates.
    """

    low: Winner
    high: Winner
    small_wins: float | None
    small_alone: float | None
    large_alone: float | None
    probability: float | None

    @property
    def alone(self) -> float | None:
        """The smaller of `small_alone` and `large_alone`: `probability` is near 1 also where all
        sizes are equal at one of the budgets."""
        if self.small_alone is None or self.large_alone is None:
            return None
        return min(self.small_alone, self.large_alone)


def _shares(losses_MR: np.ndarray) -> np.ndarray:
    """In each replicate, 1 for the size with the smallest loss (split between ties): (M, R)."""
    best_MR = losses_MR == losses_MR.min(axis=0)
    return best_MR / best_MR.sum(axis=0)


def paired(points: Sequence[Point], sign: int) -> np.ndarray | None:
    """Losses (M, R) of points whose replicates resample the same prompts; None without 2."""
    sizes = {(p.replicates_R.size, p.num_images) for p in points}
    if any(n < 2 for n, _ in sizes):
        return None
    if len(sizes) > 1:
        raise UserError(
            "replicates cannot be paired: points of one comparison have (replicates, images) "
            f"{sorted(sizes)}; measure all sizes with the same number of images and replicates"
        )
    return sign * np.stack([p.replicates_R for p in points])


def _outcome(
    points: Sequence[Point], sign: int, budget: float, complete: bool
) -> tuple[Winner, np.ndarray | None]:
    losses_MR = paired(points, sign)
    shares_MR = None if losses_MR is None else _shares(losses_MR)
    contenders = tuple(
        Contender(p, None if shares_MR is None else float(shares_MR[m].mean()))
        for m, p in enumerate(points)
    )
    order = sorted(range(len(points)), key=lambda m: sign * points[m].value)
    best, advantage, ends = order[0], None, None
    if len(order) > 1:
        advantage = sign * (points[order[1]].value - points[best].value)
        if losses_MR is not None:
            ends = bootstrap.interval(
                losses_MR[order[1]] - losses_MR[best], points[best].freedom)
    runner_up = contenders[order[1]] if len(order) > 1 else None
    return Winner(budget, contenders, contenders[best], runner_up, advantage, ends,
                  complete), shares_MR


def budgets(points: Sequence[Point], axis: str) -> list[float]:
    """Every distinct place on the axis, rising; equal up to rounding counts once."""
    out: list[float] = []
    for x in sorted(p.at(axis) for p in points):
        if not out or x > out[-1] * (1 + 1e-9):
            out.append(x)
        else:
            out[-1] = x
    return out


def best_within(points: Iterable[Point], budget: float, axis: str) -> Point | None:
    """Of the points that cost no more than `budget`, the best *on the selection block*; None where
    all cost more. Ties go to the cheaper one."""
    affordable = [p for p in points if p.at(axis) <= budget]
    return min(affordable, key=lambda p: (p.chosen_by, p.at(axis), p.sampler), default=None)


def _walk(
    curves: Curves,
    metric: str,
    sizes: Sequence[str],
    axis: str,
    samplers: Collection[str] | None,
) -> Iterator[tuple[Winner, np.ndarray | None]]:
    """The outcome at every budget, rising, with each replicate's shares (M, R)."""
    sign = labels.measure(metric).sign
    pool = [p for (_, s), curve in curves.items() if samplers is None or s in samplers
            for p in curve]
    present = [m for m in sizes if any(p.model == m for p in pool)]
    for budget in budgets(pool, axis):
        chosen = []
        for model in present:
            best = best_within([p for p in pool if p.model == model], budget, axis)
            if best is not None:
                chosen.append(best)
        yield _outcome(chosen, sign, budget, len(chosen) == len(present))


def winner_by_budget(
    curves: Curves,
    metric: str,
    sizes: Sequence[str],
    axis: str = "cost",
    samplers: Collection[str] | None = None,
) -> list[Winner]:
    """The best size at every distinct budget.

    Within a budget each size enters with the one cell (steps, and sampler where several are
    allowed) that was best *on the selection block*; it is then valued, and compared with the
    other sizes, on the report block. So nothing is chosen among a size's cells by the numbers
    that are reported.

    Args:
      curves: from `quality_curves`.
      metric: the measure of the curves.
      sizes: the sizes in order, smallest first.
      axis: "cost" or "seconds": what the budget limits.
      samplers: the samplers allowed; None for all.

    Returns:
      One `Winner` per budget, rising. Probabilities are bootstrap shares: of two equally good
      sizes one gets 0.95 or more in about one study of ten.
    """
    return [winner for winner, _ in _walk(curves, metric, sizes, axis, samplers)]


def stretches(winners: Sequence[Winner]) -> list[list[Winner]]:
    """Neighbouring budgets with the same winning size, put together."""
    return [list(some) for _, some in itertools.groupby(winners, lambda w: w.best.model)]


def _alone(tries: Sequence[np.ndarray], other_R: np.ndarray) -> float:
    """One less the chance that the best of several losses (R,) is below another by luck, see
    `Crossover`."""
    beats = max((float((loss_R < other_R).mean()) for loss_R in tries), default=0.0)
    return max(0.0, 1.0 - len(tries) * (1.0 - beats)) if tries else 0.0


def crossovers(
    curves: Curves,
    metric: str,
    sizes: Sequence[str],
    samplers: Sequence[str],
    axis: str = "cost",
) -> tuple[dict[str, Crossover], float | None]:
    """`Crossover` of every sampler that can show one, and the share in which all of them hold.

    A sampler can show one when at least two sizes meet at two or more budgets that all its sizes
    can afford. The second value is the share of replicates in which the pattern holds for every
    one of these samplers at once (replicates are paired across samplers too); None without
    replicates.
    """
    out: dict[str, Crossover] = {}
    holds: list[np.ndarray | None] = []
    for sampler in samplers:
        met = [(w, s) for w, s in _walk(curves, metric, sizes, axis, {sampler}) if w.complete]
        if len(met) < 2 or len(met[0][0].contenders) < 2:
            continue
        (low, low_MR), (high, high_MR) = met[0], met[-1]
        if low_MR is None or high_MR is None:
            out[sampler] = Crossover(low, high, None, None, None, None)
            holds.append(None)
            continue
        smaller_MR = np.cumsum(low_MR, axis=0) - low_MR
        holds_R = (high_MR * smaller_MR).sum(axis=0)
        sign, won = labels.measure(metric).sign, low.contenders.index(low.best)
        *small_R, largest_R = paired([c.point for c in low.contenders], sign)
        first_R, *larger_R = paired([c.point for c in high.contenders[won:]], sign)
        out[sampler] = Crossover(
            low, high, float(1 - low_MR[-1].mean()), _alone(small_R, largest_R),
            _alone(larger_R, first_R), float(holds_R.mean()),
        )
        holds.append(holds_R)
    alike = holds and all(h is not None and h.shape == holds[0].shape for h in holds)
    return out, float(np.prod(np.stack(holds), axis=0).mean()) if alike else None
