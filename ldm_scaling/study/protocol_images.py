"""Draws a protocol's images with a network of a study; what is there is not drawn again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from ldm_scaling import __version__, files, pictures
from ldm_scaling.data.coco import CaptionList
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import networks
from ldm_scaling.study.materials import Materials
from ldm_scaling.tasks.drawing import sampling_key

# Captions whose text states are in memory at a time.
_CAPTIONS = 1024


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How images are drawn: a member of the study, and the sampler's settings.

    Attributes:
      member: of the config.
      sampler, steps, guidance, spacing: see `request.Request`; an empty spacing is the sampler's.
    """

    member: str
    sampler: str
    steps: int
    guidance: float
    spacing: str = ""


def folder_of(materials: Materials, drawing: Drawing, captions: CaptionList) -> epath.Path:
    """Where images lie: a folder of their own for whatever decides a pixel.

    Lists of captions of which one begins the other share it: an image depends on its place.
    """
    study = materials.study
    text_hash = materials.networks.text_hash or (lambda: materials.text_encoder.hash)
    decides = [
        __version__, networks.model_hash(study, drawing.member), study.train.steps, study.seed,
        dataclasses.asdict(drawing), text_hash(), captions.origin,
    ]
    name = f"{drawing.member}_{drawing.sampler}_{drawing.steps}steps_w{drawing.guidance:g}"
    name = re.sub(r"[^\w.+-]+", "-", name)
    return materials.workdir / "evaluate" / f"{name}_{files.sha256_of(decides)[:8]}"


def draw(
    materials: Materials, drawing: Drawing, captions: CaptionList, folder: epath.Path
) -> epath.Path:
    """Draws what is missing of 000000.png, 000001.png, ...: image i is of caption i, and its noise
    that of the sample of number i. Returns the folder.

    Raises:
      UserError: when the member is none or not trained, or the sampler does not take the settings.
    """
    study = materials.study
    if drawing.member not in study.members:
        raise UserError(
            f"member {drawing.member!r} is none of the config's: choose from "
            f"{', '.join(study.members)}"
        )
    materials.require_trained([drawing.member])
    drawer = materials.drawer(drawing.member)
    table = drawer.table(solvers.canonical(drawing.sampler), drawing.steps, drawing.spacing or None)
    folder.mkdir(parents=True, exist_ok=True)
    have = {path.name for path in folder.iterdir()}
    missing = [i for i in range(len(captions)) if _name(i) not in have]
    if not missing:
        return folder
    params, key = materials.member_params(drawing.member), sampling_key(study.seed)
    what = f"{drawing.member}, {table.name}, guidance {drawing.guidance:g}"
    done = len(captions) - len(missing)
    with files.progress(len(captions), f"drawing, {what}", "image", initial=done) as bar:
        for start in range(0, len(missing), _CAPTIONS):
            index = missing[start : start + _CAPTIONS]
            context_PLD = materials.states([captions.texts[i] for i in index])
            configuration = Configuration(
                table, drawing.guidance, np.array(index, np.int32), np.arange(len(index))
            )
            drawn = drawer.draw(params, [configuration], context_PLD, key)
            for places, latents in _batches(drawn, drawer.batch_size):
                for i, image in zip(places, drawer.decode(latents, lambda j: what)):
                    pictures.save_png(folder / _name(index[i]), image)
                bar.update(len(places))
    return folder


def _name(i: int) -> str:
    return f"{i:06d}.png"


def _batches(drawn: Iterable, size: int):
    """Latents as they end, with their places, `size` at a time: decoding fills a batch up."""
    places: list[int] = []
    latents: list[np.ndarray] = []
    for finished in drawn:
        places += finished.position.tolist()
        latents += list(finished.latents_JHWC)
        while len(places) >= size:
            yield places[:size], np.stack(latents[:size])
            del places[:size], latents[:size]
    if places:
        yield places, np.stack(latents)
