"""Subjects: a few pictures of each of some things, as DreamBooth is given (arXiv 2208.12242).

    FOLDER/backpack/00.jpg ...    a folder a subject
    FOLDER/00.jpg ...             one subject, called as the folder is
    FOLDER/prompts_and_classes.txt    DreamBench's, see `data.dreambench`: it says the rest

Pictures in folders below a subject's are not of it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_scaling.data import dreambench, image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)

FEWEST, MOST = 3, 6
"""Pictures of a subject: the paper has 3 to 5, DreamBench 4 to 6."""
_ARCHIVERS = "__MACOSX"  # Left by macOS's in what others unpack.


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is to be learnt.

    Attributes:
      name: of its folder.
      kind: words of its class, such as `dog`.
      images: of it.
      prompts: that it is drawn for, with {0} for the identifier and {1} for the class.
    """

    name: str
    kind: str
    images: ImageFolder
    prompts: tuple[str, ...]

    def pictures(self, side: int) -> np.ndarray:
        """All its images, uint8 (N, side, side, 3), by `image_folder.SQUARE`, and never mirrored: a
        subject's two sides are not alike.

        Raises:
          UserError: naming an image that cannot be read.
        """
        small = [
            name for name, fact in zip(self.images.names, self.images.facts)
            if min(fact.width, fact.height) < side
        ]
        if small:
            log.warning(
                "%s: %d of %d pictures are smaller than %d px and are enlarged, such as %s",
                self.images.root, len(small), len(self.images), side, small[0],
            )
        return np.stack([
            image_folder.square(self.images.read(i), side) for i in range(len(self.images))
        ])


def read(
    folder: str | os.PathLike[str], kinds: Sequence[str] = (), prompts: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[Subject]:
    """The subjects of a folder, by name.

    Args:
      folder: see the top of this file.
      kinds: what they are, SUBJECT=WORDS of each or WORDS for all; DreamBench's file says it too.
      prompts: that they are drawn for; none are those of DreamBench's file.
      only: names of those that are wanted; none are all.
    Raises:
      UserError: for a folder that is missing or without images, or with images and folders of them
        side by side; a subject with one image or of no class, an image that cannot be read, a
        prompt without places, or a name that is none.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root}: there is no such folder of subjects: give one with a folder of pictures for "
            "each subject, or with one subject's pictures"
        )
    wrong = [p for p in prompts if set(re.findall(r"\{[^}]*\}?|\}", p)) != {"{0}", "{1}"}]
    if wrong:
        raise UserError(
            f"prompt {wrong[0]!r}: put {{0}} for the identifier and {{1}} for the class in it"
        )
    said = _said(kinds)
    bench = dreambench.read(root) if (root / dreambench.FILE).is_file() else None
    places = {name: root / name for name in bench.classes} if bench else _places(root)
    strange = sorted(set(only) - places.keys()) or sorted(said.keys() - {""} - places.keys())
    if strange:
        raise UserError(f"{root} holds no subject {strange[0]!r}; there are {', '.join(places)}")
    found = []
    for name in sorted(set(only) or places):
        kind = said.get(name) or said.get("") or (bench.classes[name] if bench else "")
        if not kind:
            raise UserError(
                f"of what class is {places[name]}? Say it by  dreambooth.classes=('{name}=dog',)  "
                "or, of all subjects,  ('dog',)"
            )
        own = tuple(prompts) or (bench.prompts[name] if bench else ())
        if not own:
            raise UserError(
                f"{root} holds no {dreambench.FILE}: give the prompts that subjects are drawn for, "
                "dreambooth.prompts=('a {0} {1} on a beach',)"
            )
        found.append(Subject(name, kind, _images(places[name]), own))
    return found


def _said(kinds: Sequence[str]) -> dict[str, str]:
    """Subject to class; "" is all others."""
    out: dict[str, str] = {}
    for item in kinds:
        name, equals, words = item.rpartition("=")
        name, words = name.strip(), words.strip()
        if not words or (equals and not name) or name in out:
            raise UserError(f"class {item!r}: give SUBJECT=WORDS once for each, or WORDS for all")
        out[name] = words
    return out


def prompts(folder: str | os.PathLike[str], given: Sequence[str] = ()) -> set[tuple[str, ...]]:
    """Each list of prompts that subjects of a folder are drawn for, be they wanted or not: those
    given, else DreamBench's. Raises `UserError` as `read`."""
    return {tuple(given)} if given else {*dreambench.read(folder).prompts.values()}


def _places(root: Path) -> dict[str, Path]:
    """Name of each subject to its folder."""
    here = [p for p in sorted(root.iterdir()) if p.is_file() and _is_picture(p)]
    places = {p.name: p for p in sorted(root.iterdir())
              if p.is_dir() and not p.name.startswith(".") and p.name != _ARCHIVERS}
    if here:
        if below := [p for p in places.values() if any(map(_is_picture, p.rglob("*")))]:
            raise UserError(
                f"{root} holds a picture, {here[0].name}, beside a folder of them, "
                f"{below[0].name}: are they one subject's or several's? Put the pictures "
                "elsewhere, or the folders"
            )
        return {root.resolve().name: root}
    if not places:
        raise UserError(f"{root} holds no pictures and no folders of them: give {FEWEST} to {MOST}")
    return places


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in image_folder.SUFFIXES and not path.name.startswith(".")


def _images(folder: Path) -> ImageFolder:
    every = image_folder.listing(folder)
    images = every.take(i for i, name in enumerate(every.names) if "/" not in name)
    if not len(images):
        raise UserError(
            f"{folder} holds pictures in folders below it alone, such as {every.names[0]}: put "
            "those of the subject into it"
        )
    if len(images) < len(every):
        log.warning("%s: pictures in folders below it are left out (%d)", folder,
                    len(every) - len(images))
    if len(images) < 2:
        # A single one would do for the code. But what is the subject in it, and what the
        # background, light and pose, nothing tells: the network learns the picture.
        raise UserError(
            f"{folder} holds one picture of its subject: give {FEWEST} to {MOST}, from several "
            "sides and on several backgrounds"
        )
    if len(images) < FEWEST:
        log.warning("%s holds %d pictures of its subject: %d to %d serve better", folder,
                    len(images), FEWEST, MOST)
    _ = images.facts  # Names one that is broken.
    return images


class Lesson:
    """What a network is taught: a `Source` of the subject's pictures, each beside one of its class.

    Few pictures make long epochs: an epoch shows each of the subject's equally often, and the
    class's as often as they fit in, at least once where there are more of them.

    Args:
      subject: arrays of the subject's pictures, (N, ...) each.
      classes: the same of the class's, (M, ...); None for none.
      batch_size: of the run: an epoch holds a batch at least.
      prefix: before the names of the class's arrays.
      hash: of the pictures.
    """

    def __init__(
        self, subject: dict[str, np.ndarray], classes: dict[str, np.ndarray] | None,
        batch_size: int, prefix: str, hash: str,
    ):
        self._subject, self._classes, self._prefix = subject, classes, prefix
        self._count = len(next(iter(subject.values())))
        self._others = len(next(iter(classes.values()))) if classes else 0
        self.hash = hash
        self._length = self._count * -(-max(self._count, self._others, batch_size) // self._count)

    def __len__(self) -> int:
        return self._length

    def batch(
        self, indices: Sequence[int], keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """As `Source.batch`."""
        index = np.asarray(indices)
        out = {name: a[index % self._count] for name, a in self._subject.items()}
        for name, a in (self._classes or {}).items():
            out[self._prefix + name] = a[index % self._others]
        return out
