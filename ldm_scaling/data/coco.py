"""COCO's captioned splits as they are downloaded: images, captions, and lists of captions.

    COCO/annotations/captions_val2014.json
    COCO/val2014/COCO_val2014_000000000042.jpg ...

What is evaluated on is COCO-2014's validation split.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of

SPLIT = "val2014"
SPLITS = ("val2014", "train2014", "val2017", "train2017")
IMAGES, CAPTIONS = 40_504, 202_654  # in the published files of SPLIT


def annotations(split: str) -> str:
    """A split's list of captions, below the folder."""
    return f"annotations/captions_{split}.json"


ANNOTATIONS = annotations(SPLIT)
URLS = {
    **{split: f"http://images.cocodataset.org/zips/{split}.zip" for split in SPLITS},
    **{
        annotations(split): "http://images.cocodataset.org/annotations/"
        f"annotations_trainval{split[-4:]}.zip"
        for split in SPLITS
    },
}


class Caption(NamedTuple):
    """A caption: its own number, its image's, the text without white space around it."""

    id: int
    image_id: int
    text: str


@dataclasses.dataclass(frozen=True)
class CaptionList:
    """Captions in a fixed order; image i is drawn for caption i.

    Attributes:
      captions: the list.
      origin: hash of the longest list that begins like this one.
    """

    captions: tuple[Caption, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts alone."""
        return tuple(caption.text for caption in self.captions)

    @property
    def hash(self) -> str:
        """Hash of the numbers and texts in their order."""
        return sha256_of([list(caption) for caption in self.captions])


@dataclasses.dataclass(frozen=True)
class Coco:
    """What the annotation file says; make one with `read`.

    Attributes:
      root: the folder.
      files: number of an image to its file's name, by number.
      captions: all of them, by number.
      split: the split, also the name of the images' folder.
    """

    root: Path
    files: dict[int, str]
    captions: tuple[Caption, ...]
    split: str = SPLIT

    @property
    def whole(self) -> bool:
        """Whether this is all of the published split `SPLIT`."""
        return (len(self.files), len(self.captions)) == (IMAGES, CAPTIONS)

    @functools.cached_property
    def images(self) -> ImageFolder:
        """All images, by number. Raises `UserError` when one that is annotated is not there."""
        folder = self.root / self.split
        if not folder.is_dir():
            raise UserError(_missing(self.root, self.split, self.split))
        have = set(os.listdir(folder))
        absent = [name for name in self.files.values() if name not in have]
        if absent:
            raise UserError(
                f"{self.root / annotations(self.split)} names {len(absent)} images that are not "
                f"in {folder}, the first is {absent[0]}: unpack {URLS[self.split]} again"
            )
        return ImageFolder(folder, tuple(self.files.values()))

    def choose(self, count: int, seed: int) -> CaptionList:
        """`count` captions drawn without replacement; a shorter list begins a longer one.

        The order is numpy's frozen `RandomState(seed).permutation` of all captions by number.
        Raises `UserError` when there are fewer.
        """
        if not 1 <= count <= len(self.captions):
            raise UserError(
                f"{count} captions cannot be drawn of the {len(self.captions)} in "
                f"{self.root / annotations(self.split)}: {SPLIT} should hold {CAPTIONS:,}, from "
                f"{URLS[ANNOTATIONS]}"
            )
        order = np.random.RandomState(seed).permutation(len(self.captions))[:count]
        origin = sha256_of([[list(caption) for caption in self.captions], seed])
        return CaptionList(tuple(self.captions[i] for i in order), origin)


def read(root: str | os.PathLike[str], split: str = SPLIT) -> Coco:
    """Reads a split's annotation file; images are looked for when asked for.

    Raises `UserError` for a split without captions and for a file that is missing, damaged, or says
    something impossible.
    """
    if split not in SPLITS:
        raise UserError(f"COCO has no captions of {split!r}: its splits are {', '.join(SPLITS)}")
    root = Path(root).expanduser()
    path, url = root / annotations(split), URLS[annotations(split)]
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(_missing(root, annotations(split), split)) from e
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path} ({e}): unpack {url} again") from e
    try:
        images = {_number(row["id"]): str(row["file_name"]) for row in table["images"]}
        captions = [
            Caption(_number(row["id"]), _number(row["image_id"]), str(row["caption"]).strip())
            for row in table["annotations"]
        ]
        if not captions or len({caption.id for caption in captions}) < len(captions):
            raise ValueError("there is no caption, or two have one number")
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} is no list of COCO's captions ({e!r}): unpack {url} again"
        ) from e
    orphans = [caption for caption in captions if caption.image_id not in images]
    if orphans:
        raise UserError(
            f"{path}: caption {orphans[0].id} is of image {orphans[0].image_id}, which the file "
            f"does not list ({len(orphans)} such captions): unpack {url} again"
        )
    return Coco(root, dict(sorted(images.items())), tuple(sorted(captions)), split)


def arrange(folder: ImageFolder, captions: Sequence[Caption]) -> ImageFolder:
    """Generated images in their captions' order.

    A file's stem is the caption's place in the list (0, 000000, ...) or its number in COCO's file.
    Raises `UserError` when images are missing, or none of the two holds for all.
    """
    stems: dict[int, str] = {}
    for name in folder.names:
        stem = Path(name).stem
        if not stem.isdecimal() or stems.setdefault(int(stem), name) != name:
            raise UserError(
                f"{folder.root / name} cannot be matched with a caption: images are named by the "
                "caption's place in the list (000000.png, 000001.png, ...) or by its number in "
                "COCO's file, each once"
            )
    keys = {"place": range(len(captions)), "number": [caption.id for caption in captions]}
    missing = {how: [k for k in wanted if k not in stems] for how, wanted in keys.items()}
    how = min(missing, key=lambda how: len(missing[how]))
    if missing[how]:
        raise UserError(
            f"{folder.root} lacks images of {len(missing[how])} of {len(captions)} captions (named "
            f"by {how}), the first is {missing[how][0]}: draw them, or score fewer"
        )
    return dataclasses.replace(folder, names=tuple(stems[k] for k in keys[how]))


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of an image or caption")
    return value


def _missing(root: Path, name: str, split: str) -> str:
    return (
        f"{root / name} is not there: download {URLS[name]} and unpack it in {root}, so that "
        f"{root} holds {annotations(split)} and {split}/*.jpg"
    )
