"""Figures 8 to 11 and those beside them: the drawings of `plots` with their numbers."""

from __future__ import annotations

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import image_grids, labels, plots, pricing, winners
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.statistics import bands


def _curve_rows(source: Source, curves: Curves, samplers: list[str]) -> list[dict]:
    found = source.bands if curves is source.curves else bands.of_curves(curves)
    return [
        row for sampler in samplers for m in source.sizes if (m, sampler) in curves
        for row in rows.of_curve(curves[m, sampler], source.metric, found.get((m, sampler)))
    ]


def cost(source: Source) -> dict[str, Drawn]:
    """Fig. 9: cost against steps, and quality against cost, of the first sampler."""
    if not source.samplers:
        return {}
    main = source.samplers[0]
    fig = plots.quality_by_cost(source.main, source.curves, source.metric, main)
    return {"": Drawn(fig, _curve_rows(source, source.curves, [main]))}


def seconds(source: Source) -> dict[str, Drawn]:
    """Fig. 9 in measured seconds, where they compare, of the points that have some."""
    if not source.samplers or pricing.incomparable(source.main):
        return {}
    main = source.samplers[0]
    own = {key: curve for key, curve in source.curves.items() if key[1] == main}
    timed = pricing.with_seconds(own)
    if not timed:
        return {}
    lacking = pricing.without_seconds(p for curve in own.values() for p in curve)
    notes = [*filter(None, [lacking, pricing.doubt(source.main)])]
    fig = plots.quality_by_cost(source.main, timed, source.metric, main, "seconds", notes)
    return {"": Drawn(fig, _curve_rows(source, timed, [main]))}


def samplers(source: Source) -> dict[str, Drawn]:
    """Fig. 11: the other samplers' curves, the first's behind them."""
    if len(source.samplers) < 2:
        return {}
    fig = plots.samplers_by_cost(source.main, source.curves, source.metric)
    return {"": Drawn(fig, _curve_rows(source, source.curves, source.samplers))}


def winner(source: Source) -> dict[str, Drawn]:
    """Who wins each budget, and how surely."""
    if not source.samplers:
        return {}
    out = [
        {"budget": won.budget, "best": contender is won.best, "probability": contender.probability}
        | rows.of_point(contender.point, source.metric)
        for sampler in source.samplers
        for won in winners.winner_by_budget(
            source.curves, source.metric, source.sizes, samplers={sampler})
        for contender in won.contenders
    ]
    return {"": Drawn(plots.winner_chart(source.main, source.curves, source.metric), out)}


def heat(source: Source) -> dict[str, Drawn]:
    """Fig. 8: the measure over guidance and steps, a picture for each sampler."""
    records = [r for r in source.main if r.identity.seed_block == source.select_block
               and source.metric in r.metrics]
    choice = curves_lib.best_guidance(records, source.metric, source.select_block)
    out = {}
    for sampler in curves_lib.samplers(records):
        cells = [
            {"model": i.model, "sampler": sampler, "steps": i.steps, "guidance": i.guidance,
             "images": i.num_images, "measure": source.metric,
             "value": r.metrics[source.metric],
             "best": choice[i.model, sampler, i.steps] == i.guidance}
            for r in sorted(records, key=lambda r: (source.sizes.index(r.identity.model),
                                                    r.identity.steps, r.identity.guidance))
            if (i := r.identity).sampler == sampler
        ]
        fig = plots.guidance_by_steps(source.main, source.metric, sampler, source.select_block)
        out[labels.file_name(sampler)] = Drawn(fig, cells)
    return out


def trade(source: Source) -> dict[str, Drawn]:
    """The main measure against one more as guidance rises."""
    records = [r for r in source.main if r.identity.seed_block == source.select_block]
    other = labels.traded(source.metric, [
        m for m in source.measures(records)
        if any({m, source.metric} <= r.metrics.keys() for r in records)
    ])
    if other is None:
        return {}
    both = [r for r in records if {other, source.metric} <= r.metrics.keys()]
    first = curves_lib.samplers(both)[0]
    own = [r for r in both if r.identity.sampler == first]
    shown = plots.traded_steps(r.identity.steps for r in own)
    out = [
        {"model": i.model, "sampler": first, "steps": i.steps, "guidance": i.guidance,
         source.metric: r.metrics[source.metric], other: r.metrics[other]}
        for r in sorted(own, key=lambda r: (source.sizes.index(r.identity.model),
                                            r.identity.steps, r.identity.guidance))
        if (i := r.identity).steps in shown
    ]
    fig = plots.trade_off(source.main, source.metric, other, source.select_block)
    return {"": Drawn(fig, out)}


def images(source: Source) -> dict[str, Drawn]:
    """Fig. 10: images of the same captions at nearly the same cost, a picture for each sampler."""
    cells = image_grids.costs(source.main, source.images)
    points = {(p.model, p.sampler, p.steps): p for c in source.curves.values() for p in c}
    out = {}
    for sampler in sorted({s for _, s, _ in cells}):
        groups = image_grids.equal_cost(cells, sampler, source.sizes)
        if not groups:
            continue
        numbers = []
        for group in groups:
            for cell, at in group.cells:
                row = {"cost_aimed": group.cost, "model": cell[0], "sampler": sampler,
                       "steps": cell[2], "cost": at}
                if cell in points:
                    row |= rows.of_point(points[cell], source.metric)
                numbers.append(row)
        fig = image_grids.draw(groups, source.images, source.captions, source.curves,
                               source.metric)
        out[labels.file_name(sampler)] = Drawn(fig, numbers)
    return out


def losses(source: Source) -> dict[str, Drawn]:
    """Training and validation loss against the step."""
    entries = plots.sized(source.main)
    shown = [m for m in entries if source.loss_curves.get(m)]
    if not shown:
        return {}
    out = [{"model": m, "step": step, "train_loss": loss, "validation_loss": held_out}
           for m in shown for step, loss, held_out in source.loss_curves[m]]
    return {"": Drawn(plots.training(source.loss_curves, entries), out)}
