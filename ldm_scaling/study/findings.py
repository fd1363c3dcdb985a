"""Findings: what the records show, in plain sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import families, labels, pricing, repeated, winners
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import bands, blocks, duels, words


def findings(
    records: Sequence[Record], metric: str, select_block: int = 0, report_block: int = 1
) -> list[str]:
    """What the records show, one sentence each, most important first.

    Every sentence is made from the records alone; one that needs records which are not there yet
    is left out, and the last ones say what is missing. What is said of smaller and larger sizes is
    of one family, see `families.ladder`.
    """
    both = (select_block, report_block)
    curves = curves_lib.quality_curves(records, metric, None, *both)
    out = []
    if curves:
        _, sizes = families.ladder(curves_lib.models(records))
        main = curves_lib.samplers(records)[0]
        own = {key: curve for key, curve in curves.items() if key[0] in sizes}
        if any(s == main for _, s in own):
            out += _budgets(own, metric, sizes, main)
            out += _pairs(own, metric, sizes, main)
        out += _seconds(records, own, metric, sizes, main)
        out += _best_of_all(curves, metric)
    out += _guidance(records, metric, select_block)
    out += _trade_off(records, metric, select_block)
    return out + incomplete(records, metric, *both)


def _budgets(curves: Curves, metric: str, sizes: Sequence[str], sampler: str) -> list[str]:
    won = winners.winner_by_budget(curves, metric, sizes, samplers={sampler})
    met = [w for w in won if w.complete and w.runner_up]
    if not met:
        return []
    name, out = labels.sampler(sampler), []
    if len(met) < len(won):
        out.append(
            f"{name}: below a budget of {labels.number(met[0].budget)} (normalised cost × network "
            "calls) the largest sizes cannot take part at all; from there on every size competes."
        )
    runs, several = winners.stretches(met), len(met) > 1
    out.append(
        f"With {name} the size that is best at {'each' if several else 'the one common'} budget is "
        f"{labels.listing([_run(run) for run in runs], 'then')}."
    )
    first = met[0]
    line = (
        f"{'At the smallest of these budgets' if several else 'There'} {first.best.model} takes "
        f"{words.how(first.best)} and reaches {words.reached(metric, first.best)}; "
        f"{first.runner_up.model} ({words.how(first.runner_up)}) is next, "
        f"{labels.number(first.advantage)} worse"
    )
    if first.advantage_interval:
        line += f" {labels.interval(*first.advantage_interval)}"
    out.append(f"{line}.")
    largest = met[-1].contenders[-1]
    if not any(w.best.model == largest.model for w in met):
        out.append(
            f"The largest size, {largest.model}, wins at no budget up to "
            f"{labels.number(won[-1].budget)} with {name}: the best it reaches is "
            f"{words.reached(metric, largest)} against {words.reached(metric, met[-1].best)} of "
            f"{met[-1].best.model}."
        )
    return out


def _pairs(curves: Curves, metric: str, sizes: Sequence[str], sampler: str) -> list[str]:
    """The smallest against the largest size where both can first take part, and how many of all
    such comparisons are left after correcting for their number."""
    won = winners.winner_by_budget(curves, metric, sizes, samplers={sampler})
    budgets = [w.budget for w in won if w.complete and len(w.contenders) > 1]
    if not budgets or any(p.replicates_R.size < bands.LEAST
                          for (_, s), curve in curves.items() if s == sampler for p in curve):
        return []
    found = duels.all_pairs(curves, metric, sizes, budgets, samplers={sampler})
    contenders = next(w for w in won if w.complete).contenders
    ends = {contenders[0].model, contenders[-1].model}
    first = next(d for d in found if {d.a.model, d.b.model} == ends)
    holm, bh = (sum(p <= 1 - words.CONFIDENCE for p in values)
                for values in ([d.holm for d in found], [d.bh for d in found]))
    return [
        f"Smallest against largest: {duels.sentence(first, metric)}",
        f"Of all {len(found)} comparisons of two sizes at equal budgets with "
        f"{labels.sampler(sampler)}, {holm} differ for sure even if not one of them may err "
        f"(Holm), {bh} if one in twenty of those named may (Benjamini and Hochberg).",
    ]


def _run(run: Sequence[winners.Winner]) -> str:
    first, last = labels.number(run[0].budget), labels.number(run[-1].budget)
    where = f"from {first} to {last}" if last != first else f"at {first}"
    sure = [w.best.probability for w in run if w.best.probability is not None]
    if not sure:
        return f"{run[0].best.model} {where}"
    if min(sure) >= words.CONFIDENCE:
        return f"{run[0].best.model} {where} (probability {words.CONFIDENCE:g} or more)"
    ends = dict.fromkeys(labels.probability(p) for p in (min(sure), max(sure)))
    return f"{run[0].best.model} {where} (unsure: probability {' to '.join(ends)})"


def _seconds(
    records: Sequence[Record], curves: Curves, metric: str, sizes: Sequence[str], sampler: str
) -> list[str]:
    """Claim 3 in seconds; where they do not compare, or something speaks against them, only why."""
    if why := pricing.incomparable(records):
        return [f"{why}: claim 3 is judged by cost alone."]
    timed = pricing.with_seconds(curves)
    cross = winners.crossovers(timed, metric, sizes, [sampler], axis="seconds")[0].get(sampler)
    if cross is None:
        return []
    if doubts := pricing.doubts(records):
        return [" ".join([*doubts, "So claim 3 is judged by cost alone."])]
    low, high = cross.low, cross.high
    lacking = pricing.without_seconds(p for (_, s), curve in curves.items() if s == sampler
                                      for p in curve)
    outcome, sure = words.judge_alone(cross.probability, cross.alone)
    return [
        f"In measured seconds per image instead of normalised cost, claim 3 is {outcome} for "
        f"{labels.sampler(sampler)} ({words.sure(sure)}): {low.best.model} is best at "
        f"{labels.number(low.budget)} s, {high.best.model} at {labels.number(high.budget)} s."
        + (lacking and f" {lacking}")
    ]


def _best_of_all(curves: Curves, metric: str) -> list[str]:
    points = [p for curve in curves.values() for p in curve]
    best = min(points, key=lambda p: (p.chosen_by, p.cost))
    least = min(points, key=lambda p: (p.cost, p.chosen_by))
    which = "Whatever the cost, the best configuration on the choosing prompts" if points[1:] else (
        "The one configuration that is reported")
    cheapest = "" if not points[1:] else ", and is the cheapest" if least is best else (
        f"; the cheapest is {least.model}, {labels.sampler(least.sampler)}, "
        f"{labels.steps(least.steps)}: {words.reached(metric, winners.Contender(least, None))} at "
        f"{labels.number(least.cost)}"
    )
    return [
        f"{which} is {best.model} with {labels.sampler(best.sampler)}, {labels.steps(best.steps)} "
        f"and guidance {best.guidance:g}; on the reporting prompts it has "
        f"{words.reached(metric, winners.Contender(best, None))} at a cost of "
        f"{labels.number(best.cost)}{cheapest}."
    ]


def _guidance(records: Sequence[Record], metric: str, block: int) -> list[str]:
    choice = curves_lib.best_guidance(records, metric, block)
    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for (model, sampler, steps), guidance in choice.items():
        series[model, sampler].append((steps, guidance))
    moves = [sorted(s)[-1][1] - sorted(s)[0][1] for s in series.values() if len(s) > 1]
    rates = {r.identity.guidance for r in records if r.identity.seed_block == block}
    if not moves or len(rates) < 2:
        return []
    falls, rises = sum(m < 0 for m in moves), sum(m > 0 for m in moves)
    stays = len(moves) - falls - rises
    ways = {"falls": falls, "rises": rises, "does not move": stays}
    trend = next((way for way, count in ways.items() if count > 0.75 * len(moves)),
                 "shows no common trend")
    edge = sum(g in (min(rates), max(rates)) for g in choice.values())
    sentence = (
        f"As steps increase, the best guidance rate {trend}: from the fewest steps to the most it "
        f"falls in {falls}, rises in {rises} and stays in {stays} of {len(moves)} series (one per "
        "size and sampler)."
    )
    if edge:
        sentence += (
            f" In {edge} of {len(choice)} cells it lies at the edge of the rates tried "
            f"({min(rates):g} or {max(rates):g}), so the true best may lie outside them."
        )
    return [sentence]


def _trade_off(records: Sequence[Record], metric: str, block: int) -> list[str]:
    other = labels.traded(metric, curves_lib.measures(records))
    if other is None or not labels.of_captions(other) or labels.of_captions(metric):
        return []
    cells = defaultdict(list)
    for r in records:
        if r.identity.seed_block == block and {metric, other} <= r.metrics.keys():
            i = r.identity
            cells[i.model, i.sampler, i.steps].append((i.guidance, r))
    gains = []
    sign, other_sign = labels.measure(metric).sign, labels.measure(other).sign
    for cell in cells.values():
        best = min(cell, key=lambda c: (sign * c[1].metrics[metric], c[0]))
        last = max(cell, key=lambda c: c[0])
        if last[0] > best[0]:
            gains.append(other_sign * (best[1].metrics[other] - last[1].metrics[other]))
    if not gains:
        return []
    mean = sum(gains) / len(gains)
    trades = "trades one measure for the other" if mean > 0 else "does not trade the measures"
    return [
        f"Guidance {trades}: going from the rate with the best {labels.measure(metric).short} to "
        f"the highest rate raises {labels.measure(other).short} in {sum(g > 0 for g in gains)} of "
        f"{len(gains)} cells, and {'raises' if mean > 0 else 'lowers'} it by "
        f"{labels.number(abs(mean))} on average."
    ]


def between_blocks(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int]
) -> list[str]:
    """What several blocks that report say of the one that chose; nothing with one of them, or where
    rates raced: most were chosen on fewer images, whose distances are not comparable.

    Args:
      records: distinct ones of all blocks, not pooled.
      metric: the measure.
      select_block, report_blocks: see `statistics.blocks`.
    """
    if any(r.round > 0 for r in records if r.identity.seed_block == select_block):
        return []
    found = blocks.flattery(records, metric, select_block, report_blocks)
    if found is None or found.low is None:
        return []
    better = "better" if found.mean >= 0 else "worse"
    return [
        f"At the chosen rates {labels.measure(metric).short} is {labels.number(abs(found.mean))} "
        f"{better} on the choosing seed block than on the {len(report_blocks)} that are reported, "
        f"on average over {found.cells} cells; what choosing alone does lies in "
        f"{labels.interval(found.low, found.high)} by the spread between blocks (above 0 it "
        "flatters)."
    ]


def between_runs(records: Sequence[Record], metric: str) -> list[str]:
    """How far training again moves the measure; nothing where no size was trained several times.

    Args:
      records: of all runs, not merged.
      metric: the measure.
    """
    found = repeated.spread(records, metric)
    if found is None:
        return []
    by = f"{100 * found.sd:.2g}%" if found.relative else labels.number(found.sd)
    several = f"{found.sizes} sizes" if found.sizes > 1 else "one size"
    return [
        f"Trained again, with another seed, a size's {labels.measure(metric).short} differs by "
        f"{by}: the standard deviation of one run about the mean of its size, by {found.freedom} "
        f"further run{'s' * (found.freedom > 1)} of {several}, over all cells that are reported."
    ]


def incomplete(records: Sequence[Record], metric: str, select: int, report: int) -> list[str]:
    """What is missing, in sentences: the last of `findings`."""
    gaps = curves_lib.gaps(records, metric, select, report)
    curves = curves_lib.quality_curves(records, metric, None, select, report)
    silent = [g for g in gaps if not g.reported]
    thin = [g for g in gaps if g.guidance]
    out = []
    if silent:
        some = labels.listing([f"{m} {labels.sampler(s)} {labels.steps(n)}"
                               for m, s, n in (g.cell for g in silent[:3])])
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        out.append(
            f"The sweep is not complete: {len(silent)} cell{'s' * (len(silent) > 1)} "
            f"of the full grid ({some}{more}) "
            f"{'are' if len(silent) > 1 else 'is'} not yet reported at the chosen guidance; "
            + ("the curves are drawn from the rest." if curves
               else "none is, so there are no curves yet.")
        )
    if thin:
        out.append(
            f"In {len(thin)} cell{'s' * (len(thin) > 1)} not every guidance rate of the sampler "
            "was tried; the best of those tried is used."
        )
    return out
