"""A subject for DreamBooth out of OpenMoji: a pictogram in colours of its own, seen a few times."""

from __future__ import annotations

import re

import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling import files, pictures
from ldm_scaling.data.composed import compose, openmoji
from ldm_scaling.errors import UserError

_SPEC = re.compile(r"openmoji:([0-9A-F-]+)(?::(\d+))?")
# Of each picture: its background, the pictogram's longest side, and where it lies in what is left.
_VIEWS = (
    ("white", 0.92, 0.5, 0.5), ("yellow", 0.8, 0.1, 0.6), ("dark gray", 0.86, 0.8, 0.3),
    ("light green", 0.74, 0.5, 0.9), ("pink", 0.8, 0.9, 0.5),
)


def is_spec(text: str) -> bool:
    """Whether a text is `openmoji:CODEPOINTS` or `openmoji:CODEPOINTS:DEGREES`."""
    return text.startswith("openmoji:")


def write(text: str, side: int, folder: epath.PathLike) -> tuple[epath.Path, str]:
    """Makes the pictures of a subject, unless they are there; its folder, and its class.

    Args:
      text: `openmoji:1F344:200` is the mushroom with all hues turned by 200 degrees: no mushroom
        that a network was trained on has its colours.
      side: of the pictures.
      folder: that gets a folder of the subject's name.
    Raises:
      UserError: for a text of another form, or a pictogram that there is not.
    """
    match = _SPEC.fullmatch(text)
    if not match:
        raise UserError(
            f"subject {text!r}: give openmoji:CODEPOINTS:DEGREES, e.g. openmoji:1F344:200, a "
            "mushroom with its hues turned by 200 degrees"
        )
    stem, turn = match[1], int(match[2] or 0) % 360
    drawn = openmoji.load().pictograms
    found = [p for p in drawn if p.stem == stem]
    if not found:
        raise UserError(f"subject {text!r}: OpenMoji's pictograms here have none of {stem}")
    kind = found[0].noun.text
    name = _spelt(kind)
    if sum(_spelt(p.noun.text) == name for p in drawn) > 1:  # Keycaps of signs.
        name += stem.lower()
    place = epath.Path(folder) / f"{name}_{turn}"
    if not place.exists():
        rgba = turned(openmoji.render(found[0], 4 * side), turn)
        with files.atomic_folder(place) as temporary:
            for i, view in enumerate(_VIEWS):
                pictures.save_png(temporary / f"{i:02d}.png", _seen(rgba, side, *view))
    return place, kind


def _spelt(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", kind.lower())


def turned(rgba_HWC: np.ndarray, degrees: int) -> np.ndarray:
    """The same with all hues turned."""
    hsv = np.asarray(Image.fromarray(rgba_HWC[..., :3]).convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(degrees * 256 / 360)) % 256
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba_HWC[..., 3:]], axis=-1)


def _seen(
    rgba_HWC: np.ndarray, side: int, colour: str, share: float, across: float, down: float
) -> np.ndarray:
    drawn = rgba_HWC[..., 3] >= 32
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    cut = Image.fromarray(np.ascontiguousarray(
        rgba_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ))
    scale = share * side / max(cut.size)
    size = tuple(max(2, round(scale * n)) for n in cut.size)
    small = cut.resize(size, Image.Resampling.LANCZOS)
    image = Image.new("RGB", (side, side), compose.PALETTE[colour])
    corner = (round(across * (side - size[0])), round(down * (side - size[1])))
    image.paste(small, corner, small)
    return np.asarray(image)
