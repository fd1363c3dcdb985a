"""Rows of the CSV files: the numbers of the records, unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_scaling.study.curves import Point
from ldm_scaling.study.statistics.bands import Band


def of_point(point: Point, measure: str, band: Band | None = None, place: int = 0) -> dict:
    """One point with its interval and, at its place along the curve, the curve's band."""
    return {
        "model": point.model, "sampler": point.sampler, "steps": point.steps,
        "guidance": point.guidance, "cost": point.cost, "seconds": point.seconds or None,
        "images": point.num_images, "measure": measure, "value": point.value, "low": point.low,
        "high": point.high,
        "band_low": None if band is None else float(band.all_low_P[place]),
        "band_high": None if band is None else float(band.all_high_P[place]),
    }


def of_curve(points: Sequence[Point], measure: str, band: Band | None = None) -> list[dict]:
    """Every point of a curve."""
    return [of_point(p, measure, band, k) for k, p in enumerate(points)]


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """As CSV. What a row does not have stays empty."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
