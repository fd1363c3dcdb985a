"""The paper's six claims, each with its test, effect, interval and verdict on the records at hand.

Each is a question of its own, asked before the records were there, so that their probabilities
are not corrected for there being six.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, winners
from ldm_scaling.study.records import DISTILLED, RESTORING, TEXT_TO_IMAGE, Record
from ldm_scaling.study.statistics import trends, words
from ldm_scaling.study.statistics.trends import Tuned

CLAIMS = (
    "Quality scales with training compute.",
    "Downstream quality follows pretraining quality, more than fine-tuning length.",
    "At a small sampling budget smaller models win; at a large one larger models do.",
    "That holds for DDIM, DDPM and DPM-Solver++ alike.",
    "It holds on super-resolution, up to about 20 steps.",
    "It holds after distillation.",
)

# The samplers that claim 4 is about, and those of distilled networks.
_FAMILIES = {
    "DDIM": ("ddim",),
    "DDPM": ("ddpm", "ddpm_large"),
    "DPM-Solver++": ("dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde",
                     "dpmpp_3m_sde"),
}
_DISTILLED = ("lcm", "codi")
_FEW_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim of the paper, judged.

    Attributes:
      number: the claim's number in the paper's list.
      claim: the claim in a sentence.
      test: how it is judged, in a sentence.
      outcome: the judgement; undecided also where nothing was measured.
      headline: what happened, in one sentence.
      because: sentences with the numbers behind it; may be empty.
      effect: the size of what was found, in words; empty where nothing was measured.
      interval: 95% of the effect, or None.
      probability: that the claim holds; None where nothing was measured.
    """

    number: int
    claim: str
    test: str
    outcome: words.Outcome
    headline: str
    because: str = ""
    effect: str = ""
    interval: tuple[float, float] | None = None
    probability: float | None = None

    @property
    def tested(self) -> bool:
        """Whether there was anything to judge it by."""
        return bool(self.effect)

    @property
    def ends(self) -> str:
        """The interval in brackets, or nothing."""
        return "" if self.interval is None else labels.interval(*self.interval)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What there is to judge by.

    Attributes:
      records: of text-to-image members, at any training steps.
      distilled: of distilled members.
      super_resolution: of members fine-tuned to super-resolution, at any steps of it.
      fine_tuned: what members reached downstream, after fine-tuning of several lengths; by default
        that of super-resolution.
    """

    records: Sequence[Record]
    distilled: Sequence[Record] = ()
    super_resolution: Sequence[Record] = ()
    fine_tuned: Sequence[Tuned] | None = None

    @classmethod
    def of(cls, records: Sequence[Record], **more) -> Evidence:
        """Sorts records by their task; those of distilled members also by their samplers, LCM's and
        CoDi's."""
        main = [r for r in records if r.task == TEXT_TO_IMAGE]
        distilled = [r for r in records if r.task in DISTILLED]
        distilled += [r for r in main if _solver(r.identity.sampler) in _DISTILLED]
        rest = [r for r in main if _solver(r.identity.sampler) not in _DISTILLED]
        found = {"super_resolution": [r for r in records if r.task == RESTORING[0]]}
        return cls(rest, distilled=distilled, **(found | more))


def _solver(sampler: str) -> str:
    """Its name without options, a spacing or a first stage."""
    return sampler.partition(", ")[0].partition(":")[0]


def verdicts(
    evidence: Evidence, metric: str, select_block: int = 0, report_block: int = 1
) -> list[Verdict]:
    """All six, in order.

    Raises:
      UserError: on a measure that is not known, or two records of one configuration.
    """
    blocks = (select_block, report_block)
    last = curves_lib.longest(evidence.records)
    third, fourth = _crossing(curves_lib.distinct(last), metric, blocks)
    fine_tuned = evidence.fine_tuned
    if fine_tuned is None:
        fine_tuned = trends.fine_tuned(last, evidence.super_resolution, metric, blocks)
    return [
        _compute(evidence.records, metric, blocks), _downstream(fine_tuned), third, fourth,
        _super_resolution(evidence.super_resolution, metric, blocks),
        _distilled(evidence.distilled, metric, blocks),
    ]


def _blank(number: int, test: str, headline: str) -> Verdict:
    return Verdict(number, CLAIMS[number - 1], test, "undecided", headline)


def _compute(records: Sequence[Record], metric: str, blocks: tuple[int, int]) -> Verdict:
    test = (
        "The slope of the measure over the log of training compute (GFLOPs of a network call x "
        "training steps), at the paper's 50 sampling steps, or else the most that all have; its "
        "error holds the scatter about the line, by as many runs as there are sizes, and the "
        "choice of prompts."
    )
    found = trends.training(records, metric, *blocks)
    if found is None:
        return _blank(
            1, test, "No records of three or more sizes and training computes, sampled alike."
        )
    said, effect, ends = _change(found, labels.measure(metric).short)
    varied = " and ".join(w for w, n in (("size", found.sizes), ("training length", found.lengths))
                          if n > 1)
    return Verdict(
        1, CLAIMS[0], test, words.judge(found.probability),
        f"Ten times the training compute {said}: {words.sure(found.probability)} that quality "
        "rises with compute.",
        f"{found.points} networks that differ in {varied}, with {labels.sampler(found.sampler)} "
        f"and {labels.steps(found.steps)}; compute spans a factor of {labels.number(found.span)}."
        + ("" if found.lengths > 1 else " All were trained equally long, so that compute and size "
           "cannot be told apart.")
        + (f" Judged without {labels.counted(found.without, 'network')} of these records, not "
           "measured like that." if found.without else ""),
        f"{effect} for ten times the training compute", ends, found.probability,
    )


def _change(found: trends.Trend, short: str) -> tuple[str, str, tuple[float, float]]:
    """What compute does, the effect and its interval: in percent, as a factor where it may double
    the measure, or in the measure's own unit."""
    change, low, high = found.change, found.low, found.high
    if found.relative and high >= 1:
        factor = labels.number(1 + change)
        return f"makes {short} {factor} times what it was", f"{factor} times the {short}", (
            1 + low, 1 + high)
    scale, unit = (100, "%") if found.relative else (1, "")
    by = f"{'+' if change > 0 else ''}{labels.number(scale * change)}{unit}"
    return f"changes {short} by {by}", f"{by} {short}", (scale * low, scale * high)


def _all(number: int) -> str:
    return "both" if number == 2 else f"all {number}"


def _downstream(rows: Sequence[Tuned]) -> Verdict:
    test = (
        "Shares of the variance of downstream quality that pretraining quality (a straight line) "
        "and fine-tuning length (any shape) explain, told from what is left without each size in "
        "turn."
    )
    found = trends.downstream(rows)
    if found is None:
        return _blank(2, test, "No records of fine-tuned members (at least 4 sizes, "
                      "each at 2 or more lengths of fine-tuning).")
    lacking = found.sizes * found.lengths - len(rows)
    more = round(100 * (found.pretraining - found.length))
    return Verdict(
        2, CLAIMS[1], test, words.judge(found.probability),
        f"Pretraining quality explains {100 * found.pretraining:.0f}% of downstream variance, "
        f"fine-tuning length {100 * found.length:.0f}%: {words.sure(found.probability)} that "
        "pretraining explains more.",
        f"{found.sizes} sizes, {found.lengths} lengths of fine-tuning"
        + (f", {labels.counted(lacking, 'cell')} of which not measured." if lacking else "."),
        f"{more:+.0f} percentage point{'s' * (abs(more) != 1)} of variance, pretraining less "
        "length",
        (100 * found.low, 100 * found.high), found.probability,
    )


def _crossing(
    arms: Sequence[Record], metric: str, blocks: tuple[int, int]
) -> tuple[Verdict, Verdict]:
    """Claims 3 and 4, judged from paired replicates.

    Claim 3 holds in a replicate when, between the smallest budget that every size can afford and
    the largest one measured, the winner becomes larger. Claim 4 asks the same of every sampler,
    in the same replicates, and needs every size with each. They are supported by single sizes,
    see `winners.Crossover.alone`.
    """
    curves = curves_lib.quality_curves(arms, metric, None, *blocks)
    sizes = curves_lib.models(arms)
    tests = (
        "The share of paired replicates in which the size that wins the largest budget measured "
        "is larger than the one that wins the smallest budget that every size can afford. To "
        "support the claim, one smaller size alone must beat the largest at that smallest budget, "
        "and one larger size alone its winner at the largest, each surely enough for as many as "
        "try.",
        "The share of paired replicates in which that is so for every sampler at once; to support "
        "the claim, each of them must support claim 3; to contradict it, one of them must too.",
    )
    names = sorted({s for _, s in curves}, key=lambda s: (s.partition(", ")[0] != "ddim", s))
    found, together = winners.crossovers(curves, metric, sizes, names)
    unmet = "Not measured yet: no sampler has two sizes that meet at two budgets."
    first = _blank(3, tests[0], unmet)
    if found:
        sampler, cross = next(iter(found.items()))
        outcome, sure = _crosses(cross)
        first = dataclasses.replace(
            first, outcome=outcome, headline=f"{_where(sampler, cross)}: {words.sure(sure)} that "
            "a larger size wins the larger budget.",
            because=_cross(metric, cross) + _without(arms, metric, blocks, {sampler}),
            probability=sure, **_lead(metric, cross),
        )
    lacking = [labels.sampler(s) for s in names
               if s not in found or any((m, s) not in curves for m in sizes)]
    lacking += [family for family, members in _FAMILIES.items()
                if not any(_solver(s) in members for s in names)]
    if lacking:
        unmet = f"Not measured fully yet: {labels.listing(lacking)}."
        return first, _blank(4, tests[1], unmet)
    judged = {s: _crosses(c) for s, c in found.items()}
    parts = [
        f"{labels.sampler(s)} {outcome} ({found[s].low.best.model} at the smallest, "
        f"{found[s].high.best.model} at the largest budget; {words.sure(sure)})"
        for s, (outcome, sure) in judged.items()
    ]
    held = sum(outcome == "supported" for outcome, _ in judged.values())
    alone = None if together is None else min(c.alone for c in found.values())
    # Of several that may be so not all are at once: that contradicts none of them.
    against = any(outcome == "contradicted" for outcome, _ in judged.values())
    outcome, sure = words.judge_alone(together if against else None, alone)
    headline = (
        f"The pattern is clear for {held} of {len(found)} samplers; for all of them at once: "
        f"{words.sure(sure)}."
    )
    return first, Verdict(
        4, CLAIMS[3], tests[1], outcome, headline,
        f"{'; '.join(parts)}.{_without(arms, metric, blocks, found)}",
        f"{held} of {len(found)} samplers", None, sure,
    )


def _without(
    arms: Sequence[Record], metric: str, blocks: tuple[int, int], samplers: Collection[str]
) -> str:
    """A sentence on the cells of these samplers' grid that there are not; may be empty."""
    gaps = [g for g in curves_lib.gaps(arms, metric, *blocks)
            if not g.reported and g.cell[1] in samplers]
    return "" if not gaps else (
        f" Judged without {labels.counted(len(gaps), 'cell')} of the grid of sizes and steps, not "
        "reported yet."
    )


def _lead(metric: str, cross: winners.Crossover) -> dict:
    """Effect and interval: the lead of the winner at the smallest budget over the largest size."""
    won, largest = cross.low, cross.low.contenders[-1]
    sign = labels.measure(metric).sign
    lead = sign * (largest.point.value - won.best.point.value)
    if won.best is largest:
        return {"effect": f"none: {largest.model} wins the smallest budget too"}
    losses_2R = winners.paired([won.best.point, largest.point], sign)
    ends = None if losses_2R is None else bootstrap.interval(
        losses_2R[1] - losses_2R[0], largest.point.freedom)
    return {
        "effect": f"{won.best.model} leads {largest.model} by {labels.number(lead)} "
                  f"{labels.measure(metric).short} at the smallest budget",
        "interval": ends,
    }


def _super_resolution(
    records: Sequence[Record], metric: str, blocks: tuple[int, int]
) -> Verdict:
    test = (
        f"On records of at most {_FEW_STEPS} steps: the share of paired replicates in which a size "
        "below the largest wins the smallest budget that every size can afford. To support the "
        "claim, one of them alone must beat the largest there, surely enough for as many as try."
    )
    few = [r for r in curves_lib.longest(records)
           if r.identity.steps <= _FEW_STEPS and metric in r.metrics]
    if not few:
        return _blank(5, test, "No records of super-resolution.")
    blocks = curves_lib.own_blocks(few, *blocks)
    return _pattern(5, test, few, metric, blocks, _small_wins)


def _small_wins(cross: winners.Crossover) -> tuple[words.Outcome, float | None]:
    return words.judge_alone(cross.small_wins, cross.small_alone)


def _crosses(cross: winners.Crossover) -> tuple[words.Outcome, float | None]:
    return words.judge_alone(cross.probability, cross.alone)


def _distilled(records: Sequence[Record], metric: str, blocks: tuple[int, int]) -> Verdict:
    records = [r for r in records if metric in r.metrics]
    if not records:
        test = "As claim 3, on records of distilled members."
        return _blank(6, test, "No records of distilled members.")
    # Those of one method: the paper's where there are several.
    task = next(t for t in (*DISTILLED, TEXT_TO_IMAGE) if any(r.task == t for r in records))
    others = sorted({labels.task(r.task).lower() for r in records if r.task != task})
    test = "As claim 3, on records of distilled members"
    if others:
        test += f": {labels.task(task).lower()}, not {labels.listing(others, 'or')}"
    chosen = curves_lib.longest([r for r in records if r.task == task])
    return _pattern(
        6, f"{test}.", chosen, metric, curves_lib.own_blocks(chosen, *blocks), _crosses
    )


def _pattern(number, test, records, metric, blocks, judge) -> Verdict:
    arms = curves_lib.distinct(records)
    found, _ = winners.crossovers(
        curves_lib.quality_curves(arms, metric, None, *blocks), metric, curves_lib.models(arms),
        curves_lib.samplers(arms),
    )
    if not found:
        return _blank(number, test, "No two sizes meet at two budgets in these records.")
    sampler, cross = next(iter(found.items()))
    outcome, sure = judge(cross)
    return Verdict(
        number, CLAIMS[number - 1], test, outcome,
        f"{_where(sampler, cross)}: {words.sure(sure)}.",
        _cross(metric, cross) + _without(arms, metric, blocks, {sampler}),
        probability=sure, **_lead(metric, cross),
    )


def _where(sampler: str, cross: winners.Crossover) -> str:
    low, high = cross.low, cross.high
    there = f"is best at a budget of {labels.number(low.budget)}"
    if low.best.model == high.best.model:
        what = f"{low.best.model} {there} and still at {labels.number(high.budget)}"
    else:
        what = f"{low.best.model} {there}, {high.best.model} at {labels.number(high.budget)}"
    return f"With {labels.sampler(sampler)}, {what}"


def _cross(metric: str, cross: winners.Crossover) -> str:
    low, high = cross.low, cross.high
    return (
        f"The smallest budget that {_all(len(low.contenders))} sizes can afford is "
        f"{labels.number(low.budget)}: {low.best.model} takes {words.how(low.best)} there and "
        f"reaches {words.reached(metric, low.best)} ({words.sure(low.best.probability)} that it is "
        f"the best size, {words.sure(cross.small_wins)} that some size below the largest is). At "
        f"the largest, {labels.number(high.budget)}, {high.best.model} reaches "
        f"{words.reached(metric, high.best)} in {words.how(high.best)} "
        f"({words.sure(high.best.probability)} that it is the best size)."
    )
