"""Sizes that were trained several times: what each run reaches, about the mean of its size."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, plot_style, plots, repeated
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import TEXT_TO_IMAGE
from ldm_scaling.study.statistics import blocks


def runs(source: Source) -> dict[str, Drawn]:
    """Left: the mean over runs against cost, a dot for each run. Right: how far each run lies from
    its size's mean, over all cells."""
    pooled = blocks.pooled(source.records, source.select_block, source.report_blocks)
    own = curves_lib.longest([r for r in pooled if r.task == TEXT_TO_IMAGE], source.settings)
    values = repeated.by_run(own, source.metric)
    if not values or not source.samplers:
        return {}
    cells = {(i.model, i.sampler, i.steps, i.guidance): values[stored.identity]
             for stored, arm in curves_lib.arms(own)
             if stored.identity in values and (i := arm.identity).seed_block == source.report_block}
    entries, measure = plots.sized(source.main), labels.measure(source.metric)
    marks, main = plot_style.marks(list(entries)), source.samplers[0]
    fig = plot_style.figure(11.0, 4.9)
    left, right = fig.subplots(1, 2, width_ratios=(1.4, 0.8))
    relative = all(min(own.values()) > 0 for own in values.values()) and measure.better == "lower"
    ends, starts, out, every, away = [], [], [], [], {}
    for model in (m for m in entries if (m, main) in source.curves):
        points = source.curves[model, main]
        plots.curve(left, [p.cost for p in points], points, **marks[model])
        for at, of in ((0, starts), (-1, ends)):
            of.append((points[at].cost, points[at].value, model, marks[model]["color"]))
        every += points
    for (model, sampler), points in source.curves.items():
        for p in points:
            own = cells.get((p.model, p.sampler, p.steps, p.guidance), {0: p.value})
            if sampler == main and len(own) > 1:
                left.plot([p.cost] * len(own), [*own.values()], ls="", marker="o", ms=3.5,
                          mec="white", mew=0.5, color=marks[model]["color"], zorder=3)
            for run, value in own.items():
                off = 100 * (value / p.value - 1) if relative else value - p.value
                if len(own) > 1:
                    away.setdefault((model, run), []).append(off)
                out.append({"run": run, f"{source.metric}_of_run": value}
                           | rows.of_point(p, source.metric))
    plots.scale_y(left, every)
    plot_style.log_x(left)
    left.set_xlabel(labels.AXES["cost"] + " (log scale)")
    left.set_title(f"The mean over training runs, {labels.sampler(main)}; a dot for each run")
    plot_style.best_arrow(left, source.metric)
    plot_style.name_curves(left, starts, ends, measure.better == "lower")
    _away(right, {key: float(np.mean(own)) for key, own in away.items()}, list(entries), marks,
          f"{measure.short} of a run, less its size's mean" + (" (%)" if relative else ""))
    return {"": Drawn(fig, out)}


def _away(
    ax: Axes, away: dict[tuple[str, int], float], sizes: list[str], marks: dict[str, dict], y: str
) -> None:
    """A dot for each run: its mean over cells."""
    shown = [m for m in sizes if any(m == model for model, _ in away)]
    ax.axhline(0.0, color=plot_style.SOFT, lw=0.8)
    for (model, run), off in away.items():
        ax.plot(shown.index(model), off, color=marks[model]["color"], marker="o", ms=6, ls="",
                mec="white", mew=0.6, zorder=3)
        ax.annotate(f"{run + 1}", (shown.index(model), off), (6, -3), textcoords="offset points",
                    fontsize=8, color=plot_style.SOFT)
    ax.set_xticks(range(len(shown)), shown)
    ax.set_xlim(-0.6, len(shown) - 0.4)
    ax.set_ylabel(y)
    ax.set_title("Each run, over all cells")
