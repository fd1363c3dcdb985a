"""Image grids: what every size draws from the same captions at (nearly) the same cost (Fig. 10)."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ldm_scaling.study import labels, plot_style
from ldm_scaling.study.curves import Cell, Curves
from ldm_scaling.study.records import Record

Images = Mapping[Cell, np.ndarray]
"""(model, sampler, steps) -> uint8 images (n, H, W, 3) of the same n captions."""

_NEAR = 1.35
_APART = 1.7


@dataclasses.dataclass(frozen=True)
class EqualCost:
    """Cells of several sizes that cost nearly the same.

    Attributes:
      cost: the cost aimed at.
      cells: one cell per size, smallest size first, each with its own cost.
    """

    cost: float
    cells: tuple[tuple[Cell, float], ...]


def costs(records: Sequence[Record], wanted: Collection[Cell]) -> dict[Cell, float]:
    """Sampling cost of those `wanted` cells that the records know."""
    known = {(r.identity.model, r.identity.sampler, r.identity.steps): r.cost for r in records}
    return {cell: known[cell] for cell in sorted(wanted) if cell in known}


def equal_cost(cells: Mapping[Cell, float], sampler: str, sizes: Sequence[str]) -> list[EqualCost]:
    """The costs at which most sizes can be compared, cheapest first.

    At each candidate cost every size enters with the step count nearest to it, if that is within
    a factor of 1.35. The four costs with the most sizes are kept (closest match first), at
    least a factor of 1.7 apart.
    """
    candidates = []
    mine = {cell: cost for cell, cost in cells.items() if cell[1] == sampler}
    for target in sorted(set(mine.values())):
        row, error = [], 0.0
        for model in sizes:
            near = [(abs(math.log(cost / target)), cell, cost) for cell, cost in mine.items()
                    if cell[0] == model]
            if near and min(near)[0] <= math.log(_NEAR):
                off, cell, cost = min(near)
                row.append((cell, cost))
                error += off
        if len(row) > 1:
            candidates.append((-len(row), error / len(row), target, tuple(row)))
    kept: list[EqualCost] = []
    for _, _, target, row in sorted(candidates):
        if len(kept) < 4 and all(
            abs(math.log(target / k.cost)) >= math.log(_APART) for k in kept
        ):
            kept.append(EqualCost(target, row))
    return sorted(kept, key=lambda k: k.cost)


def draw(
    rows: Sequence[EqualCost],
    images: Images,
    captions: Sequence[str],
    curves: Curves,
    metric: str,
) -> Figure:
    """One block per cost, one row per size, one column per caption.

    Args:
      rows: from `equal_cost`.
      images: the pictures of their cells.
      captions: of the columns; may be empty.
      curves: give the measured quality written beside each row, where known.
      metric: the measure of the curves.
    """
    measure = labels.measure(metric)
    n = max(len(images[cell]) for row in rows for cell, _ in row.cells)
    points = {(p.model, p.sampler, p.steps): p for c in curves.values() for p in c}
    heights: list[float] = []
    for row in rows:
        heights += [0.42] + [1.0] * len(row.cells)
    width, label_width, side = 1.9 + n * 1.08, 1.9, 1.08
    top = 0.75 if captions else 0.35
    fig = plot_style.figure(width, top + side * sum(heights))
    fig.set_layout_engine("none")
    total = top + side * sum(heights)
    y = total - top
    fig.text(0.1 / width, (y + 0.04) / total, labels.sampler(rows[0].cells[0][0][1]), fontsize=11,
             fontweight="bold", color=plot_style.SOFT, va="bottom")
    for k, caption in enumerate(captions[:n]):
        words = textwrap.shorten(caption, 54, placeholder=" …")
        fig.text((label_width + (k + 0.5) * side) / width, (y + 0.04) / total,
                 "\n".join(textwrap.wrap(words, 15)), ha="center", va="bottom", fontsize=7.5,
                 color=plot_style.SOFT)
    for row in rows:
        y -= 0.42 * side
        fig.text(0.1 / width, (y + 0.1) / total, f"Cost about {labels.number(row.cost)}",
                 fontsize=11, fontweight="bold")
        known = [points[cell] for cell, _ in row.cells if cell in points]
        best = min(known, key=lambda p: measure.sign * p.value, default=None)
        for cell, cost in row.cells:
            y -= side
            lines = [labels.steps(cell[2]), f"cost {labels.number(cost)}"]
            if cell in points:
                star = " ★ best" if points[cell] is best and len(known) > 1 else ""
                lines.append(f"{measure.short} {labels.number(points[cell].value)}{star}")
            fig.text(0.1 / width, (y + 0.78 * side) / total, cell[0], fontsize=10, va="center",
                     fontweight="bold")
            fig.text(0.1 / width, (y + 0.36 * side) / total, "\n".join(lines), fontsize=8,
                     va="center", color=plot_style.SOFT)
            for k, image in enumerate(images[cell][:n]):
                ax = fig.add_axes(((label_width + k * side) / width, y / total,
                                   0.96 * side / width, 0.96 * side / total))
                ax.imshow(image, interpolation="nearest")
                ax.set_axis_off()
    return fig
