"""The largest size, foretold by a law of the smaller ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.study import labels, plot_style, plots
from ldm_scaling.study.figures import scaling
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.statistics.fits import HeldOut
from ldm_scaling.study.statistics.scaling import LEAST, REPLICATES, By, Runs


def largest(source: Source) -> dict[str, Drawn]:
    """What a law of the smaller sizes foretells of the largest: of size and images where runs were
    measured at several lengths, else of compute."""
    shown = [found for one in scaling.measured(source) if (found := _foretold(one)) is not None]
    if not shown:
        return {}
    marks = plot_style.marks(list(plots.sized(source.main)))
    rows: list[Mapping[str, object]] = []
    across = min(len(shown), 2)
    down = -(-len(shown) // across)
    fig = plot_style.figure(max(5.6 * across, 6.6), 4.8 * down)
    grid = fig.subplots(down, across, squeeze=False).ravel()
    axes = grid[: len(shown)]
    for ax in grid[len(shown) :]:
        ax.set_axis_off()
    for ax, (one, by, held) in zip(axes, shown, strict=True):
        rows += _draw_held_out(ax, one, by, held, marks)
    plot_style.title(fig, "The largest size, foretold from the smaller ones")
    for ax, (one, _, _) in zip(axes, shown, strict=True):
        named = scaling.curve_ends(one.runs, "compute", marks)
        plot_style.name_curves(ax, *named, lower_is_better=True)
    return {"": Drawn(fig, rows)}


def _foretold(one: scaling.Measured) -> tuple[scaling.Measured, By, HeldOut] | None:
    """What is foretold, the law's scales and its prediction; None where the smaller sizes are too
    few, or too much alike in compute, for one."""
    def rest(runs: Runs) -> Runs:
        return runs.some(runs.params_N < runs.params_N.max())

    by: By = "size and images"
    if not rest(one.runs).several_lengths:
        by, one = "compute", dataclasses.replace(one, runs=one.runs.ends())
        if len(np.unique(rest(one.runs).gflops_N)) < LEAST:
            return None
    return one, by, one.runs.held_out(
        by, offset=rest(one.runs).networks >= scaling.LEAST_WITH_OFFSET, delta=one.noise,
        replicates=REPLICATES)


def _draw_held_out(
    ax: Axes, one: scaling.Measured, by: By, held: HeldOut, marks: Mapping[str, Mapping[str, str]]
) -> list[dict]:
    runs = one.runs
    last = runs.some(runs.params_N == runs.params_N.max())
    order = np.argsort(last.gflops_N, kind="stable")
    x, predicted, low, high = (np.asarray(v)[order] for v in (
        last.gflops_N, held.predicted, held.low, held.high))
    scaling.draw_runs(ax, runs, "compute", marks)
    if len(np.unique(x)) > 1:  # Several runs may end alike.
        plot_style.band(ax, x, low, high, plot_style.INK)
        ax.plot(x, predicted, color=plot_style.INK, lw=1.6, ls=(0, (4, 2)), zorder=5)
    else:
        ax.vlines(x, low, high, color=plot_style.INK, lw=1.4, zorder=4)
        ax.plot(x, predicted, ls="", marker="o", ms=9, mfc="none", mec=plot_style.INK, zorder=5)
    plot_style.log_x(ax)
    if by == "compute":
        line = np.geomspace(runs.gflops_N.min(), runs.gflops_N.max(), 60)
        ax.plot(line, held.fit.law(line), color=plot_style.INK, lw=1.2, ls=(0, (4, 2)), zorder=2)
    plot_style.log_y(ax)
    ax.set(xlabel=f"{labels.AXES['compute']} (log scale)", ylabel=one.axis)
    covered = f"{100 * held.covered:.0f}% inside" if 0 < held.covered < 1 else (
        "inside" if held.covered else "outside")
    scaling.entitle(
        ax, one, f"{last.models[0]} foretold (dashed) by a law of {by} of the others:",
        f"off by {100 * held.error:.2g}%, {covered} the 95% interval",
    )
    return [
        scaling.row_of(one, last, int(k)) | {
            "predicted": held.predicted[k], "low_predicted": held.low[k],
            "high_predicted": held.high[k], "law_of": by, "error": held.error,
            "covered": held.covered}
        for k in order
    ]
