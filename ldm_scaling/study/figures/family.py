"""Table 1: the family, its cost and its quality, with the paper's own figures beside.

Two figures: the table, and what a network of each size costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm_scaling.models import analytic, zoo
from ldm_scaling.models.zoo import Published
from ldm_scaling.study import curves, labels, plot_style
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import Record

MISPRINT = "39m"
"""Its printed GFLOPs contradict its own printed norm. cost; XLA counts about 56.6."""

_PAPER_STEPS = 50
_NONE = Published(None)


def table(source: Source) -> dict[str, Drawn]:
    """Tab. 1: every size at the most steps that all share (the paper's 50 if all have them)."""
    if not source.samplers:
        return {}
    sampler = source.samplers[0]
    mine = {m: source.curves[m, sampler] for m in source.sizes if (m, sampler) in source.curves}
    common = set.intersection(*({p.steps for p in curve} for curve in mine.values()))
    if not common:
        return {}
    steps = _PAPER_STEPS if _PAPER_STEPS in common else max(common)
    at = {m: next(p for p in curve if p.steps == steps) for m, curve in mine.items()}
    # The record itself: one point may hold several measures.
    place = {
        r.identity.model: r for r in source.main
        if (r.identity.sampler, r.identity.steps, r.identity.seed_block)
        == (sampler, steps, source.report_block)
        and r.identity.model in at and r.identity.guidance == at[r.identity.model].guidance
    }
    shown = source.pair(list(place.values()))
    rows = [_row(place[m], shown) for m in mine]
    how = f"{labels.sampler(sampler)}, {labels.steps(steps)}"
    rates = {r.identity.guidance for r in source.main}
    at_rate = "each at its best" if len(rates) > 1 else "at one rate of"
    title = f"The family: {how}, {at_rate} guidance"
    return {"": Drawn(_draw(rows, shown, title), rows)}


def _row(r: Record, shown: Sequence[str]) -> dict[str, object]:
    member = zoo.MEMBERS.get(r.identity.model)
    printed = (member and member.published) or _NONE
    out = {
        "model": r.identity.model, "base_channels": r.base_channels, "params": r.params,
        "paper_params_M": printed.params, "gflops": r.gflops, "paper_gflops": printed.gflops,
        "norm_cost": r.norm_cost, "paper_norm_cost": printed.norm_cost,
        "sampler": r.identity.sampler, "steps": r.identity.steps, "guidance": r.identity.guidance,
        "images": r.identity.num_images,
    }
    for name in shown:
        low, high = r.intervals.get(name, (None, None))
        out |= {name: r.metrics.get(name), f"{name}_low": low, f"{name}_high": high}
    return out | {"paper_fid": printed.fid, "paper_clip": printed.clip}


def _draw(rows: Sequence[Mapping], shown: Sequence[str], title: str) -> Figure:
    printed = any(row["paper_params_M"] is not None for row in rows)
    columns: list[tuple[str, str, float, list[str]]] = []

    def add(head: str, sub: str, width: float, texts: Sequence[str]) -> None:
        columns.append((head, sub, width, list(texts)))

    def paper(key: str, digits: int) -> None:
        if printed:
            mark = {MISPRINT: "†"} if key == "paper_gflops" else {}
            add("", "paper", 0.75, [
                "" if row[key] is None else f"{row[key]:,.{digits}f}{mark.get(row['model'], '')}"
                for row in rows])

    names = [row["model"] for row in rows]
    add("size", "", max(0.085 * max(map(len, names)), 0.8), names)
    add("c", "", 0.5, [str(row["base_channels"]) for row in rows])
    add("parameters", "", 1.0, [labels.count(row["params"]) for row in rows])
    paper("paper_params_M", 1)
    add("GFLOPs", "a call", 0.9, [labels.number(row["gflops"]) for row in rows])
    paper("paper_gflops", 1)
    add("norm. cost", "", 0.9, [f"{row['norm_cost']:.2f}" for row in rows])
    paper("paper_norm_cost", 2)
    add("guidance", "", 0.85, [f"{row['guidance']:g}" for row in rows])
    for name in shown:
        texts = []
        for row in rows:
            value, low, high = (row[name], row[f"{name}_low"], row[f"{name}_high"])
            texts.append("" if value is None else labels.number(value) if low is None else
                         f"{labels.number(value)} {labels.interval(low, high)}")
        add(labels.measure(name).short, labels.measure(name).better + " is better",
            max(0.078 * max(map(len, texts)) + 0.25, 1.35), texts)
    if printed:
        add("FID", "paper", 0.75, [_text(row["paper_fid"], 2) for row in rows])
        add("CLIP", "paper", 0.75, [_text(row["paper_clip"], 3) for row in rows])
    step, top = 0.25, 0.95
    noted = any("†" in text for *_, texts in columns for text in texts)
    width = 0.4 + sum(w for _, _, w, _ in columns)
    height = top + step * len(rows) + (0.5 if noted else 0.2)
    fig = plot_style.figure(width, height)
    fig.set_layout_engine("none")
    fig.text(0.2 / width, 1 - 0.22 / height, title, fontsize=11, fontweight="bold", va="center")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    x = 0.2
    for k, (head, sub, w, texts) in enumerate(columns):
        x += w
        left = k == 0
        place, align = (x - w, "left") if left else (x - 0.1, "right")
        soft = plot_style.SOFT if sub == "paper" else plot_style.INK
        ax.text(place, height - 0.5, head, ha=align, va="center", fontsize=9, fontweight="bold",
                color=soft)
        ax.text(place, height - 0.68, sub, ha=align, va="center", fontsize=7,
                color=plot_style.SOFT)
        for row, text in enumerate(texts):
            ax.text(place, height - top - step * (row + 0.35), text, ha=align, va="center",
                    fontsize=8.5, color=soft, fontweight="bold" if left else "normal")
    for y, weight in ((height - 0.8, 1.0), (height - top - step * len(rows) + 0.05, 0.6)):
        ax.plot([0.2, x], [y, y], color=plot_style.INK, lw=weight)
    if noted:
        ax.text(0.2, 0.2, "† a misprint of the paper: its own norm. cost beside it needs about "
                "56.6 GFLOPs", fontsize=7.5, color=plot_style.SOFT, va="center")
    return fig


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# --- what a size costs ----------------------------------------------------------------------------

RECORDS, BY_HAND, PRINTED = "this study, counted by XLA", "the paper's, counted by hand", "Table 1"


def cost(source: Source) -> dict[str, Drawn]:
    """GFLOPs of a network call by parameters: this study's sizes, and beside them the paper's
    family, as its layers' products say and as Table 1 prints it."""
    mine = {r.identity.model: r for r in source.main}
    if not mine:
        return {}
    rows = [_size(RECORDS, m, r.params / 1e6, r.gflops, r.norm_cost)
            for m, r in ((m, mine[m]) for m in curves.models(source.main))]
    by_hand = {m.name: analytic.gflops(m.spec) for m in zoo.PAPER}
    one = by_hand[zoo.PAPER_REFERENCE]
    for m in zoo.PAPER:
        rows.append(_size(BY_HAND, m.name, m.published.params, by_hand[m.name],
                          by_hand[m.name] / one))
    for m in zoo.PAPER:
        printed = m.published
        rows.append(_size(PRINTED, m.name, printed.params, printed.gflops, printed.norm_cost))
    return {"": Drawn(_draw_cost(rows), rows)}


def _size(
    source: str, model: str, params: float, gflops: float, norm_cost: float
) -> dict[str, object]:
    return {"source": source, "model": model, "params_M": params, "gflops": gflops,
            "norm_cost": norm_cost, "misprint": (source, model) == (PRINTED, MISPRINT)}


def _draw_cost(rows: Sequence[Mapping]) -> Figure:
    fig = plot_style.figure(7.6, 4.6)
    ax = fig.add_subplot()
    of = {source: [r for r in rows if r["source"] == source]
          for source in (RECORDS, BY_HAND, PRINTED)}
    at = {source: ([r["params_M"] for r in found], [r["gflops"] for r in found])
          for source, found in of.items()}
    ax.plot(*at[BY_HAND], color=plot_style.SOFT, lw=1.2, marker=".", ms=5, label=BY_HAND, zorder=2)
    ax.plot(*at[PRINTED], ls="", marker="o", ms=9, mfc="none", mec=plot_style.INK, mew=1.1,
            label="the paper's, as Table 1 prints it", zorder=3)
    marks = plot_style.marks([r["model"] for r in of[RECORDS]])
    for k, r in enumerate(of[RECORDS]):
        ax.plot(r["params_M"], r["gflops"], ls="", ms=7, zorder=4, **marks[r["model"]],
                label=None if k else RECORDS)
    plot_style.log_x(ax)
    plot_style.log_y(ax)
    ax.set_xlabel("parameters (millions)")
    ax.set_ylabel("GFLOPs of a network call")
    ax.set_title("What a size costs")
    ax.legend(loc="upper left")
    # To both sides in turn: the family's upper half is dense.
    for k, r in enumerate(r for r in of[BY_HAND] if r["model"] not in marks):
        _name(ax, r, (-8, 4) if k % 2 else (8, -10), "right" if k % 2 else "left")
    wrong = next(r for r in of[PRINTED] if r["misprint"])
    one = next(r for r in of[PRINTED] if r["model"] == zoo.PAPER_REFERENCE)
    ax.annotate(
        f"a misprint: {wrong['gflops']:g} for {MISPRINT} repeats its FID;\nits own norm. cost of "
        f"{wrong['norm_cost']:g} is {wrong['norm_cost'] * one['gflops']:.0f}",
        (wrong["params_M"], wrong["gflops"]), textcoords="offset points", xytext=(34, 0),
        va="center", fontsize=8, color=plot_style.INK,
        arrowprops={"arrowstyle": "->", "color": plot_style.INK, "lw": 0.9, "shrinkB": 6},
    )
    # Below: the family's line rises through each of its sizes.
    plot_style.name_ends(ax, [
        (r["params_M"], r["gflops"], r["model"], marks[r["model"]]["color"]) for r in of[RECORDS]
    ], below=7)
    return fig


def _name(ax: Axes, row: Mapping, offset: tuple[int, int], align: str) -> None:
    ax.annotate(row["model"], (row["params_M"], row["gflops"]), textcoords="offset points",
                xytext=offset, ha=align, fontsize=7.5, color=plot_style.SOFT)
