"""What lies beside the records in a workdir: the first pictures of each, and the loss curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from ldm_scaling import pictures
from ldm_scaling.study.image_grids import Images
from ldm_scaling.study.records import Record
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training.events import read_curves

TRAIN, VALIDATION = "train/loss", "validation/loss"


def losses(workdir: Workdir, members: Iterable[str]) -> dict[str, list]:
    """Rows [step, train loss, validation loss or None] of every member that was trained here."""
    out = {}
    for member in members:
        steps = defaultdict(dict)
        for step, name, value in read_curves(workdir.member(member)):
            steps[step][name] = value
        rows = [[step, values[TRAIN], values.get(VALIDATION)]
                for step, values in sorted(steps.items()) if TRAIN in values]
        if rows:
            out[member] = rows
    return out


def strips(folder: epath.Path, records: Sequence[Record], block: int) -> Images:
    """The first pictures of every configuration that is reported, cut from its strip of squares."""
    out: dict[tuple[str, str, int], np.ndarray] = {}
    for record in records:
        identity = record.identity
        path = folder / f"{identity.key}.png"
        if identity.seed_block == block and path.exists():
            strip = pictures.load_png(path)
            side = strip.shape[0]
            cut = strip.reshape(side, -1, side, 3).swapaxes(0, 1)
            out[identity.model, identity.sampler, identity.steps] = cut
    return out
