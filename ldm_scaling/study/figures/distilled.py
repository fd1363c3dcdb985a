"""Figures 13 and 19: distilled networks beside the undistilled."""

from __future__ import annotations

from collections.abc import Sequence

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, plot_style, plots
from ldm_scaling.study.curves import Point
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.downstream import by_size
from ldm_scaling.study.figures.source import Drawn, Source

_STEPS = 4
_OTHERS = (10, 20, 50)
_ACCENT = "#d1184b"


def _undistilled(source: Source) -> dict[str, list[Point]]:
    """Curves by size of the first sampler."""
    return {m: c for (m, s), c in source.curves.items() if s == source.samplers[0]}


def speed_up(distilled: Point, others: Sequence[Point], sign: int) -> float | None:
    """Cost of the cheapest undistilled cell that is at least as good, over the distilled one's;
    None where none is."""
    as_good = [p.cost for p in others if sign * p.value <= sign * distilled.value]
    return min(as_good) / distilled.cost if as_good else None


def consistency(source: Source) -> dict[str, Drawn]:
    """Fig. 13: the consistency-distilled network in 4 steps beside the undistilled in more."""
    records = source.distinct([r for r in source.of_task("consistency")
                               if source.metric in r.metrics])
    curves = source.curves_of(records, source.metric) if records else {}
    plain = _undistilled(source)
    sizes = [m for m in source.sizes if m in plain and any(m == k for k, _ in curves)]
    if not sizes:
        return {}
    best: dict[str, Point] = {}
    for m in sizes:
        points = [p for (k, _), curve in curves.items() if k == m for p in curve]
        # The paper's 4 steps, or the nearest to them that was measured.
        best[m] = min(points, key=lambda p: (abs(p.steps - _STEPS), p.chosen_by))
    steps = {p.steps for m in sizes for p in plain[m]}
    shown = [n for n in _OTHERS if n in steps] or sorted(steps)[-3:]
    sign = labels.measure(source.metric).sign
    fig = plot_style.figure(max(2.6 + 0.75 * len(sizes), 6.4), 4.8)
    ax = fig.subplots()
    out, ends = [], []
    lines = [(f"{labels.sampler(plain[sizes[0]][0].sampler)}, {n} steps",
              [p for m in sizes for p in plain[m] if p.steps == n], colour, marker)
             for n, colour, marker in zip(shown, plot_style.ramp(len(shown), 0.15, 0.75), "sD^",
                                          strict=False)]
    lines.append((f"distilled, {best[sizes[-1]].steps} steps", list(best.values()), _ACCENT, "o"))
    for text, points, colour, marker in lines:
        x = [sizes.index(p.model) for p in points]
        band = plots.curve(ax, x, points, color=colour, marker=marker)
        ends.append((x[-1], points[-1].value, text, colour))
        for k, p in enumerate(points):
            ratio = speed_up(p, plain[p.model], sign) if marker == "o" else None
            out.append({"network": "distilled" if marker == "o" else "undistilled"}
                       | rows.of_point(p, source.metric, band, k) | {"speed_up": ratio})
    by_size(ax, sizes)
    plots.scale_y(ax, [p for _, points, _, _ in lines for p in points])
    plot_style.best_arrow(ax, source.metric)
    for m, p in best.items():
        ratio = speed_up(p, plain[m], sign)
        ax.annotate("–" if ratio is None else f"{labels.number(ratio)}×", (sizes.index(m), 1.0),
                    xycoords=("data", "axes fraction"), xytext=(0, 3), ha="center", fontsize=8,
                    textcoords="offset points", color=_ACCENT, fontweight="bold")
    fig.suptitle("Distilled in few steps, undistilled in more\n"
                 "Above: how many times more the cheapest as good undistilled setting costs "
                 "(–: none is)", x=0.01, ha="left", fontsize=10)
    plot_style.name_ends(ax, ends)
    return {"": Drawn(fig, out)}


def guided(source: Source) -> dict[str, Drawn]:
    """Fig. 19: guided distillation by stage (steps of the student), undistilled dashed."""
    records = [r for r in source.of_task("guided_distillation") if source.metric in r.metrics]
    # Every stage is a student of its own, trained on from the last.
    stages: dict[tuple[str, str, int], int] = {}
    for r in records:
        i = r.identity
        cell = (i.model, i.sampler, i.steps)
        stages[cell] = max(stages.get(cell, 0), i.train_step)
    records = [r for r in records if r.identity.train_step
               == stages[r.identity.model, r.identity.sampler, r.identity.steps]]
    records = curves_lib.distinct(records)
    curves = source.curves_of(records, source.metric) if records else {}
    if not curves:
        return {}
    sizes, plain = curves_lib.models(records), _undistilled(source)
    marks = plot_style.marks(sizes)
    fig = plot_style.figure(7.2, 4.6)
    ax = fig.subplots()
    out, ends = [], []
    for (model, _), curve in sorted(curves.items(), key=lambda item: sizes.index(item[0][0])):
        points = sorted(curve, key=lambda p: p.steps)
        band = plots.curve(ax, [p.steps for p in points], points, **marks[model])
        ends.append((points[-1].steps, points[-1].value, f"{model}, distilled",
                     marks[model]["color"]))
        out += [{"network": "distilled"} | row
                for row in rows.of_curve(points, source.metric, band)]
        same = sorted((p for p in plain.get(model, ()) if p.steps in {q.steps for q in points}),
                      key=lambda p: p.steps)
        if same:
            ax.plot([p.steps for p in same], [p.value for p in same], ls=(0, (4, 2)), lw=1.1,
                    color=marks[model]["color"], marker=marks[model]["marker"], ms=4, alpha=0.7)
            ends.append((same[-1].steps, same[-1].value, f"{model}, undistilled",
                         marks[model]["color"]))
            out += [{"network": "undistilled"} | row
                    for row in rows.of_curve(same, source.metric)]
    ax.set_xscale("log")
    plot_style.step_ticks(ax, sorted({p.steps for c in curves.values() for p in c}))
    plots.scale_y(ax, [p for c in curves.values() for p in c])
    ax.set_xlabel("steps of the student (its stage of distillation)")
    plot_style.best_arrow(ax, source.metric)
    ax.set_title("Guided distillation by stage")
    plot_style.name_ends(ax, ends)
    return {"": Drawn(fig, out)}
