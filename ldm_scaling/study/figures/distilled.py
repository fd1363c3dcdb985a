"""Figures 13 and 19: distilled networks beside the undistilled."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, plot_style, plots, students
from ldm_scaling.study.curves import Point
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.downstream import by_size
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import DISTILLED, Record

_STEPS = 4
_OTHERS = (4, 10, 20, 50)
_ACCENT = "#d1184b"


def _undistilled(source: Source, records: Sequence[Record]) -> dict[str, list[Point]]:
    """Curves by size of the sampler that these students are held against."""
    own = {r.identity.model for r in records}
    name = students.teacher((s for m, s in source.curves if m in own), records, source.spacing)
    return {m: c for (m, s), c in source.curves.items() if s == name}


def _of(plain: dict[str, list[Point]], source: Source) -> str:
    """What the undistilled are drawn by, and which of several runs they are, for titles; nothing
    without any."""
    which = ", of the first training run" if source.first_of_several else ""
    return next((f" ({labels.sampler(c[0].sampler)}{which})" for c in plain.values()), "")


def speed_up(distilled: Point, others: Sequence[Point], sign: int) -> float | None:
    """Cost of the cheapest undistilled cell that is at least as good, over the distilled one's;
    None where none is."""
    as_good = [p.cost for p in others if sign * p.value <= sign * distilled.value]
    return min(as_good) / distilled.cost if as_good else None


def consistency(source: Source) -> dict[str, Drawn]:
    """Fig. 13: the consistency-distilled networks beside the undistilled. Left: by size, in 4 steps
    and in more; right: against sampling cost."""
    source = source.first_runs
    records = source.distinct([r for r in source.of_task("consistency")
                               if source.metric in r.metrics])
    curves = source.curves_of(records, source.metric) if records else {}
    plain = _undistilled(source, records)
    sizes = [m for m in source.sizes if m in plain and any(m == k for k, _ in curves)]
    if not sizes:
        return {}
    fig = plot_style.figure(max(2.6 + 0.75 * len(sizes), 5.6) + 5.6, 5.0)
    left, right = fig.subplots(1, 2)
    shown, ends = _by_size(left, source, curves, plain, sizes)
    more, names = _by_cost(right, source, curves, plain, sizes)
    method = labels.sampler(records[0].setting.partition("_")[0])
    plot_style.title(
        fig, f"Distilled{f' ({method})' if method else ''} in few steps, "
        f"undistilled{_of(plain, source)} in more\n"
        "Above: how many times more the cheapest as good undistilled setting costs (–: none is)",
        fontsize=10)
    plot_style.name_ends(left, ends)
    plot_style.name_ends(right, names)
    return {"": Drawn(fig, [*shown, *more])}


def _by_size(
    ax: Axes, source: Source, curves: curves_lib.Curves, plain: dict[str, list[Point]],
    sizes: Sequence[str],
) -> tuple[list[dict], list[plot_style.End]]:
    best: dict[str, Point] = {}
    for m in sizes:
        points = [p for (k, _), curve in curves.items() if k == m for p in curve]
        # The paper's 4 steps, or the nearest to them that was measured.
        best[m] = min(points, key=lambda p: (abs(p.steps - _STEPS), p.chosen_by))
    steps = {p.steps for m in sizes for p in plain[m]}
    shown = [n for n in _OTHERS if n in steps] or sorted(steps)[-4:]
    sign = labels.measure(source.metric).sign
    out, ends = [], []
    lines = [(f"{labels.sampler(plain[sizes[0]][0].sampler)}, {labels.steps(n)}",
              [p for m in sizes for p in plain[m] if p.steps == n], colour, marker)
             for n, colour, marker in zip(shown, plot_style.ramp(len(shown), 0.15, 0.8), "vsD^",
                                          strict=False)]
    own = f"distilled, {labels.steps(best[sizes[-1]].steps)}"
    lines.append((own, list(best.values()), _ACCENT, "o"))
    for text, points, colour, marker in lines:
        x = [sizes.index(p.model) for p in points]
        band = plots.curve(ax, x, points, color=colour, marker=marker)
        ends.append((x[-1], points[-1].value, text, colour))
        for k, p in enumerate(points):
            ratio = speed_up(p, plain[p.model], sign) if marker == "o" else None
            out.append({"panel": "size", "network": "distilled" if marker == "o" else "undistilled"}
                       | rows.of_point(p, source.metric, band, k) | {"speed_up": ratio})
    by_size(ax, sizes)
    plots.scale_y(ax, [p for _, points, _, _ in lines for p in points])
    plot_style.best_arrow(ax, source.metric)
    for m, p in best.items():
        ratio = speed_up(p, plain[m], sign)
        ax.annotate("–" if ratio is None else f"{labels.number(ratio)}×", (sizes.index(m), 1.0),
                    xycoords=("data", "axes fraction"), xytext=(0, 3), ha="center", fontsize=8,
                    textcoords="offset points", color=_ACCENT, fontweight="bold")
    return out, ends


def _by_cost(
    ax: Axes, source: Source, curves: curves_lib.Curves, plain: dict[str, list[Point]],
    sizes: Sequence[str],
) -> tuple[list[dict], list[plot_style.End]]:
    marks = plot_style.marks(sizes)
    out, ends, every = [], [], []
    for m in sizes:
        colour = marks[m]["color"]
        ax.plot([p.cost for p in plain[m]], [p.value for p in plain[m]], ls=(0, (4, 2)), lw=1.1,
                color=colour, marker=marks[m]["marker"], ms=3.5, alpha=0.7)
        out += [{"panel": "cost", "network": "undistilled"} | row
                for row in rows.of_curve(plain[m], source.metric)]
        every += plain[m]
        for (k, _), points in curves.items():
            if k != m:
                continue
            band = plots.curve(ax, [p.cost for p in points], points, **marks[m])
            out += [{"panel": "cost", "network": "distilled"} | row
                    for row in rows.of_curve(points, source.metric, band)]
            ends.append((points[-1].cost, points[-1].value, m, colour))
            every += points
    plots.scale_y(ax, every)
    plot_style.log_x(ax)
    ax.set_xlabel(labels.AXES["cost"] + " (log scale)")
    plot_style.best_arrow(ax, source.metric)
    ax.set_title("solid: distilled, named; dashed: undistilled", fontsize=9, loc="right")
    return out, ends


_COLUMNS = 4


def halving(source: Source) -> dict[str, Drawn]:
    """Fig. 19: guided distillation by stage, a panel for each size, undistilled dashed; and in a
    picture of its own progressive distillation."""
    out, source = {}, source.first_runs
    for task in DISTILLED[1:]:
        records = [r for r in source.of_task(task) if source.metric in r.metrics]
        records = curves_lib.one_setting(records, source.settings)
        if records and (drawn := _stages(source, task, records)) is not None:
            out["" if task == DISTILLED[1] else "progressive"] = drawn
    return out


def _stages(source: Source, task: str, records: Sequence[Record]) -> Drawn | None:
    # Every stage is a student of its own, trained on from the last.
    stages = sorted({r.student_steps for r in records}, reverse=True)
    curves = {
        n: source.curves_of(curves_lib.distinct([r for r in records if r.student_steps == n]),
                            source.metric)
        for n in stages
    }
    sizes, plain = curves_lib.models(records), _undistilled(source, records)
    if not any(curves.values()):
        return None
    columns = min(len(sizes), _COLUMNS)
    lines = -(-len(sizes) // columns)
    fig = plot_style.figure(1.2 + 3.3 * columns, 0.9 + 3.2 * lines)
    axes = fig.subplots(lines, columns, sharey=True, squeeze=False)
    colours, out, ends = plot_style.ramp(len(stages), 0.15, 0.8), [], []
    for ax in axes.flat[len(sizes):]:
        ax.set_axis_off()
    every = [p for found in curves.values() for curve in found.values() for p in curve]
    most = max(p.steps for p in every)
    for ax, model in zip(axes.flat, sizes, strict=False):
        named, steps = [], set()
        same = [p for p in plain.get(model, ()) if p.steps <= most]
        same = sorted(same, key=lambda p: p.steps)
        if same:
            ax.plot([p.steps for p in same], [p.value for p in same], ls=(0, (4, 2)), lw=1.1,
                    color=plot_style.SOFT, marker="x", ms=4)
            named.append((same[-1].steps, same[-1].value, "undistilled", plot_style.SOFT))
            out += [{"network": "undistilled"} | row for row in rows.of_curve(same, source.metric)]
            steps |= {p.steps for p in same}
        for n, colour, marker in zip(stages, colours, "osD^v" * len(stages), strict=False):
            for (m, _), curve in curves[n].items():
                if m != model:
                    continue
                points = sorted(curve, key=lambda p: p.steps)
                band = plots.curve(ax, [p.steps for p in points], points, color=colour,
                                   marker=marker)
                out += [{"network": "distilled", "student_steps": n} | row
                        for row in rows.of_curve(points, source.metric, band)]
                named.append((points[-1].steps, points[-1].value, f"s{n}", colour))
                steps |= {p.steps for p in points}
        every += same
        ax.set_xscale("log")
        plot_style.step_ticks(ax, sorted(steps))
        ax.set_title(model)
        ends.append((ax, named))
    for ax in axes.flat[: len(sizes)]:
        plots.scale_y(ax, every)
    for ax in axes[:, 0]:
        plot_style.best_arrow(ax, source.metric)
    fig.supxlabel("sampling steps", fontsize=10)
    plot_style.title(
        fig, f"{labels.task(task)}: sN are students of N steps, each of the one before\n"
        f"dashed: undistilled{_of(plain, source)}", fontsize=10)
    for ax, named in ends:
        plot_style.name_ends(ax, named)
    return Drawn(fig, out)
