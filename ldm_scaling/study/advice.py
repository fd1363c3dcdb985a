"""Advice: the size, sampler, steps and guidance for a budget, of what there is to choose from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ldm_scaling.errors import UserError
from ldm_scaling.study import budgets, labels, winners
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.arguments import MOST
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.curves import Point
from ldm_scaling.study.options import Options
from ldm_scaling.study.statistics import duels
from ldm_scaling.study.statistics.duels import Duel


@dataclasses.dataclass(frozen=True, eq=False)
class Advice:
    """What to take.

    Attributes:
      options: what it was chosen from.
      budget: the most that a picture may cost.
      best: chosen on the selection block among all that the budget allows, valued on the report
        block: nothing that is reported took part in the choice.
      runner_up: the best of another network (another size, or of another task or method), chosen
        alike; of the same one where no other can meet the budget; None where there is nothing else.
      duel: `best` against `runner_up` on common prompts and noise; None without replicates.
      front: what no cheaper configuration is as good as, up to the budget, rising in cost; chosen
        on the selection block.
      notes: the options', and more.
    """

    options: Options
    budget: Budget
    best: Point
    runner_up: Point | None
    duel: Duel | None
    front: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def other_is_better(self) -> float | None:
        """Probability that the runner-up is better; None where it is not known."""
        return None if self.duel is None else 1 - self.duel.probability


def advise(options: Options, budget: Budget) -> Advice:
    """The best within a budget.

    Raises:
      UserError: for a budget in another unit than the options', or below the cheapest of them.
    """
    if budget.unit != options.unit:
        raise UserError(f"a budget in {budget.unit} needs options in it, not in {options.unit}")
    # What costs just the budget is within it, whatever rounding says.
    limit = budget.value * (1 + 1e-9)
    best = winners.best_within(options.points, limit, "cost")
    if best is None:
        raise UserError(_too_little(options, budget))
    rest = [p for p in options.points if p is not best]
    others = [p for p in rest if _network(p) != _network(best)]
    runner_up = winners.best_within(others, limit, "cost")
    runner_up = runner_up or winners.best_within(rest, limit, "cost")
    duel = None
    if runner_up is not None and options.metric is not None and winners.paired(
        [best, runner_up], options.sign
    ) is not None:
        duel = duels.between(best, runner_up, options.metric, budget.value, "cost")
    notes = list(options.notes)
    if budget.value > max(p.cost for p in options.points):
        notes.append("The budget allows all that was measured: more steps or a larger size than "
                     "these may do better still.")
    if duel is not None:
        notes += _doubts(best, runner_up, duel, options)
    return Advice(options, budget, best, runner_up, duel, front(options.points, limit),
                  tuple(notes))


def _network(p: Point) -> tuple[str, options_lib.Kind]:
    return p.model, options_lib.kind(p.task, p.sampler)


def _doubts(best: Point, runner_up: Point, duel: Duel, options: Options) -> list[str]:
    """What the reporting prompts say against the choice, and whether noise alone could have made
    it."""
    out, other = [], 1 - duel.probability
    if other > 0.5:
        shown = labels.probability(other)
        said = (
            f"is better (probability {shown}), against the choice" if other > 0.95 else
            f"is probably better ({shown}), against the choice" if other > 0.75 else
            f"looks better ({shown}): the two are hard to tell apart"
        )
        out.append(f"On the reporting prompts the runner-up {said}.")
    # The spread is of the reporting blocks' mean: the choosing one has no replicates, is alone, and
    # after a race of fewer pictures.
    times = max(p.num_images / (p.choosing_images or p.num_images) for p in (best, runner_up))
    # Luck, by far the larger part where it is told, is the same on all blocks.
    blocks = 1 if options.lucky else options.blocks
    spread = (duel.high - duel.low) / 2 * math.sqrt(blocks * times)
    more = "runs" if options.lucky else "blocks"
    key = "repeats" if options.lucky else "sweep.more_blocks"
    gap = runner_up.chosen_by - best.chosen_by
    if gap < spread and other > 0.05:
        out.append(
            f"The choice is within noise: on the choosing prompts the first leads by "
            f"{labels.number(gap)}, and chance alone moves such a lead by "
            f"{labels.number(spread)}. More {more} tell the two apart better: "
            f"--config.{key}, docs/statistics.md."
        )
    return out


def _too_little(options: Options, budget: Budget) -> str:
    least = min(options.points, key=lambda p: (p.cost, p.chosen_by))
    steps = options.steps_alone
    only = f" (Table 1 has {steps} steps alone: what fewer would do, it does not say)" if steps \
        else ""
    untimed = f". {options.untimed}" if options.untimed else ""
    trained = f", trained {labels.steps(least.train_step)}" if options.pictures else ""
    what = _training(options, budget, least) if options.pictures else f"{only}; {budgets.WHAT}"
    return (
        f"a budget of {budgets.amount(budget.value, budget.unit, 9)} is below the cheapest of what "
        f"there is, {labels.network(least.model, least.task)} with {labels.sampler(least.sampler)} "
        f"and {least.steps} step{'s' * (least.steps > 1)}{trained}: "
        f"{budgets.amount(budgets.enough(least.cost), options.unit, 5)}{what}{untimed}"
    )


def _training(options: Options, budget: Budget, least: Point) -> str:
    """How much of what costs too much is training, and over how many pictures it would not."""
    n = options.pictures
    enough = [
        math.ceil(p.taught * n / left) for p in options.points
        if (left := budget.value - (p.cost - p.taught)) > 0 and p.taught * n / left < MOST
    ]
    drawn = min(p.cost - p.taught for p in options.points)
    return (
        f", of which {budgets.amount(least.taught, options.unit, 5)} are its training, spread over "
        f"{labels.counted(n, 'picture')}; " + (
            f"it suffices for --pictures={int(budgets.enough(min(enough), 3))} and more" if enough
            else "no number of pictures is enough, for drawing alone takes "
            f"{budgets.amount(budgets.enough(drawn), options.unit, 5)}")
    )


def front(points: Sequence[Point], budget: float = float("inf")) -> tuple[Point, ...]:
    """The points within a budget that are better, on the selection block, than all that cost no
    more; of equal ones the first by sampler and size."""
    out: list[Point] = []
    affordable = [p for p in points if p.cost <= budget]
    for p in sorted(affordable, key=lambda p: (p.cost, p.chosen_by, p.sampler, p.model)):
        if not out or p.chosen_by < out[-1].chosen_by:
            out.append(p)
    return tuple(out)
