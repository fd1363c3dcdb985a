"""What lies beside the records in a workdir: the first pictures of each, and the loss curves."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from ldm_scaling import pictures
from ldm_scaling.data import image_folder
from ldm_scaling.errors import UserError
from ldm_scaling.study import curves
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.image_grids import Images
from ldm_scaling.study.records import TEXT_TO_IMAGE
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training.events import TRAIN, VALIDATION, read_curves

log = logging.getLogger(__name__)


def losses(workdir: Workdir, networks: Iterable[str]) -> tuple[dict[str, list], list[str]]:
    """Rows [step, train loss, validation loss or None] of every training run, see `Study.trained`,
    that is here, and a sentence on each whose curves are damaged: it is left out, as in `strip`."""
    out, lost = {}, []
    for member in networks:
        steps = defaultdict(dict)
        try:
            curve = read_curves(workdir.member(member))
        except UserError as e:
            lost.append(f"the losses of {member} are left out: {e}")
            log.warning("%s", lost[-1])
            continue
        for step, name, value in curve:
            steps[step][name] = value
        rows = [[step, values[TRAIN], values.get(VALIDATION)]
                for step, values in sorted(steps.items()) if TRAIN in values]
        if rows:
            out[member] = rows
    return out, lost


def strip(path: epath.PathLike) -> np.ndarray | None:
    """The pictures of one strip of squares, uint8 (n, H, W, 3); None where it is lost or damaged:
    a figure lacks them then, and the records say all they did."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        whole_HWC = pictures.load_png(path)
        side = whole_HWC.shape[0]
        return whole_HWC.reshape(side, -1, side, 3).swapaxes(0, 1)
    except image_folder.BROKEN as e:
        log.warning("the pictures in %s are left out: the file is damaged (%s)", os.fspath(path), e)
        return None


def first_strip(folders: Sequence[epath.PathLike], key: str) -> np.ndarray | None:
    """A record's strip, of the first folder that has it, see `strip`."""
    found = (strip(epath.Path(folder) / f"{key}.png") for folder in folders)
    return next((images_NHWC for images_NHWC in found if images_NHWC is not None), None)


def strips(folders: Sequence[epath.PathLike], source: Source) -> Images:
    """The first pictures of every point of the source's curves, on the block that stands for those
    that are reported; each in one of the folders."""
    rates = {(p.model, p.sampler, p.steps): p.guidance for c in source.curves.values() for p in c}
    own = curves.longest([r for r in source.records if r.task == TEXT_TO_IMAGE], source.settings)
    out: dict[tuple[str, str, int], np.ndarray] = {}
    # Files have the names of records, before samplers are told apart by their spacings.
    for record, arm in curves.arms(own):
        i = arm.identity
        cell = (i.model, i.sampler, i.steps)
        if i.seed_block == source.report_block and rates.get(cell) == i.guidance:
            images_NHWC = first_strip(folders, record.identity.key)
            if images_NHWC is not None:
                out[cell] = images_NHWC
    return out
