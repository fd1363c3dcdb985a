"""`ldm-scaling restore`: holes filled in, colours, sharpness and detail given back by a member that
was fine-tuned for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_scaling.data import image_folder
from ldm_scaling.data.conditions import masks
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study.arguments import Parser
from ldm_scaling.study.upscale_cli import add_drawing, drawing, listing

_USAGE = """
  ldm-scaling restore IN --to=DIR --workdir=DIR --member=NAME              grey, blurred, ...
  ldm-scaling restore IN --to=DIR --workdir=DIR --member=NAME --mask=MASK  with holes"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling restore", _USAGE, allow_abbrev=False, add_help=True,
        description="Restores pictures of any size by a member that was fine-tuned for "
        "inpainting, outpainting, colourisation, deblurring or JPEG restoration. What is there is "
        "not made again. See docs/finetuning.md.",
    )
    add = parser.add_argument
    add("given", nargs="*", metavar="IN", help="pictures, or one folder of them")
    add("--to", metavar="DIR", help="the folder to make: PNG files named as what is given")
    add("--mask", metavar="MASK", help="white where the picture is to be filled in: one image for "
        "all, or a folder with one of each picture's name")
    add_drawing(add)
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`."""
    given, common = _parser().parse_with_common(arguments, parse)
    if not (given.given and given.to and common.workdir):
        raise UserError(
            "restore needs a picture, --to=DIR and --workdir=DIR; see  ldm-scaling restore --help"
        )
    pictures = listing(given.given, given.to)
    hosts.begin()
    from ldm_scaling.data.conditions import table
    from ldm_scaling.study import upscaling

    with drawing(common, given, enlarges=False) as way:
        masked = table.named(way.about["task"]).masked
        if masked != bool(given.mask):
            raise UserError(
                f"{way.about['task']} {'needs' if masked else 'takes no'} --mask"
            )
        read, hashes = None, ()
        if masked:
            holes = _masks(Path(given.mask).expanduser(), pictures)
            hashes = holes.hashes
            for i in range(len(pictures)):  # Before one is drawn.
                _with_hole(pictures, holes, i)

            def read(i: int) -> np.ndarray:
                return _with_hole(pictures, holes, i)
        elif way.about["task"] == "colourisation":
            grey = table.named("colourisation")

            def read(i: int) -> np.ndarray:
                return grey(pictures.read(i), 0).image
        print(upscaling.write(way, pictures, Path(given.to).expanduser(), read, hashes))


def _masks(path: Path, pictures: ImageFolder) -> ImageFolder:
    """A mask for each picture, in their order."""
    if path.is_file():
        return ImageFolder(path.parent, (path.name,) * len(pictures))
    if not path.is_dir():
        raise UserError(f"--mask={path}: there is no such image or folder")
    found = image_folder.listing(path)
    of = {Path(name).with_suffix("").as_posix(): name for name in found.names}
    stems = [Path(name).with_suffix("").as_posix() for name in pictures.names]
    lacks = [stem for stem in stems if stem not in of]
    if lacks:
        raise UserError(
            f"{path} holds no mask for {lacks[0]!r} ({len(lacks)} are missing): give one of each "
            "picture's name, or one file for all"
        )
    return ImageFolder(path, tuple(of[stem] for stem in stems))


def _with_hole(pictures: ImageFolder, holes: ImageFolder, i: int) -> np.ndarray:
    """A picture, grey in its hole, with the mask behind its colours: uint8 (H, W, 4)."""
    # Of a mask on a layer of its own, what is not painted is transparent.
    image_HWC, mask_HWC = pictures.read(i), image_folder.read_image(holes.path(i), "black")
    if mask_HWC.shape[:2] != image_HWC.shape[:2]:
        (h, w), (height, width) = mask_HWC.shape[:2], image_HWC.shape[:2]
        raise UserError(
            f"the mask {holes.path(i)} is {w}x{h} pixels, {pictures.path(i)} is {width}x{height}: "
            "make them equal"
        )
    hole_HW1 = (mask_HWC.mean(-1, keepdims=True) >= 128).astype(np.uint8)
    if not hole_HW1.any():
        raise UserError(f"the mask {holes.path(i)} is black: paint white what is to be filled in")
    if hole_HW1.all():
        raise UserError(f"the mask {holes.path(i)} is white all over: leave black what is to stay")
    return np.concatenate([masks.hidden(image_HWC, hole_HW1), hole_HW1], axis=-1)
