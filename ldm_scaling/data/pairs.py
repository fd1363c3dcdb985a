"""Super-resolution pairs on disk: high-resolution images in one folder, low ones in another."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError

HIGH = ("HR", "gt", "DIV2K_valid_HR")
LOW = ("LR", "lq", "DIV2K_valid_LR_bicubic/X4")
FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Image i of `low` is image i of `high`, `FACTOR` times smaller; make one with `read`."""

    high: ImageFolder
    low: ImageFolder


def read(root: str | os.PathLike[str]) -> Pairs:
    """Pairs in ROOT/HR and ROOT/LR (or gt and lq, or DIV2K's own folders), in the order of names.

    The low-resolution file has the same stem, or the same with `x4` at its end as DIV2K has it.
    Raises `UserError` for a folder that is missing, images without partner, and sizes that are not
    as 1 to 4.
    """
    root = Path(root).expanduser()
    high, low = (_folder(root, names) for names in (HIGH, LOW))
    high_of, low_of = (by_stem(folder) for folder in (high, low))
    alone = sorted(high_of.keys() ^ low_of.keys())
    if alone:
        raise UserError(
            f"{len(alone)} images are in one of {high.root} and {low.root} only, the first is "
            f"{alone[0]!r}: each needs its partner"
        )
    stems = sorted(high_of)
    pairs = Pairs(
        dataclasses.replace(high, names=tuple(high_of[stem] for stem in stems)),
        dataclasses.replace(low, names=tuple(low_of[stem] for stem in stems)),
    )
    for i, (large, small) in enumerate(zip(pairs.high.sizes, pairs.low.sizes)):
        if large != (FACTOR * small[0], FACTOR * small[1]):
            raise UserError(
                f"{pairs.high.path(i)} is {large[0]}x{large[1]} and {pairs.low.path(i)} "
                f"{small[0]}x{small[1]}: the first should be {FACTOR} times the second"
            )
    return pairs


def match(folder: ImageFolder, real: ImageFolder) -> ImageFolder:
    """The folder's images in the order of those of the same stem in `real`.

    Raises `UserError` when one is missing or surplus.
    """
    have, wanted = by_stem(folder), by_stem(real)
    alone = sorted(have.keys() ^ wanted.keys())
    if alone:
        raise UserError(
            f"{len(alone)} images are in one of {folder.root} and {real.root} only, the first is "
            f"{alone[0]!r}: pairs have the same name, apart from its ending"
        )
    return dataclasses.replace(folder, names=tuple(have[stem] for stem in wanted))


def _folder(root: Path, names: tuple[str, ...]) -> ImageFolder:
    for name in names:
        if (root / name).is_dir():
            return image_folder.listing(root / name)
    raise UserError(
        f"{root} holds none of the folders {', '.join(names)}: put the high-resolution images in "
        f"{root / HIGH[0]} and the low-resolution ones in {root / LOW[0]}"
    )


def by_stem(folder: ImageFolder) -> dict[str, str]:
    """What a pair's two names share, to the name: it without its ending.

    DIV2K calls the small one of 0801.png 0801x4.png, so `x4` is left out too. Not in a folder that
    has both 2.png and 2x4.png, which are two images.
    Raises `UserError` for two names that differ in their ending alone.
    """
    stems: dict[str, str] = {}
    for name in folder.names:
        one = Path(name).with_suffix("").as_posix()
        if one in stems:
            raise UserError(f"{folder.root} holds both {stems[one]} and {name}: keep one of them")
        stems[one] = name
    short = {re.sub(rf"x{FACTOR}$", "", one): name for one, name in stems.items()}
    return short if len(short) == len(stems) else stems
