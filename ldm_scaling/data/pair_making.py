"""Evaluation pairs out of photographs: random crops by key, each with a condition of it, as files.

A folder of them holds `HR/000000.png`, ... and `LR/000000.png`, ... as `pairs.read` takes them
(`mask/` too where the condition has one, white where the image is not seen), and `pairs.json`: all
that decides a byte of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from ldm_scaling import files, pictures
from ldm_scaling.data import image_folder, pairs
from ldm_scaling.data.conditions import pixels, table
from ldm_scaling.data.loading import draws
from ldm_scaling.errors import UserError

MANIFEST, MASKS = "pairs.json", "mask"
_VERSION = 1  # of what is drawn and done
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Crop:
    """Where a crop lies: the photograph's number, and the upper left pixel."""

    photograph: int
    top: int
    left: int


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
    """Photographs that crops of `side` pixels are cut out of; make one with `photographs`.

    Attributes:
      root: the folder.
      names: below it, of those that are large enough.
      sizes: (height, width) of each, as it is meant to be seen.
      hashes: of each file's bytes.
      skipped: names of those that are too small.
      side: of crops.
    """

    root: Path
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    hashes: tuple[str, ...]
    skipped: tuple[str, ...]
    side: int

    def crop(self, key: int) -> Crop:
        """The crop of a key: any place of any photograph is as likely as any other place."""
        rooms = self._rooms
        place = int(draws.generator(key, "crop").integers(rooms[-1]))
        number = int(np.searchsorted(rooms, place, side="right"))
        place -= int(rooms[number - 1]) if number else 0
        top, left = divmod(place, self.sizes[number][1] - self.side + 1)
        return Crop(number, top, left)

    @functools.cached_property
    def _rooms(self) -> np.ndarray:
        """Places of a crop in each photograph and those before it, int64 [N]."""
        return np.cumsum([
            (height - self.side + 1) * (width - self.side + 1) for height, width in self.sizes
        ])


def photographs(names: tuple[str, ...], root: Path, side: int) -> Photographs:
    """Those of the files that crops fit into.

    Raises:
      UserError: for a file that cannot be read, and where none is large enough.
    """
    folder = image_folder.ImageFolder(root, names)
    sizes = {name: (facts.height, facts.width) for name, facts in zip(names, folder.facts)}
    hashes = {name: facts.hash for name, facts in zip(names, folder.facts)}
    for name in names:  # Sizes are those on disk: some photographs are turned as they are read.
        with Image.open(root / name) as image:
            turned, tiff = image_folder.orientation(image) >= 5, image.format == "TIFF"
        if turned and tiff:  # Which size Pillow tells of one before it is read is its version's.
            sizes[name] = image_folder.read_image(root / name).shape[:2]
        elif turned:
            sizes[name] = sizes[name][::-1]
    kept = tuple(name for name in names if min(sizes[name]) >= side)
    if not kept:
        large = max(names, key=lambda name: min(sizes[name]))
        raise UserError(
            f"none of the {len(names)} images in {root} holds a crop of {side} pixels, the largest "
            f"is {large} with {sizes[large][1]}x{sizes[large][0]}: give larger photographs, or "
            "a smaller --side"
        )
    return Photographs(
        root, kept, tuple(sizes[n] for n in kept), tuple(hashes[n] for n in kept),
        tuple(n for n in names if min(sizes[n]) < side), side,
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """Which pairs to make.

    Attributes:
      condition: a name of `conditions.table`.
      count: of pairs.
      side: of the crops, pixels.
      seed: of crops and conditions.
    Raises:
      UserError: for a condition that is none or cannot be made of such crops.
    """

    condition: str
    count: int
    side: int
    seed: int

    def __post_init__(self):
        self.row.check((self.side, self.side))

    @property
    def row(self) -> table.Condition:
        """The condition."""
        return table.named(self.condition)

    def keys(self) -> np.ndarray:
        """Of all pairs, uint64 (count,)."""
        numbers = np.arange(self.count)
        return draws.keys(draws.seed_of("pairs", self.seed), 0, np.zeros_like(numbers), numbers)


def manifest(request: Request, given: Photographs) -> dict[str, Any]:
    """All that decides the bytes of a folder of pairs."""
    crops = [dataclasses.astuple(given.crop(int(key))) for key in request.keys()]
    return {
        "version": _VERSION, **dataclasses.asdict(request),
        "photographs": dict(zip(given.names, given.hashes)), "skipped": list(given.skipped),
        "crops": crops, "opencv": pixels.opencv().__version__,
        "pillow": PIL.__version__, "numpy": np.__version__,
    }


def make(request: Request, given: Photographs, to: str | os.PathLike[str]) -> Path:
    """Makes what is missing of a folder of pairs; returns it.

    Pair i depends on its key alone: the same bytes whatever was there before.

    Raises:
      UserError: for a folder of other pairs, with what differs, or one that cannot be written.
    """
    to = Path(to).expanduser()
    wanted = json.loads(json.dumps(manifest(request, given)))
    files.bind(to, MANIFEST, wanted, "other pairs, they differ in {key}")
    folders = {"HR": to / pairs.HIGH[0], "LR": to / pairs.LOW[0]}
    if request.row.masked:
        folders[MASKS] = to / MASKS
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    stems = [f"{i:0{_DIGITS}d}.png" for i in range(request.count)]
    missing = [
        i for i, stem in enumerate(stems) if not all((f / stem).exists() for f in folders.values())
    ]
    # One photograph after the other: each is read once.
    missing.sort(key=lambda i: (wanted["crops"][i][0], i))
    keys, image_HWC, number = request.keys(), None, None
    with files.progress(
        request.count, f"pairs, {request.condition}", "pair", initial=request.count - len(missing)
    ) as bar:
        for i in missing:
            crop = Crop(*wanted["crops"][i])
            if crop.photograph != number:
                number = crop.photograph
                image_HWC = image_folder.read_image(given.root / given.names[number])
            high_HWC = image_HWC[
                crop.top : crop.top + request.side, crop.left : crop.left + request.side
            ]
            made = request.row(high_HWC, int(keys[i]))
            pictures.save_png(folders["HR"] / stems[i], high_HWC)
            if made.mask is not None:
                mask_HW3 = np.repeat(255 * made.mask, 3, axis=2)
                pictures.save_png(folders[MASKS] / stems[i], mask_HW3)
            pictures.save_png(folders["LR"] / stems[i], made.image)
            bar.update()
    return to
