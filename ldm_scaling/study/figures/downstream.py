"""Figures 6 and 12: DreamBooth by size, and super-resolution against sampling cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm_scaling.study import baselines, labels, plot_style, plots
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import Record

FEW_STEPS = 20
"""Fig. 12 parts step counts here."""


def super_resolution(source: Source) -> dict[str, Drawn]:
    """Fig. 12: distance against sampling cost, few steps and many steps apart, a picture for each
    image-conditioned task."""
    found = {part: _restored(source, source.distinct(own))
             for part, own in source.restoring.items()}
    return {part: drawn for part, drawn in found.items() if drawn is not None}


def _restored(source: Source, records: Sequence[Record]) -> Drawn | None:
    measures = [m for m in source.measures(records) if labels.measure(m).better == "lower"]
    if not measures:
        return None
    metric = measures[0]
    curves = source.curves_of([r for r in records if metric in r.metrics], metric)
    names = curves_lib.drawn(records, curves)
    if not names:
        return None
    entries = plots.sized(records)
    marks = plot_style.marks(list(entries))
    mine = {m: curves[m, names[0]] for m in entries if (m, names[0]) in curves}
    steps = [p.steps for curve in mine.values() for p in curve]
    parts = [
        (f"{min(few)} to {max(few)} steps" if few[1:] else labels.steps(few[0]), few)
        for few in (sorted(n for n in set(steps) if n <= FEW_STEPS),
                    sorted(n for n in set(steps) if n > FEW_STEPS)) if few
    ]
    fig = plot_style.figure(0.8 + 5.2 * len(parts), 4.6)
    out, named = [], []
    for ax, (title, shown) in zip(fig.subplots(1, len(parts), squeeze=False)[0], parts,
                                  strict=True):
        starts, ends, all_points = [], [], []
        for model, curve in mine.items():
            points = [p for p in curve if p.steps in shown]
            if not points:
                continue
            band = plots.curve(ax, [p.cost for p in points], points, **marks[model])
            for some, at in ((starts, 0), (ends, -1)):
                some.append((points[at].cost, points[at].value, model, marks[model]["color"]))
            out += [{"panel": title} | row for row in rows.of_curve(points, metric, band)]
            all_points += points
        plots.scale_y(ax, all_points)
        baselines.draw(ax, baselines.fitting(source.baselines, records), metric)
        plot_style.log_x(ax)
        ax.set_title(title)
        ax.set_xlabel(labels.AXES["cost"] + " (log scale)")
        plot_style.best_arrow(ax, metric)
        named.append((ax, starts, ends, True))
    plot_style.title(fig, f"{labels.task(records[0].task)}, {labels.sampler(names[0])}")
    for names in named:
        plot_style.name_curves(*names)
    return Drawn(fig, out)


def dreambooth(source: Source) -> dict[str, Drawn]:
    """Fig. 6, in numbers: fidelity to subject and prompt of every size, at the most steps."""
    taught = curves_lib.one_setting(source.of_task("dreambooth"), source.settings)
    records = source.distinct(_one_lesson(taught, source.settings))
    measures = source.measures(records)
    sizes = curves_lib.models(records)
    panels = {}
    for metric in measures:
        curves = source.curves_of([r for r in records if metric in r.metrics], metric)
        names = curves_lib.drawn(records, curves)
        points = [max(curves[m, names[0]], key=lambda p: p.steps) for m in sizes
                  if names and (m, names[0]) in curves]
        if points:
            panels[metric] = points
    if not panels:
        return {}
    fig = plot_style.figure(max(0.6 + 4.2 * len(panels), 5.4), 4.0)
    out = []
    for ax, (metric, points) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                    strict=True):
        x = [sizes.index(p.model) for p in points]
        band = plots.curve(ax, x, points, color=plot_style.ramp(2)[0], marker="o")
        out += rows.of_curve(points, metric, band)
        by_size(ax, sizes)
        plot_style.best_arrow(ax, metric)
    p = points[-1]
    plot_style.title(fig, f"DreamBooth, {labels.sampler(p.sampler)}, {labels.steps(p.steps)}")
    return {"": Drawn(fig, out)}


_Lesson = tuple[str, int]


def _lesson(record: Record) -> _Lesson:
    return record.identity.reference_hash, record.identity.train_step


def _lessons(
    records: Sequence[Record], settings: Sequence[str]
) -> tuple[_Lesson, dict[_Lesson, dict[str, str]]]:
    """Of some records, one at least, each set of subjects and measures with the sizes that were
    taught it and a network of each; and the set that is shown: that of `settings`, else that of
    most sizes, the first by its hash."""
    taught: dict[_Lesson, dict[str, str]] = {}
    for r in sorted(records, key=lambda r: r.identity.model_hash):
        taught.setdefault(_lesson(r), {}).setdefault(r.identity.model, r.identity.model_hash)
    shown = min(taught, key=lambda k: (k[0] not in settings, -len(taught[k]), -k[1], k))
    return shown, taught


def _one_lesson(records: Sequence[Record], settings: Sequence[str]) -> list[Record]:
    """Those of one set of subjects and measures, where a workdir holds several."""
    if not records:
        return []
    shown, taught = _lessons(records, settings)
    return [r for r in records if _lesson(r) == shown
            and r.identity.model_hash == taught[shown][r.identity.model]]


def other_lessons(records: Sequence[Record], settings: Sequence[str] = ()) -> list[str]:
    """What `dreambooth` leaves out of the records of one way of teaching, in a sentence."""
    own = curves_lib.one_setting([r for r in records if r.task == "dreambooth"], settings)
    if not own:
        return []
    (shown, _), taught = _lessons(own, settings)
    others = [f"scores_{hash[:8]}.json" for hash in sorted({hash for hash, _ in taught} - {shown})]
    return [
        f"{labels.task('dreambooth')}: the records are of {len(others) + 1} sets of subjects, "
        f"prompts and measures, of which that of scores_{shown[:8]}.json is used, and not "
        f"{labels.listing(others, 'or')}."
    ] if others else []


def by_size(ax, sizes) -> None:
    """Ticks of an axis on which sizes stand side by side."""
    ax.set_xticks(np.arange(len(sizes)), sizes, rotation=45 if len(sizes) > 6 else 0)
    ax.set_xlim(-0.4, len(sizes) - 0.6)
    ax.set_xlabel("size")
