"""Page data: what the report's charts and tables show, as plain values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, pricing, winners
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.labels import Measure
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import bands

_DIGITS = 6

# One marker per size, in the order of the sizes: SVG paths about the origin.
MARKS = (
    "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.4-4.4H4.4V4.4H-4.4Z", "M0-6.2L5.2 0L0 6.2L-5.2 0Z",
    "M0-5.6L5.6 4.6H-5.6Z", "M0 5.6L5.6-4.6H-5.6Z", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "M-6-3L-3-6L0-3L3-6L6-3L3 0L6 3L3 6L0 3L-3 6L-6 3L-3 0Z",
    "M0-6.5L1.9-2.2L6.4-2L2.9 1.1L4 5.6L0 3.2L-4 5.6L-2.9 1.1L-6.4-2L-1.9-2.2Z",
)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def charts(records: Sequence[Record], metric: str, select: int, report: int) -> dict[str, Any]:
    """Everything that the interactive charts draw, ready for JSON.

    Args:
      records: distinct ones.
      metric: the measure that chooses the guidance and decides the winners.
      select: seed block that chooses.
      report: seed block that is reported.

    Returns:
      A dictionary. `incomparable` says why nothing is drawn against seconds, where they do not
      compare; without it `winners` are by seconds too, and `untimed` says what has none and what
      speaks against the others'.
    """
    incomparable = pricing.incomparable(records)
    units = {"cost": "normalised cost × network calls"}
    units |= {} if incomparable else {"seconds": "seconds"}
    shown = [labels.measure(name) for name in curves_lib.measures(records)]
    sizes, arms = curves_lib.models(records), curves_lib.samplers(records)
    params = {r.identity.model: r.params for r in records}
    points = []
    for m in shown:
        for curve in curves_lib.quality_curves(records, m.name, metric, select, report).values():
            band = bands.of_points(curve)
            points += [
                {"measure": m.name, "model": p.model, "sampler": p.sampler, "steps": p.steps,
                 "guidance": p.guidance, "cost": _round(p.cost),
                 "seconds": _round(p.seconds or None),
                 "value": _round(p.value), "low": _round(p.low), "high": _round(p.high),
                 "band_low": band and _round(band.all_low_P[k]),
                 "band_high": band and _round(band.all_high_P[k])}
                for k, p in enumerate(curve)
            ]
    best = {m.name: curves_lib.best_guidance(records, m.name, select) for m in shown}
    cells = []
    for r in (r for r in records if r.identity.seed_block == select):
        i = r.identity
        here = [m.name for m in shown if m.name in r.metrics]
        cells.append(
            {"model": i.model, "sampler": i.sampler, "steps": i.steps, "guidance": i.guidance,
             "cost": _round(r.cost), "seconds": _round(r.seconds_per_image or None),
             "values": {n: _round(r.metrics[n]) for n in here},
             "best": {n: best[n][i.model, i.sampler, i.steps] == i.guidance for n in here}}
        )
    main = curves_lib.quality_curves(records, metric, None, select, report)
    by = {"cost": main, "seconds": pricing.with_seconds(main)}
    lacking = pricing.without_seconds(p for curve in main.values() for p in curve)
    other = labels.traded(metric, [m.name for m in shown])
    return {
        "metric": metric,
        "models": [{"name": m, "params": labels.count(params[m])} for m in sizes],
        "samplers": [{"name": s, "label": labels.sampler(s)} for s in arms],
        "steps": sorted({r.identity.steps for r in records}),
        "measures": [{"name": m.name, "label": m.label, "short": m.short, "better": m.better}
                     for m in shown],
        "axes": labels.AXES,
        "incomparable": incomparable,
        "untimed": "" if incomparable else " ".join(
            filter(None, [lacking, pricing.doubt(records)])),
        "ramp": [[round(255 * v) for v in matplotlib.colormaps["viridis"](k / 8)[:3]]
                 for k in range(9)],
        "points": points,
        "cells": cells,
        "trade": [metric, other] if other else None,
        "winners": [
            {"axis": axis, "sampler": sampler or "", "unit": unit,
             "budgets": [_budget(w) for w in won]}
            for axis, unit in units.items()
            for sampler in (*arms, None)
            if (won := winners.winner_by_budget(
                by[axis], metric, sizes, axis, None if sampler is None else {sampler}))
        ],
    }


def _budget(won: winners.Winner) -> dict[str, Any]:
    return {
        "budget": _round(won.budget), "best": won.best.model, "complete": won.complete,
        "value": _round(won.best.point.value),
        "contenders": [
            {"model": c.model, "sampler": c.point.sampler, "steps": c.point.steps,
             "value": _round(c.point.value), "low": _round(c.point.low),
             "high": _round(c.point.high), "probability": _round(c.probability)}
            for c in won.contenders
        ],
    }


def winner_rows(
    curves: Curves, metric: str, sizes: Sequence[str], sampler: str
) -> list[dict[str, Any]]:
    """The winner at each budget as a row of texts; budgets that read alike share one."""
    won = winners.winner_by_budget(curves, metric, sizes, samplers={sampler})
    rows = []
    for row, same in itertools.groupby(won, _winner_row):
        budgets = [labels.number(w.budget) for w in same]
        ends = dict.fromkeys((budgets[0], budgets[-1]))
        rows.append(row | {"budget": " to ".join(ends)})
    return rows


def _winner_row(w: winners.Winner) -> dict[str, Any]:
    point, sure = w.best.point, w.best.probability
    return {
        "best": w.best.model, "complete": w.complete,
        "sizes": len(w.contenders), "steps": point.steps, "guidance": f"{point.guidance:g}",
        "value": labels.number(point.value),
        "ends": "" if point.low is None else labels.interval(point.low, point.high),
        "probability": labels.probability(sure) if w.runner_up and sure is not None else "–",
        "next": w.runner_up.model if w.runner_up else "–",
        "advantage": "–" if w.advantage is None else labels.number(w.advantage),
        "advantage_ends": labels.interval(*w.advantage_interval) if w.advantage_interval else "",
    }


def facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The study in a few numbers, for the head of the page."""
    sizes, arms = curves_lib.models(records), curves_lib.samplers(records)
    params = {r.identity.model: r.params for r in records}
    steps = sorted({r.identity.steps for r in records})
    rates = sorted({r.identity.guidance for r in records})
    images = sum(r.identity.num_images for r in records)

    def span(values: Sequence[str]) -> str:
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return [
        ("sizes", f"{len(sizes)} ({span([labels.count(params[m]) for m in sizes])} parameters)"),
        ("samplers", ", ".join(labels.sampler(s) for s in arms)),
        ("steps", span([str(s) for s in steps])),
        ("guidance rates", span([f"{w:g}" for w in rates])),
        ("records", f"{len(records):,} ({images:,} images)"),
    ]


def reference(records: Sequence[Record]) -> str:
    """What has normalised cost 1."""
    return pricing.references(records)[-1].words


def alternatives(
    records: Sequence[Record], measure: Measure, sentences: Sequence[str],
    trade: Sequence[str] | None = None,
) -> dict[str, str]:
    """What each interactive chart shows, for readers who cannot see it; `trade` as in `charts`'."""
    sizes = labels.listing(curves_lib.models(records))
    keys = "Arrow keys move between its points."
    first = sentences[1] if len(sentences) > 1 else ""
    return {
        "quality": f"Line chart: {measure.axis} against sampling cost for {sizes}. {first} {keys}",
        "winners": f"Stacked areas: the probability that each of {sizes} is the best, where there "
                   f"are replicates, against the budget. {first} {keys}",
        "heat": f"Heat maps: {measure.axis} over guidance rate and steps for {sizes}. {keys}",
        "trade": f"Line chart: {measure.axis} against {labels.measure(trade[1]).axis} as the "
                 f"guidance rate rises, for {sizes}. {keys}" if trade else "",
    }


def _cell(value: Any, text: str | None = None, small: str = "") -> dict[str, Any]:
    return {"value": value, "text": value if text is None else text, "small": small}


def _measured(record: Record, name: str) -> dict[str, Any]:
    if name not in record.metrics:
        return _cell("", "–")
    ends = record.intervals.get(name)
    value = record.metrics[name]
    return _cell(value, labels.number(value), labels.interval(*ends) if ends else "")


def table(
    records: Sequence[Record], arms: Sequence[Record], curves: Curves, report: Sequence[int]
) -> dict[str, Any]:
    """Columns, rows and filters of the table of all records.

    Args:
      records: as read; each becomes one row that carries its key.
      arms: the same records in the same order as `curves.distinct` names them.
      curves: tell which rows are the reported ones.
      report: the reported seed blocks.
    """
    chosen = {(p.model, p.sampler, p.steps, p.guidance) for c in curves.values() for p in c}
    shown = [labels.measure(name) for name in curves_lib.measures(records)]
    heads = ["size", "sampler", "steps", "guidance", "seed block", "cost", "s per image"]
    heads += [*(m.short for m in shown), "images", "parameters", "normalised cost", "spacing"]
    heads += ["record"]
    words = {"size", "sampler", "spacing", "record"}
    rows = []
    for r, arm in zip(records, arms, strict=True):
        i = r.identity
        cells = [
            _cell(i.model), _cell(i.sampler, labels.sampler(i.sampler)), _cell(i.steps),
            _cell(i.guidance, f"{i.guidance:g}"), _cell(i.seed_block),
            _cell(r.cost, labels.number(r.cost)),
            _cell(r.seconds_per_image, labels.number(r.seconds_per_image))
            if r.seconds_per_image else _cell("", "–"),
            *(_measured(r, m.name) for m in shown),
            _cell(i.num_images, f"{i.num_images:,}"), _cell(r.params, labels.count(r.params)),
            _cell(r.norm_cost, labels.number(r.norm_cost)), _cell(i.spacing), _cell(i.key),
        ]
        for cell, head in zip(cells, heads, strict=True):
            cell["word"] = head in words
        place = (i.model, arm.identity.sampler, i.steps, i.guidance)
        rows.append({"model": i.model, "sampler": labels.sampler(i.sampler), "steps": i.steps,
                     "guidance": f"{i.guidance:g}", "block": i.seed_block, "cells": cells,
                     "chosen": i.seed_block in report and place in chosen})
    rates = sorted({r.identity.guidance for r in records})
    return {
        "columns": [{"title": head, "word": head in words} for head in heads],
        "rows": rows,
        "table_filters": [
            ("model", "Size", curves_lib.models(records)),
            ("sampler", "Sampler", list(dict.fromkeys(r["sampler"] for r in rows))),
            ("steps", "Steps", sorted({r.identity.steps for r in records})),
            ("guidance", "Guidance", [f"{w:g}" for w in rates]),
            ("block", "Seed block", sorted({r.identity.seed_block for r in records})),
        ],
    }
