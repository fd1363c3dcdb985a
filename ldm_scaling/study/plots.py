"""Plots: quality over guidance, steps and cost, and the winner at each budget.

`figures.catalogue` names the paper's figure of each and writes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, plot_style, winners
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import bands


def sized(records: Sequence[Record]) -> dict[str, str]:
    """Size -> its name and parameters, smallest first."""
    params = {r.identity.model: r.params for r in records}
    counts = {m: labels.count(params[m]) for m in curves_lib.models(records)}
    # A size whose name is its count ("866m", 866M) is named once.
    return {m: m if m.lower() == count.lower() else f"{m} ({count})"
            for m, count in counts.items()}


_COLUMNS = 7
"""Names side by side in a legend, at most."""


def _legend(fig: Figure, entries: Mapping[str, str], areas: bool = False) -> None:
    """Names of the sizes below the figure, on as many rows as its width needs; rows beyond those of
    `_COLUMNS` make it higher."""
    marks = plot_style.marks(list(entries))
    if areas:
        marks = {m: {"color": mark["color"], "marker": "s", "ls": "", "ms": 10}
                 for m, mark in marks.items()}
    inches, size = fig.get_figwidth() - 0.8, 9.0
    handles = [Line2D([], [], label=plot_style.shortened(text, inches, size), **marks[m])
               for m, text in entries.items()]

    def rows_of(columns: int) -> int:
        return -(-len(handles) // columns)

    fewest = rows_of(_COLUMNS)
    for rows in range(fewest, len(handles) + 1):
        columns = min(len(handles), _COLUMNS) if rows == fewest else rows_of(rows)
        legend = fig.legend(handles=handles, loc="outside lower center", ncols=columns,
                            title="size (parameters)")
        if legend.get_window_extent().width <= fig.bbox.width or columns == 1:
            break
        legend.remove()
    fig.set_figheight(fig.get_figheight() + 0.2 * (rows - fewest))


_PANELS = 5
"""Heat maps side by side."""


def guidance_by_steps(records: Sequence[Record], metric: str, sampler: str, block: int) -> Figure:
    """Fig. 8: the measure over guidance x steps, one panel per size, the best of several rates
    marked."""
    cells: dict[str, dict[tuple[int, float], float]] = defaultdict(dict)
    for r in records:
        i = r.identity
        if (i.sampler, i.seed_block) == (sampler, block) and metric in r.metrics:
            cells[i.model][i.steps, i.guidance] = r.metrics[metric]
    sizes = [m for m in curves_lib.models(records) if m in cells]
    choice = curves_lib.best_guidance(records, metric, block)
    measure = labels.measure(metric)
    steps = sorted({s for c in cells.values() for s, _ in c})
    rates = sorted({w for c in cells.values() for _, w in c})
    values = [v for c in cells.values() for v in c.values()]
    norm = plot_style.shades(values)
    cmap = matplotlib.colormaps["viridis_r" if measure.better == "lower" else "viridis"]
    rows = -(-len(sizes) // _PANELS)
    columns = -(-len(sizes) // rows)
    panel = 0.47 * len(steps)

    def titles() -> dict[str, str]:
        room = max(panel, 4.4 / columns)
        return {m: plot_style.shortened(m, room, 11) for m in sizes}

    while len({*titles().values()}) < len(sizes):  # Names cut so short that some are the same.
        panel += 0.11
    fig = plot_style.figure(1.1 + max(columns * (0.5 + panel), 4.4),
                            1.0 + rows * (0.7 + 0.4 * len(rates)))
    axes = fig.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(sizes):]:
        ax.set_axis_off()
    for ax, model in zip(axes.flat, sizes, strict=False):
        grid = np.full((len(rates), len(steps)), np.nan)
        for (s, w), value in cells[model].items():
            grid[rates.index(w), steps.index(s)] = value
        shown = ax.pcolormesh(grid, cmap=cmap, norm=norm, edgecolors="white", linewidth=1.2)
        for (s, w), value in cells[model].items():
            x, y = steps.index(s) + 0.5, rates.index(w) + 0.5
            best = len(rates) > 1 and choice.get((model, sampler, s)) == w
            ax.text(x, y, labels.brief(value), ha="center", va="center", fontsize=7.2,
                    color=plot_style.ink_on(cmap(norm(value))),
                    fontweight="bold" if best else "normal")
            if best:
                ax.add_patch(matplotlib.patches.Rectangle(
                    (x - 0.47, y - 0.47), 0.94, 0.94, fill=False, lw=2, ec="#d1184b"))
        ax.set_title(titles()[model])
        ax.set_xticks(np.arange(len(steps)) + 0.5, [str(s) for s in steps])
        ax.set_yticks(np.arange(len(rates)) + 0.5, [f"{w:g}" for w in rates])
        ax.tick_params(length=0)
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("guidance rate")
    fig.supxlabel("sampling steps", fontsize=10)
    bar = fig.colorbar(shown, ax=axes, pad=0.012, aspect=18)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        plot_style.log_ticks(bar.ax.yaxis)
    bar.set_label(f"{measure.short} ({measure.better} is better)")
    framed = " (framed: best rate)" if len(rates) > 1 else ""
    plot_style.title(
        fig, f"{measure.short} over guidance and steps, {labels.sampler(sampler)}{framed}")
    return fig


def curve(
    ax: Axes, x: Sequence[float], points: Sequence[Point], **how: object
) -> bands.Band | None:
    """Points of one curve, the interval of each, and the band of all where replicates allow it,
    which is returned."""
    ax.plot(x, [p.value for p in points], **how)
    ends = [(at, p.low, p.high) for at, p in zip(x, points, strict=True) if p.low is not None]
    if ends:
        ax.vlines(*zip(*ends, strict=True), color=how["color"], lw=1.3, alpha=0.55)
    band = bands.of_points(points) if len(points) > 1 else None
    if band is not None:
        plot_style.band(ax, x, band.all_low_P, band.all_high_P, how["color"])
    return band


def _along(points: Sequence[Point], axis: str) -> tuple[list[float], list[Point]]:
    """The points in the order of an axis, and their places on it."""
    points = sorted(points, key=lambda p: p.at(axis))
    return [p.at(axis) for p in points], points


def _envelope(ax: Axes, curves: Curves, metric: str, sizes: Sequence[str], axis: str,
              sampler: str) -> None:
    won = winners.winner_by_budget(curves, metric, sizes, axis, {sampler})
    if won:
        ax.step([w.budget for w in won], [w.best.point.value for w in won], where="post",
                color="#8b95a3", lw=5, alpha=0.35, zorder=0, solid_capstyle="round")


def scale_y(ax: Axes, points: Sequence[Point]) -> None:
    """Logarithmic where values span a factor of three, so that the cheap end does not hide."""
    values = [p.value for p in points]
    if min(values) > 0 and max(values) > 3 * min(values):
        plot_style.log_y(ax)


def quality_by_cost(
    records: Sequence[Record], curves: Curves, metric: str, sampler: str, axis: str = "cost",
    notes: Sequence[str] = (),
) -> Figure:
    """Fig. 9: cost against steps (left) and best-guidance quality against it (right), under
    notes."""
    entries = sized(records)
    marks = plot_style.marks(list(entries))
    mine = {m: c for (m, s), c in curves.items() if s == sampler}
    fig = plot_style.figure(11.0, 4.9 + 0.3 * len(notes))
    if notes:
        plot_style.title(fig, "\n".join(notes), fontsize=9, fontweight="normal",
                         color=plot_style.SOFT)
    left, right = fig.subplots(1, 2, width_ratios=(0.85, 1.4))
    named: tuple[list[plot_style.End], list[plot_style.End]] = ([], [])
    starts: list[plot_style.End] = []
    points: Sequence[Point] = ()
    for model in (m for m in entries if m in mine):
        by_steps = sorted(mine[model], key=lambda p: p.steps)
        left.plot([p.steps for p in by_steps], [p.at(axis) for p in by_steps], **marks[model])
        x, points = _along(mine[model], axis)
        curve(right, x, points, **marks[model])
        named[0].append((by_steps[-1].steps, by_steps[-1].at(axis), entries[model],
                         marks[model]["color"]))
        for ends, at in ((starts, 0), (named[1], -1)):
            ends.append((x[at], points[at].value, model, marks[model]["color"]))
    _envelope(right, curves, metric, list(entries), axis, sampler)
    left.set(xscale="log", xlabel=labels.AXES["steps"], ylabel=labels.AXES[axis])
    plot_style.step_ticks(left, sorted({p.steps for c in mine.values() for p in c}))
    plot_style.log_y(left)
    left.set_title("What a step count costs")
    scale_y(right, [p for c in mine.values() for p in c])
    plot_style.log_x(right)
    right.set_xlabel(labels.AXES[axis] + " (log scale)")
    plot_style.best_arrow(right, metric)
    right.set_title(f"What it buys: {labels.sampler(sampler)} at the best guidance")
    _explain(fig, Line2D([], [], color="#8b95a3", lw=5, alpha=0.35,
                         label="winner within the budget"), points)
    plot_style.name_ends(left, named[0])
    plot_style.name_curves(right, starts, named[1], labels.measure(metric).better == "lower")
    return fig


def _explain(fig: Figure, line: Line2D, points: Sequence[Point]) -> None:
    """The few words that the picture needs besides names."""
    handles = [line]
    if points and points[0].replicates_R.size >= bands.LEAST:
        handles += [
            Line2D([], [], color=plot_style.SOFT, ls="", marker="|", ms=10, mew=1.3,
                   label="95% interval of a point"),
            matplotlib.patches.Patch(fc=plot_style.SOFT, alpha=0.2,
                                     label="95% band of the whole curve"),
        ]
    fig.legend(handles=handles, loc="outside lower center",
               ncols=3 if fig.get_figwidth() > 8 else 1)


def samplers_by_cost(records: Sequence[Record], curves: Curves, metric: str) -> Figure:
    """Fig. 11: the curves of the other samplers, those of DDIM dashed behind them."""
    entries = sized(records)
    marks = plot_style.marks(list(entries))
    first, *others = curves_lib.drawn(records, curves)
    fig = plot_style.figure(0.8 + 4.9 * max(len(others), 1), 4.9)
    axes = fig.subplots(1, len(others), sharey=True, squeeze=False)[0]
    named: dict[Axes, tuple[list[plot_style.End], list[plot_style.End]]] = {
        ax: ([], []) for ax in axes}
    last: Sequence[Point] = ()
    for ax, sampler in zip(axes, others, strict=True):
        for model in entries:
            behind, points = curves.get((model, first)), curves.get((model, sampler))
            if behind:
                ax.plot([p.cost for p in behind], [p.value for p in behind], lw=1.1, ls=(0, (4, 2)),
                        color=marks[model]["color"], alpha=0.65)
            if points:
                curve(ax, [p.cost for p in points], points, **marks[model])
                for ends, at in zip(named[ax], (0, -1), strict=True):
                    ends.append((points[at].cost, points[at].value, model, marks[model]["color"]))
                last = points
        scale_y(ax, [p for c in curves.values() for p in c])
        plot_style.log_x(ax)
        ax.set_title(labels.sampler(sampler))
        ax.set_xlabel(labels.AXES["cost"])
    plot_style.best_arrow(axes[0], metric)
    dashed = Line2D([], [], color=plot_style.SOFT, lw=1.1, ls=(0, (4, 2)),
                    label=f"{labels.sampler(first)}, for comparison")
    _explain(fig, dashed, last)
    for ax, both in named.items():
        plot_style.name_curves(ax, *both, labels.measure(metric).better == "lower")
    return fig


_PALE = 0.45
"""How much colour is left where how sure it is is not known."""


def winner_chart(records: Sequence[Record], curves: Curves, metric: str) -> Figure:
    """Which size is best at each budget: its probability, stacked by size, per sampler. Where there
    are no replicates it is the best size alone, pale in a panel that has probabilities too."""
    entries = sized(records)
    colours = {m: mark["color"] for m, mark in plot_style.marks(list(entries)).items()}
    names = curves_lib.drawn(records, curves)
    shown = [(s, winners.winner_by_budget(curves, metric, list(entries), samplers={s}))
             for s in names]
    fig = plot_style.figure(10.0, 1.1 + 1.75 * len(shown))
    axes = fig.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    ends = [won[0].budget for _, won in shown], [won[-1].budget * 1.2 for _, won in shown]
    for ax, (sampler, won) in zip(axes, shown, strict=True):
        edges = [w.budget for w in won] + [won[-1].budget * 1.2]
        known_N = np.array([w.best.probability is not None for w in won])
        parts = [(known_N, 1.0), (~known_N, _PALE)] if known_N.any() else [(~known_N, 1.0)]
        base = np.zeros(len(won))
        for model in entries:
            share = np.array([_share(w, model) for w in won])
            for part_N, alpha in (part for part in parts if part[0].any()):
                ax.stairs(np.where(part_N, base + share, base), edges, baseline=base, fill=True,
                          color=colours[model], alpha=alpha)
            base = base + share
        met = next((w.budget for w in won if w.complete), None)
        if met and met > won[0].budget:
            ax.axvspan(edges[0], met, fc="none", ec="white", hatch="///", lw=0, alpha=0.55)
        _name_stretches(ax, won, edges)
        ax.set(xscale="log", xlim=(min(ends[0]), max(ends[1])), ylim=(0, 1))
        ax.grid(False)
        name = labels.sampler(sampler)
        if known_N.any():
            ax.set(yticks=(0, 0.5, 1), ylabel="probability of\nbeing the best")
            ax.set_title(name + ("" if known_N.all() else " (pale: no replicates)"))
        else:
            ax.set(yticks=(), ylabel="best at\neach budget")
            ax.set_title(f"{name} (no replicates: how sure it is is not known)")
    plot_style.log_x(axes[-1])
    axes[-1].set_xlabel("budget: the most an image may cost (normalised cost × network calls); "
                        "hatched: not every size can afford one")
    _legend(fig, entries, areas=True)
    return fig


def _share(won: winners.Winner, model: str) -> float:
    """Probability of a size at a budget; without replicates all of it goes to the winner."""
    for contender in won.contenders:
        if contender.model == model:
            sure = float(contender is won.best)
            return sure if contender.probability is None else contender.probability
    return 0.0


def _name_stretches(ax: Axes, won: Sequence[winners.Winner], edges: Sequence[float]) -> None:
    """Names the winner above its stretch, where the stretch is wide enough for the name."""
    total = np.log(edges[-1] / edges[0])
    place = 0
    for run in winners.stretches(won):
        low, high = edges[place], edges[place + len(run)]
        place += len(run)
        if np.log(high / low) > 0.014 * len(run[0].best.model) * total:
            text = ax.text(np.sqrt(low * high), 0.5, run[0].best.model, ha="center", va="center",
                           color="white", fontsize=9, fontweight="bold")
            outline = matplotlib.patheffects.withStroke(linewidth=2.5, foreground=plot_style.INK)
            text.set_path_effects([outline])


def traded_steps(steps: Iterable[int]) -> list[int]:
    """Those that `trade_off` has a panel of: the fewest, the middle and the most."""
    steps = sorted(set(steps))
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def trade_off(records: Sequence[Record], metric: str, other: str, block: int) -> Figure:
    """The two measures against each other as guidance rises, one line per size, a panel for each
    of `traded_steps`."""
    entries = sized(records)
    marks, along = plot_style.marks(list(entries)), labels.measure(other)
    both = [r for r in records
            if r.identity.seed_block == block and {metric, other} <= r.metrics.keys()]
    first = curves_lib.samplers(both)[0]
    lines: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for r in both:
        if r.identity.sampler == first:
            point = (r.identity.guidance, r.metrics[other], r.metrics[metric])
            lines[r.identity.model, r.identity.steps].append(point)
    shown = traded_steps(s for _, s in lines)
    fig = plot_style.figure(0.9 + 3.5 * len(shown), 4.3)
    axes = fig.subplots(1, len(shown), sharey=True, sharex=True, squeeze=False)[0]
    for ax, n in zip(axes, shown, strict=True):
        for model in (m for m in entries if (m, n) in lines):
            rates, x, y = zip(*sorted(lines[model, n]), strict=True)
            ax.plot(x, y, **marks[model])
            ends = {0, len(rates) - 1} if model in (next(iter(entries)), list(entries)[-1]) else ()
            for k in sorted(ends):
                ax.annotate(f"{rates[k]:g}", (x[k], y[k]), xytext=(4, 4), fontsize=7,
                            textcoords="offset points",
                            color=plot_style.ink(marks[model]["color"]))
        ax.set_title(labels.steps(n))
        ax.set_xlabel(f"{along.label} ({'→' if along.better == 'higher' else '←'} better)")
        ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    plot_style.best_arrow(axes[0], metric)
    plot_style.title(fig, f"Both measures along guidance ({labels.sampler(first)}; numbers: "
                     "guidance rate)")
    _legend(fig, entries)
    return fig


def training(
    curves: Mapping[str, Sequence[Sequence[float | None]]], entries: Mapping[str, str]
) -> Figure:
    """Training loss (thin) and validation loss (marked) of every size against the step."""
    marks = plot_style.marks(list(entries))
    fig = plot_style.figure(8.6, 4.4)
    ax = fig.subplots()
    named: list[plot_style.End] = []
    for model in (m for m in entries if curves.get(m)):
        rows = [(step, np.nan if a is None else a, np.nan if b is None else b)
                for step, a, b in curves[model]]
        step, loss, held_out = (np.array(column, float) for column in zip(*rows, strict=True))
        ax.plot(step, loss, color=marks[model]["color"], lw=0.9, alpha=0.45)
        there = np.isfinite(held_out)
        ax.plot(step[there], held_out[there], **marks[model], markevery=max(there.sum() // 8, 1))
        end = np.flatnonzero(there)[-1] if there.any() else -1
        last = (held_out if there.any() else loss)[end]
        named.append((step[end], last, entries[model], marks[model]["color"]))
    ax.set(xlabel="training step", ylabel="loss (log scale)")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    plot_style.log_y(ax)
    ax.set_title("Training loss (thin) and validation loss (marked)")
    plot_style.name_ends(ax, named)
    return fig
