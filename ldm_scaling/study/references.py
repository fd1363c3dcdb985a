"""Files of reference statistics: which one is for a score, and whether it is of the right thing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.metrics import reference
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.metrics.reference import Origin
from ldm_scaling.study.extractors import EXTRACTORS
from ldm_scaling.study.features import ImageSet


class Reference(NamedTuple):
    """Statistics with their hash, how many images they are of (None: not known), and words."""

    stats: ReferenceStats
    hash: str
    count: int | None
    text: str


def file_of(path: Path, extractor: str) -> Path:
    """`ref.npz` to `ref.inception_clean.npz`: where several networks' statistics lie."""
    return path.with_name(f"{path.stem}.{extractor}{path.suffix}")


def origin_of(extractor: str, hash: str, images: ImageSet) -> Origin:
    """What statistics of these images by a network are of."""
    resizer = EXTRACTORS[extractor].resizer
    return Origin(hash, resizer, images.resolution, len(images), images.list_hash)


def hash_of(origin: Origin) -> str:
    """The same from a file as from the images themselves."""
    return sha256_of(dataclasses.asdict(origin))


def is_ours(path: Path) -> bool:
    """Whether a file is one of `reference.save`; False for what cannot be read, too."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return "header" in held.files
    except Exception:  # Its own reader says what is wrong with it.
        return False


def load(
    path: Path, extractor: str, hash: str, generated: ImageSet, count: int | None
) -> Reference:
    """The statistics in a file, or beside it as `file_of` says.

    Args:
      path: ours, or one of pytorch-fid, clean-fid, ADM or EDM, which does not say what it is of.
      extractor: the network's name.
      hash: of the network.
      generated: the images to be scored: both sides are brought to one size, or neither.
      count: how many images it should be of; None where that is free.
    Raises:
      UserError: for a file that is missing, damaged, or of something else, with both values.
    """
    file = path if path.exists() else file_of(path, extractor)
    if not file.exists():
        raise UserError(
            f"there is no reference {path}, and no {file}: make it with --make-reference={path} "
            "and the same --metrics"
        )
    if not is_ours(file):
        stats = reference.load_published(file, extractor=hash)
        return Reference(stats, stats.hash, None, f"{file} (taken to be of {extractor})")
    found = reference.origin_of(file)
    expected = dataclasses.replace(
        origin_of(extractor, hash, generated), count=count or found.count, images=found.images
    )
    stats = reference.load(file, expected)
    return Reference(stats, hash_of(found), found.count, str(file))
