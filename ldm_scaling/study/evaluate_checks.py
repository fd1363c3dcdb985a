"""What must hold before images are scored: enough of them, and of the right kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import fidelity
from ldm_scaling.models import lpips
from ldm_scaling.study import references
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.scores import Row

if TYPE_CHECKING:
    from ldm_scaling.study.evaluate import Task

_REAL = ("statistics", "features", "subjects")
# The fewest images of either side with which a metric has a value; 1 for those that are not here.
LEAST = {"inception_score": 10, "precision": 4, "recall": 4, "density": 6, "coverage": 6,
          "fid": 2, "fid_infinity": 2, "fd_dinov2": 2, "kid": 2}  # fmt: skip
# The fewest generated ones, where that is another number: see `infinity.frechet_infinity`.
_LEAST_GENERATED = {"fid_infinity": 10_000}
# Pixels that a side of a pair needs; 1 for those that are not here.
_SIDES = {"lpips": lpips.MIN_SIDE, "ssim": fidelity.WINDOW, "ssim_y": fidelity.WINDOW}


def takes_real(row: Row) -> bool:
    """Whether a score holds images against real ones."""
    return row.paired or row.definition.against in _REAL


def counts_and_kinds(rows: Sequence[Row], task: Task) -> None:
    """Before anything is read.

    Raises:
      UserError: for too few images on either side, and for real images, captions or subjects that
        a score needs and the task lacks.
    """
    for row in rows:
        against, real = row.definition.against, task.real
        least = LEAST.get(row.metric, 1)
        _check_count(row, _LEAST_GENERATED.get(row.metric, least), task.generated, "images")
        if takes_real(row) and isinstance(real, ImageSet):
            _check_count(row, least, real, "real images")
        if real is None and takes_real(row):
            raise UserError(
                f"{row.name} holds images against others: give a second folder, or a file of "
                "reference statistics where it takes one"
            )
        if row.captioned and task.captions is None:
            raise UserError(
                f"{row.name} needs the images' captions: name them with --captions=FILE, one line "
                "for each image in the order of names, or a .json of names and captions"
            )
        if against == "subjects" and task.subjects is None:
            raise UserError(
                f"{row.name} needs images of known subjects: use --protocol=dreambench"
            )
        if isinstance(real, Path):
            none = against == "features" and references.is_ours(real)
            if row.paired or none or against == "subjects":
                raise UserError(
                    f"{row.name} needs the real images themselves, not the statistics in {real}: "
                    "give their folder"
                )
    named = {row.extractor for row in rows if row.definition.against == "statistics"}
    if isinstance(task.real, Path) and len(named) > 1 and task.real.exists():
        ours = references.is_ours(task.real)
        what = "are of one network" if ours else "do not say how they were made"
        raise UserError(
            f"the statistics in {task.real} {what}, and {', '.join(sorted(named))} are asked for: "
            "name the one score that they are for, e.g. --metrics=fid_pytorch for pytorch-fid's "
            "files, fid_clean for clean-fid's, fid_tf2015 for those of ADM and EDM"
        )


def _check_count(row: Row, least: int, images: ImageSet, what: str) -> None:
    if len(images) < least:
        raise UserError(
            f"{row.name} needs {least:,} {what}, there are {len(images):,} in "
            f"{images.folder.root}: give more, or ask for other scores"
        )


def sides(rows: Sequence[Row], images: ImageSet) -> None:
    """Before pairs are measured.

    Raises `UserError` for images that are too small.
    """
    shortest = [images.side or min(size) for size in images.folder.sizes]
    small = int(np.argmin(shortest))
    for row in rows:
        least = _SIDES.get(row.metric, 1)
        if shortest[small] < least:
            raise UserError(
                f"{images.folder.path(small)} is scored at {shortest[small]} px, and {row.name} "
                f"needs {least}: give larger images, or --side={least} or more"
            )


def width(row: Row, file: Path, have: int, wanted: int) -> None:
    """A published file does not say what network it is of; the width of its features may tell.

    Raises `UserError` unless it is that of the generated images' features.
    """
    if have != wanted:
        raise UserError(
            f"{file} is of features of width {have}, those of {row.name} have {wanted}: give a "
            f"file made with {row.extractor}, or name the score that it is for"
        )
