"""A folder of images of any kind, as uint8 RGB: listed, hashed, read and squared."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import string
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from ldm_scaling import files
from ldm_scaling.errors import UserError

# The same wherever it runs: what an older Pillow cannot decode is a broken picture there.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".ppm", ".pgm",
    ".tif", ".tiff", ".gif",
)  # fmt: skip
SQUARE = "centre square of the short side, then Pillow's Lanczos"
# What Pillow raises at damaged files; of AVIF the `RuntimeError`s.
BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF's tag, and what makes a picture upright by its value
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip

T = TypeVar("T")


def orientation(image: Image.Image) -> int:
    """What EXIF says of how a Pillow image lies, 1..8: 1 is upright, as are those of which it says
    nothing or what has no meaning; from 5 on it lies on its side."""
    found = image.getexif().get(_ORIENTATION)
    return found if found in _TURNS else 1


def to_rgb(image: Image.Image, ground: str = "white") -> np.ndarray:
    """A Pillow image of any mode as it is meant to be seen, uint8 [H, W, 3].

    Turned as its EXIF orientation says; 16-bit grey scaled to 8 bits, which Pillow's own conversion
    cuts off at 255; what is transparent put on the ground, where its conversion shows the colours
    that are hidden. Colour profiles are left aside, as all code that computes FID does.

    Raises `ValueError` for floating-point pixels and for colour spaces without a conversion.
    """
    image.load()  # which turns a TIFF
    if (turned := orientation(image)) > 1:
        image = image.transpose(_TURNS[turned])
    if image.mode.startswith("I"):  # 16 bits; older Pillow reads such a PNG into 32
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min(initial=0) < 0 or grey_HW.max(initial=0) > 65535:
            raise ValueError("its pixels are 32-bit integers")
        grey_HW = ((grey_HW + 128) // 257).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return np.asarray(image.convert("RGB"))


def read_image(path: str | os.PathLike[str], ground: str = "white") -> np.ndarray:
    """The image in a file (the first of an animation) as `to_rgb` gives it on a ground.

    Raises `UserError` naming a file that is missing, cut short or of an unknown kind.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image, ground)
    except FileNotFoundError as e:
        raise UserError(f"there is no image {path}") from e
    except BROKEN as e:
        raise _broken(path, e) from e


def square(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """`SQUARE`: uint8 [H, W, 3] to [side, side, 3].

    As GigaGAN and DMD2 evaluate (`CenterCropLongEdge`, whose rounding is torchvision's, then
    `resize(..., Image.LANCZOS)`).
    """
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    top, left = (round((n - short) / 2) for n in (height, width))
    image_HWC = image_HWC[top : top + short, left : left + short]
    if short == side:
        return image_HWC
    image = Image.fromarray(image_HWC).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


class Facts(NamedTuple):
    """Hash of a file's bytes, and the image's size as it is stored."""

    hash: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images of a folder in a fixed order; make one with `listing`.

    Attributes:
      root: the folder.
      names: their paths below it, with `/`.
    """

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """Where image i lies."""
        return self.root / self.names[i]

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 [H, W, 3]. Raises `UserError` naming a broken one."""
        return read_image(self.path(i))

    def take(self, index: Iterable[int]) -> ImageFolder:
        """The images of these numbers, in this order."""
        return dataclasses.replace(self, names=tuple(self.names[i] for i in index))

    @functools.cached_property
    def facts(self) -> tuple[Facts, ...]:
        """What is known of each file, in order. Raises `UserError` naming a broken one."""
        return tuple(_each(_facts, [self.path(i) for i in range(len(self))], "reading files"))

    @property
    def hashes(self) -> list[str]:
        """Hash of each file's bytes, in order: another image under an old name has another."""
        return [facts.hash for facts in self.facts]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each image as it is stored."""
        return [(facts.width, facts.height) for facts in self.facts]


def remember(folder: ImageFolder, memo: epath.PathLike) -> None:
    """Looks the folder's facts up in a file of them, and keeps there what was found anew.

    A file is taken to be the same while its length and its time of change are. Raises `UserError`
    as `facts`, and when `memo` cannot be written.
    """
    memo = epath.Path(memo)
    try:
        known = json.loads(memo.read_text()) if memo.exists() else {}
    except (OSError, ValueError):  # It is made anew.
        known = {}
    marks = [_mark(folder.path(i)) for i in range(len(folder))]
    new = [i for i, name in enumerate(folder.names) if known.get(name, [None])[0] != marks[i]]
    for i, facts in zip(new, folder.take(new).facts):
        known[folder.names[i]] = [marks[i], list(facts)]
    if new:
        files.atomic_write_text(memo, json.dumps(known))
    folder.__dict__["facts"] = tuple(Facts(*known[name][1]) for name in folder.names)


def listing(root: str | os.PathLike[str]) -> ImageFolder:
    """The images in a folder and those below it, sorted by name; hidden files are left out.

    Raises `UserError` when there is no such folder or no image in it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    below = (path.relative_to(root) for path in root.rglob("*"))
    names = sorted(
        path.as_posix() for path in below
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.parts)
    )
    names = [name for name in names if (root / name).is_file()]
    if not names:
        raise UserError(f"there is no image in {root}: files that end in {', '.join(SUFFIXES)}")
    return ImageFolder(root, tuple(names))


def by_number(folder: ImageFolder) -> ImageFolder:
    """In the order of numbers where the names are one beginning and numbers of several lengths
    (`0.png` to `10.png`), of which the order of names is 0, 1, 10, 2; else as it is."""
    stems = [Path(name).with_suffix("").as_posix() for name in folder.names]
    same = len(os.path.commonprefix(stems).rstrip(string.digits))
    numbers = [stem[same:] for stem in stems]
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        return folder
    if len({len(number) for number in numbers}) == 1:
        return folder
    return folder.take(sorted(range(len(folder)), key=lambda i: int(numbers[i])))


def sound(folder: ImageFolder) -> tuple[ImageFolder, tuple[str, ...]]:
    """The folder without the images that cannot be read, and these images' names.

    Raises `UserError` when none can be read.
    """

    def good(i: int) -> bool:
        try:
            folder.read(i)
        except UserError:
            return False
        return True

    kept = np.array(_each(good, range(len(folder)), "looking for broken images"))
    if not kept.any():
        raise UserError(f"none of the {len(folder)} images in {folder.root} can be read")
    broken = tuple(folder.names[i] for i in np.flatnonzero(~kept))
    return folder.take(np.flatnonzero(kept)), broken


def _each(function: Callable[[T], Any], items: Sequence[T], what: str) -> list:
    with concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.map(function, items)
        if len(items) < 1000:
            return list(results)
        with files.progress(len(items), what, "image") as bar:
            return [(bar.update(), result)[1] for result in results]


def _facts(path: Path) -> Facts:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return Facts(hashlib.sha256(data).hexdigest()[:16], *image.size)
    except FileNotFoundError as e:
        raise UserError(f"there is no image {path}") from e
    except BROKEN as e:
        raise _broken(path, e) from e


def _mark(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as e:
        raise UserError(f"there is no image {path}") from e
    return [stat.st_size, stat.st_mtime_ns]


def why_broken(e: Exception) -> str:
    """What one of `BROKEN` says of a file."""
    unknown = isinstance(e, UnidentifiedImageError)
    return "it is no image that Pillow knows" if unknown else str(e)


def _broken(path: str | os.PathLike[str], e: Exception) -> UserError:
    return UserError(
        f"cannot read the image {os.fspath(path)} ({why_broken(e)}): fetch or draw it again, or "
        "leave it out"
    )
