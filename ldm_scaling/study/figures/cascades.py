"""Cascades: what two stages reach within a budget, and how they best share it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.config.cascade import TASK
from ldm_scaling.study import cascades as cascades_lib
from ldm_scaling.study import labels, plot_style, plots
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.figures import families, rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import Record


def _found(source: Source) -> tuple[list[Record], Curves]:
    records = [r for r in source.of_task(TASK) if source.metric in r.metrics]
    records = source.distinct(records) if records else []
    return records, source.curves_of(records, source.metric) if records else {}


def by_cost(source: Source) -> dict[str, Drawn]:
    """What single networks and cascades reach within a budget, each at its best."""
    _, cascades = _found(source)
    found, won = cascades_lib.compared(source.curves, cascades, source.metric)
    if not found:
        return {}
    title = "What one network and a cascade of two reach within a budget"
    return {"": families.fronts(found, won, source.metric, title)}


def split(source: Source) -> dict[str, Drawn]:
    """Left: quality against cost of every cascade, by the share of its first stage. Right: the
    share at which a budget is best spent."""
    records, curves = _found(source)
    found = cascades_lib.splits(curves, records, source.metric) if curves else []
    if not found:
        return {}
    fig = plot_style.figure(12.0, 4.8)
    left, right = fig.subplots(1, 2)
    out = _cells(left, source, curves, records)
    out += _best(right, found, source)
    plot_style.title(fig, "Cascades: how much of the cost the first stage takes")
    return {"": Drawn(fig, out)}


def _cells(ax: Axes, source: Source, curves: Curves, records: list[Record]) -> list[dict]:
    stages = cascades_lib.firsts(records)
    points = sorted((p for c in curves.values() for p in c), key=lambda p: p.cost)
    firsts = [stages[cascades_lib.cell(p)] for p in points]
    shares = np.array([first.cost / p.cost for first, p in zip(firsts, points, strict=True)])
    shown = ax.scatter([p.cost for p in points], [p.value for p in points], c=100 * shares,
                       cmap="viridis", vmin=0, vmax=100, s=22, zorder=3)
    ends = [(p.cost, p.low, p.high) for p in points if p.low is not None]
    if ends:
        ax.vlines(*zip(*ends, strict=True), color=plot_style.SOFT, lw=0.8, alpha=0.5)
    plots.scale_y(ax, points)
    plot_style.log_x(ax)
    ax.set_xlabel(labels.AXES["cost"] + " (log scale)")
    plot_style.best_arrow(ax, source.metric)
    ax.set_title("every cascade")
    ax.figure.colorbar(shown, ax=ax, label="first stage's share of the cost, %")
    return [
        {"panel": "cells", "first": first.model, "first_sampler": first.sampler,
         "first_steps": first.steps, "share": share} | rows.of_point(p, source.metric)
        for p, first, share in zip(points, firsts, shares.tolist(), strict=True)
    ]


def _best(ax: Axes, found: list[cascades_lib.Split], source: Source) -> list[dict]:
    colour = plot_style.ramp(2)[0]
    budgets = [s.budget for s in found]
    ax.step(budgets, [100 * s.share for s in found], where="post", color=colour, lw=1.6)
    ax.plot(budgets, [100 * s.share for s in found], ls="", marker="o", color=colour)
    for s in found:
        if s.low is not None:
            ends = [100 * s.low, 100 * s.high]
            ax.plot([s.budget] * 2, ends, marker="_", ms=7, color=colour, lw=1.3, alpha=0.55)
        ax.annotate(f"{s.first.steps}+{s.point.steps}", (s.budget, 100 * s.share), fontsize=8,
                    xytext=(4, 5), textcoords="offset points")
    ax.set_ylim(0, 100)
    plot_style.log_x(ax)
    ax.set_xlabel("budget: " + labels.AXES["cost"] + " (log scale)")
    ax.set_ylabel("first stage's share of the cost, %")
    ax.set_title("the best within a budget; steps of first + second stage")
    return [
        {"panel": "best", "budget": s.budget, "first": s.first.model,
         "first_sampler": s.first.sampler, "first_steps": s.first.steps, "share": s.share,
         "share_low": s.low, "share_high": s.high} | rows.of_point(s.point, source.metric)
        for s in found
    ]
