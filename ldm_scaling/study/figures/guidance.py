"""Figure 7: the best guidance rate of every size and step count."""

from __future__ import annotations

from collections import defaultdict

import matplotlib
import numpy as np

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, plot_style
from ldm_scaling.study.figures.source import Drawn, Source

NEAR = 0.01
"""Rates whose measure is within this share of the best are named beside it."""


def best_rates(source: Source) -> dict[str, Drawn]:
    """Fig. 7: one panel per sampler, sizes over steps, the best rate in each cell; below it the
    rates that do nearly as well, for a dish is flat at its bottom."""
    records = [r for r in source.main if r.identity.seed_block == source.select_block
               and source.metric in r.metrics]
    sign = labels.measure(source.metric).sign
    choice = curves_lib.best_guidance(records, source.metric, source.select_block)
    cells: dict[curves_lib.Cell, list] = defaultdict(list)
    for r in records:
        cells[r.identity.model, r.identity.sampler, r.identity.steps].append(r)
    if not any(len(rates) > 1 for rates in cells.values()):
        return {}
    out = []
    near: dict[curves_lib.Cell, tuple[float, float]] = {}
    for cell, rate in choice.items():
        best = next(r for r in cells[cell] if r.identity.guidance == rate)
        value = best.metrics[source.metric]
        # In a race only rates with as many images compare.
        alike = [r.identity.guidance for r in cells[cell]
                 if r.identity.num_images == best.identity.num_images
                 and sign * (r.metrics[source.metric] - value) <= NEAR * abs(value)]
        near[cell] = min(alike), max(alike)
        out.append({
            "model": cell[0], "sampler": cell[1], "steps": cell[2], "best_guidance": rate,
            "near_low": near[cell][0], "near_high": near[cell][1], "measure": source.metric,
            "value": value, "images": best.identity.num_images,
        })
    return {"": Drawn(_draw(source, choice, near), out)}


def _draw(source, choice, near):
    names = curves_lib.samplers([r for r in source.main if any(
        r.identity.sampler == s for _, s, _ in choice)])
    rates = sorted(set(choice.values()))
    columns = {s: sorted({n for _, name, n in choice if name == s}) for s in names}
    sizes = [m for m in source.sizes if any(m == model for model, _, _ in choice)]
    norm = plot_style.shades(rates)
    cmap = matplotlib.colormaps["cividis"]
    wide = [0.62 * len(c) for c in columns.values()]
    fig = plot_style.figure(max(1.6 + sum(max(w, 1.9) + 0.25 for w in wide), 6.8),
                            1.8 + 0.42 * len(sizes))
    axes = fig.subplots(1, len(names), sharey=True, squeeze=False, width_ratios=wide)[0]
    for ax, sampler in zip(axes, names, strict=True):
        steps = columns[sampler]
        grid = np.full((len(sizes), len(steps)), np.nan)
        for (model, _, n), rate in ((c, w) for c, w in choice.items() if c[1] == sampler):
            x, y = steps.index(n), sizes.index(model)
            grid[y, x] = rate
            low, high = near[model, sampler, n]
            ink = plot_style.ink_on(cmap(norm(rate)))
            ax.text(x + 0.5, y + (0.62 if low < high else 0.5), f"{rate:g}", ha="center",
                    va="center", fontsize=9, fontweight="bold", color=ink)
            if low < high:
                ax.text(x + 0.5, y + 0.25, f"{low:g}–{high:g}", ha="center", va="center",
                        fontsize=6.5, color=ink)
        ax.pcolormesh(grid, cmap=cmap, norm=norm, edgecolors="white", linewidth=1.2)
        ax.set_title(labels.sampler(sampler))
        ax.set_xticks(np.arange(len(steps)) + 0.5, [str(n) for n in steps])
        ax.set_yticks(np.arange(len(sizes)) + 0.5, sizes)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("size")
    fig.supxlabel("sampling steps", fontsize=10)
    name = labels.measure(source.metric).short
    fig.suptitle(f"Best guidance rate by {name}\n", x=0.01, ha="left")
    fig.text(0.01, 0.995 - 0.26 / fig.get_figheight(),
             f"small: rates within {100 * NEAR:g}% of the best",
             va="top", fontsize=9, color=plot_style.SOFT)
    return fig
