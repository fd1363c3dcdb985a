"""Families of networks at equal sampling cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldm_scaling.study import families as families_lib
from ldm_scaling.study import labels, plot_style, plots
from ldm_scaling.study.families import Family
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.winners import Winner

log = logging.getLogger(__name__)


def by_cost(source: Source) -> dict[str, Drawn]:
    """What each family reaches within a budget, at its best size, sampler and steps."""
    families, found = families_lib.compared(source.curves, source.metric)
    left = families_lib.left_out(source.curves)
    if left and len({model for model, _ in source.curves}) > 1:
        log.warning(
            "families: %s left out, which no family has: register them by models.zoo.register, in "
            "a module of config.plugins", ", ".join(left),
        )
    if not families:
        return {}
    return {"": fronts(families, found, source.metric, "What each family reaches within a budget")}


def fronts(
    families: Sequence[Family], found: Sequence[Winner], metric: str, title: str
) -> Drawn:
    """What each of some families reaches within a budget; the first two as `families.of_pools`
    gives them."""
    fig = plot_style.figure(7.6, 5.0)
    ax = fig.subplots()
    marks = plot_style.marks([f.name for f in families])
    out, ends, every = [], [], []
    sure = {(w.budget, c.model): c.probability for w in found for c in w.contenders}
    for family in families:
        mark = marks[family.name]
        budgets, points = zip(*family.frontier)
        ax.step(budgets, [p.value for p in points], where="post", color=mark["color"], lw=1.6)
        # A mark and an interval where another cell takes over.
        new = [k for k, p in enumerate(points) if k == 0 or p is not points[k - 1]]
        ax.plot([budgets[k] for k in new], [points[k].value for k in new], ls="", **mark)
        for k in new:
            if points[k].low is not None:
                ax.vlines(budgets[k], points[k].low, points[k].high, color=mark["color"], lw=1.3,
                          alpha=0.55)
        ends.append((budgets[-1], points[-1].value, family.name, mark["color"]))
        every += points
        out += [
            {"family": family.name, "budget": budget,
             "probability_best": sure[budget, family.name]}
            | rows.of_point(point, metric)
            for budget, point in family.frontier
        ]
    plots.scale_y(ax, every)
    plot_style.log_x(ax)
    ax.set_xlabel("budget: " + labels.AXES["cost"] + " (log scale)")
    plot_style.best_arrow(ax, metric)
    ax.set_title(title)
    plot_style.name_ends(ax, ends)
    return Drawn(fig, out)
