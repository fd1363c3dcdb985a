"""Figures 3, 4 and 17: quality against training and fine-tuning compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ldm_scaling.study import baselines, labels, plot_style, plots
from ldm_scaling.study.figures import rows
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import trends
from ldm_scaling.study.statistics.trends import Network

_LEAST = 3


def training(source: Source) -> dict[str, Drawn]:
    """Fig. 3: the main measure and one more against training compute, a line for each size."""
    records = source.of_task("text_to_image")
    drawn = _draw(source, records, source.pair(records), "Quality and training compute",
                  labels.AXES["compute"])
    return {} if drawn is None else {"": drawn}


def fine_tuning(source: Source) -> dict[str, Drawn]:
    """Fig. 4: distances of restored pictures against fine-tuning compute, a picture for each
    task."""
    return _restored(source, lambda name: name not in _SCORES, 3)


def fine_tuning_score(source: Source) -> dict[str, Drawn]:
    """Fig. 17: their inception score against fine-tuning compute."""
    return _restored(source, lambda name: name in _SCORES, len(_SCORES))


def _restored(source: Source, shown: Callable[[str], bool], most: int) -> dict[str, Drawn]:
    out = {}
    for part, records in source.restoring.items():
        measures = [m for m in source.measures(records) if shown(m)][:most]
        title = labels.task(records[0].task)
        if (drawn := _draw(source, records, measures, title, _FINE_TUNING)) is not None:
            out[part] = drawn
    return out


_SCORES = ("inception_score", "label_score_effnetlite0")
_FINE_TUNING = "fine-tuning compute\n= GFLOPs of a network call × iterations"


def _draw(
    source: Source, records: Sequence[Record], measures: Sequence[str], title: str, axis: str
) -> Drawn | None:
    """One panel for each measure that three or more different computes hold; None without any."""
    blocks = source.blocks(records)
    panels: dict[str, list[Network]] = {}
    for name in measures:
        own = [r for r in records if name in r.metrics]
        held = own and all(source.metric in r.metrics for r in own)
        chooses = source.chooser(source.distinct(own)) if held else None
        found = trends.networks(own, name, *blocks, choose_by=chooses)
        if len({round(n.compute, 9) for n in found}) >= _LEAST:
            panels[name] = found
    if not panels:
        return None
    entries = plots.sized(records)
    marks = plot_style.marks(list(entries))
    fig = plot_style.figure(max(5.6 * len(panels), 6.6), 4.6)
    out: list[Mapping[str, object]] = []
    named = []
    for ax, (name, found) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                 strict=True):
        starts: list[plot_style.End] = []
        ends: list[plot_style.End] = []
        for model in entries:
            mine = [n for n in found if n.model == model]
            if not mine:
                continue
            points = [n.point for n in mine]
            band = plots.curve(ax, [n.compute for n in mine], points, **marks[model])
            for some, at in ((starts, 0), (ends, -1)):
                some.append((mine[at].compute, points[at].value, model, marks[model]["color"]))
            out += [
                {"model": n.model, "params": n.params, "gflops": n.gflops,
                 "train_step": n.train_step, "compute": n.compute}
                | rows.of_point(n.point, name, band, k) for k, n in enumerate(mine)
            ]
        plots.scale_y(ax, [n.point for n in found])
        baselines.draw(ax, baselines.fitting(source.baselines, records), name)
        plot_style.log_x(ax)
        ax.set_xlabel(f"{axis} (log scale)")
        plot_style.best_arrow(ax, name)
        named.append((ax, starts, ends, labels.measure(name).better == "lower"))
    how = found[0].point
    plot_style.title(fig, f"{title}: {labels.sampler(how.sampler)}, {labels.steps(how.steps)}")
    for names in named:
        plot_style.name_curves(*names)
    return Drawn(fig, out)
