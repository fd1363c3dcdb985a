"""Iso-FLOP profiles: sizes at equal training compute, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.errors import UserError
from ldm_scaling.study import labels, plot_style
from ldm_scaling.study.figures import scaling
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.statistics import isoflop
from ldm_scaling.study.statistics.isoflop import Frontier, Profile

_FLOPS = 1e9  # of a GFLOP: the law is of FLOPs, what is drawn of GFLOPs.


def profiles(source: Source) -> dict[str, Drawn]:
    """Iso-FLOP profiles: at each training budget the loss over size, and its least."""
    shown = []
    for one in scaling.measured(source):
        runs = one.runs.at_budgets()
        if not runs.models:
            continue
        columns = (runs.gflops_N, runs.params_N, runs.value_N)
        found = isoflop.profiles(*columns, tolerance=isoflop.EXACT)
        found = [p for p in found if p.parabola is not None]
        if found:
            try:
                shown.append((one, found, one.runs.frontier(delta=one.noise)))
            except UserError:  # Sizes at the edge are best at all budgets but one.
                shown.append((one, found, None))
    if not shown:
        return {}
    fig = plot_style.figure(10.6, 4.6 * len(shown))
    rows: list[Mapping[str, object]] = []
    grid = fig.subplots(len(shown), 2, squeeze=False, width_ratios=(1.25, 1))
    named = []
    for (left, right), (one, found, frontier) in zip(grid, shown, strict=True):
        named.append((left, _draw_profiles(left, one, found)))
        _draw_frontier(right, found, frontier)
        rows += _profile_rows(one, found, frontier)
    plot_style.title(fig, "Sizes at equal training compute (interpolated along each size's run)")
    for ax, ends in named:
        plot_style.name_ends(ax, ends)
    return {"": Drawn(fig, rows)}


def _draw_profiles(
    ax: Axes, one: scaling.Measured, found: Sequence[Profile]
) -> list[plot_style.End]:
    ends, names = [], _names([p.flops for p in found])
    for p, name, colour in zip(found, names, plot_style.ramp(len(found)), strict=True):
        size = np.geomspace(p.size_M.min(), p.size_M.max(), 60)
        ax.plot(size, p.at(size), color=colour, lw=1.4)
        ax.plot(p.size_M, p.loss_M, ls="", marker="o", ms=5, color=colour)
        if p.best_size is not None:
            ax.plot(p.best_size, p.best_loss, marker="*", ms=15, color=colour, mec="white",
                    mew=0.8, zorder=5)
        ends.append((float(size[-1]), float(p.at(size[-1])), name, colour))
    ax.set_xscale("log")
    plot_style.size_ticks(ax, np.unique(one.runs.params_N))
    plot_style.log_y(ax)
    ax.set(xlabel="parameters (log scale)", ylabel=one.axis)
    ax.set_title(f"{one.title}: a curve for each compute, ★ its least")
    return ends


def _names(budgets: Sequence[float]) -> list[str]:
    """Budgets in as few digits, from two on, as tell them apart."""
    for digits in range(2, 7):
        names = [plot_style.power(budget, digits) for budget in budgets]
        if len(set(names)) == len(names):
            break
    return names


def _draw_frontier(ax: Axes, found: Sequence[Profile], frontier: Frontier | None) -> None:
    """The best size of each budget, and the power law through them."""
    kept = [(p, c) for p, c in zip(found, plot_style.ramp(len(found)), strict=True)
            if p.best_size is not None]
    if frontier is None:
        ax.set_axis_off()
        ax.text(0.02, 0.5, f"{len(kept)} of {len(found)} curves have their least inside the\n"
                "sizes measured: a line needs two.", transform=ax.transAxes, color=plot_style.SOFT)
        return
    for (p, colour), ends in zip(kept, frontier.best_intervals, strict=True):
        ax.vlines(p.flops, *ends, color=colour, lw=1.3, alpha=0.7)
        ax.plot(p.flops, p.best_size, marker="*", ms=13, ls="", color=colour, mec="white", mew=0.8,
                zorder=5)
    budgets = [p.flops for p in found]
    x = np.geomspace(min(budgets) / 1.3, max(budgets) * 1.3, 50)
    ax.plot(x, frontier.best_size(_FLOPS * x), color=plot_style.INK, lw=1.4, zorder=2)
    low, high = frontier.exponent_interval
    ax.set_title(f"Best size grows as $C^{{{frontier.exponent:.2f}}}$ [{low:.2f}, {high:.2f}]",
                 parse_math=True)
    plot_style.log_x(ax)
    plot_style.log_y(ax)
    ax.set(xlabel=f"{labels.AXES['compute']} (log scale)", ylabel="parameters at the least")


def _profile_rows(
    one: scaling.Measured, found: Sequence[Profile], frontier: Frontier | None
) -> list[dict]:
    out = []
    ends = iter(frontier.best_intervals if frontier else ())
    law = {}
    if frontier:
        low, high = frontier.exponent_interval
        law = {"exponent": frontier.exponent, "exponent_low": low, "exponent_high": high,
               "factor": frontier.factor * _FLOPS**frontier.exponent}
    for p in found:
        low, high = (None, None) if p.best_size is None else next(ends, (None, None))
        best = {"best_size": p.best_size, "best_low": low, "best_high": high,
                "best_loss": p.best_loss}
        family = {"family": one.family} if one.family else {}
        out += [
            family | {"compute": p.flops, "measure": one.name, "params": float(size),
                      "loss": float(loss), "parabola": float(p.at(size))} | best | law
            for size, loss in sorted(zip(p.size_M, p.loss_M, strict=True))
        ]
    return out
