"""`coco:PATH[#SPLIT]`: a split of COCO as it is downloaded, val2014 if none is named.

    PATH/annotations/captions_train2014.json
    PATH/train2014/COCO_train2014_000000000009.jpg ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ldm_scaling.data import coco
from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.data.sources import listing
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import Options
from ldm_scaling.errors import UserError


def collection(name: str, path: Path, options: Options, split: str = "") -> Coco:
    """The images of a split by number. Raises `UserError` for a split without captions."""
    split = split or coco.SPLIT
    if split not in coco.SPLITS:
        raise UserError(
            f"{name}: COCO has no captions of {split!r}: its splits are {', '.join(coco.SPLITS)}"
        )
    return Coco(name, path, options, split)


@dataclasses.dataclass(frozen=True)
class Coco:
    """Annotated images; a part is some of them that follow each other by number.

    A pair's key is its file's name without suffix; it has all captions of its image, by number.

    Attributes:
      name: as in `Collection`.
      root: the folder.
      options: how it is read.
      split: one of `coco.SPLITS`.
    """

    name: str
    root: Path
    options: Options
    split: str
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def _listing(self) -> list[tuple[str, tuple[str, ...]]]:
        found = coco.read(self.root, self.split)
        texts: dict[int, list[str]] = {number: [] for number in found.files}
        for caption in found.captions:
            if caption.text:
                texts[caption.image_id].append(caption.text)
        return [(file, tuple(texts[number])) for number, file in found.files.items()]

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        folder = self.root / self.split
        count = len(self.once.get(self._listing))
        return tuple(
            Part(f"{self.split}[{a}:{b}]", str(folder), a, b)
            for a, b in listing.cut(count, self.options.part_size)
        )

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        for file, captions in self.once.get(self._listing)[part.start : part.stop]:
            data, error = listing.contents(Path(part.path) / file, coco.annotations(self.split))
            yield Pair(listing.key(listing.stem(file)), data, captions, error=error)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`."""
        names = [f"{self.split}/{file}" for file, _ in self._listing()]
        names = [name for name in names if (self.root / name).exists()]
        return listing.fingerprint(
            self.root, [coco.annotations(self.split), *names], self.options
        )
