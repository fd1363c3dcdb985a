"""`photos:PATH`: photographs in high resolution, without captions, for super-resolution.

Wallpapers of a Linux distribution are such, /usr/share/backgrounds and /usr/share/wallpapers.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.data.image_folder import SUFFIXES
from ldm_scaling.data.sources import listing
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import Options
from ldm_scaling.errors import UserError

_SIZE = re.compile(r"[-_ ]?\d{3,5}x\d{3,5}$")
# Plasma's: NAME/contents/images/1920x1080.png and other sizes, images_dark, a screenshot.
_PACKAGE = re.compile(r"^(?:(.*)/)?contents/(?:images(?:_dark)?/[^/]+|screenshot\.[^/]+)$")


def collection(name: str, path: Path, options: Options) -> Photos:
    """The images by name."""
    if not path.is_dir():
        raise UserError(f"{name}: {path} is a file: name the folder that it is in")
    return Photos(name, path, options)


def photograph(name: str) -> str:
    """The photograph that a file shows: its name without suffix and size, or its package."""
    package = _PACKAGE.match(name)
    if package:
        return package[1] or "contents"
    folder, base = posixpath.split(listing.stem(name))
    return posixpath.join(folder, _SIZE.sub("", base) or base)


@dataclasses.dataclass(frozen=True)
class Photos:
    """Photographs as files; a part is some of them that follow each other by name.

    A pair's key is its image's path below the folder; its group the photograph, so that sizes and
    variants of one lie in one split. Links to files that are there anyway are left out.

    Attributes:
      name: as in `Collection`.
      root: the folder.
      options: how it is read.
    """

    name: str
    root: Path
    options: Options
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def files(self) -> list[str]:
        """Paths of the images below the folder."""
        return self.once.get(self._names)

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        return listing.parts(self.root, len(self.files()), self.options)

    def _names(self) -> list[str]:
        names = listing.walk(self.root, listing.is_image)
        links = {name for name in names if (self.root / name).is_symlink()}
        seen = {os.path.realpath(self.root / name) for name in names if links and name not in links}
        kept = []
        for name in names:
            if name in links:
                real = os.path.realpath(self.root / name)
                if real in seen:
                    continue
                seen.add(real)
            kept.append(name)
        if not kept:
            raise UserError(
                f"there is no image in {self.root}: files that end in {', '.join(SUFFIXES)}"
            )
        return kept

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        for name in self.files()[part.start : part.stop]:
            data, error = listing.contents(self.root / name)
            group = listing.key(photograph(name))
            yield Pair(listing.key(name), data, group=group, error=error)

    def groups(self) -> Iterator[str]:
        """The groups of all pairs, sound or not: photographs."""
        return (listing.key(photograph(name)) for name in self.files())

    def left_out(self) -> dict[str, int]:
        """Files that are no images, by suffix."""
        return listing.left_out(self.root, listing.is_image)

    def holds(self, place: Path) -> bool:
        """Whether what is written in a folder would be taken for the collection's."""
        return listing.holds(self.root, place)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`."""
        return listing.fingerprint(self.root, self._names(), self.options)
