"""Which pairs are kept, by their sizes, captions and scores."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ldm_scaling.data.preparing.facts import Facts
from ldm_scaling.errors import UserError

# Why a pair is dropped, in the order in which it is looked at: a pair has the first that holds.
REASONS = {
    "unreadable": "its image or its caption cannot be read",
    "small": "its short side is under min_side",
    "long": "its sides differ by more than max_aspect",
    "large": "it has more than max_pixels",
    "tile": "it is smaller than a tile",
    "no caption": "it has no caption",
    "caption length": "no caption of it is of min_caption to max_caption characters",
    "no aesthetic score": "min_aesthetic is set, and it has no score",
    "aesthetic": "its score is under min_aesthetic",
    "no watermark score": "max_watermark is set, and it has no score",
    "watermark": "its score is over max_watermark",
    "key": "an earlier pair has its key",
    "duplicate": "a kept image has the same pixels",
    "near-duplicate": "a larger or earlier image looks the same",
    "limit": "it is over the limit",
}
KEPT = -1
CODE = {reason: code for code, reason in enumerate(REASONS)}


@dataclasses.dataclass(frozen=True)
class Filters:
    """Bounds, each inclusive; None leaves the thing unlooked at.

    Attributes:
      min_side: least short side, in pixels.
      max_aspect: greatest long side over short side.
      max_pixels: greatest width times height.
      min_caption, max_caption: characters of a caption. Captions outside are removed.
      captions: whether a pair needs a caption; one with none left is dropped then.
      min_aesthetic: least aesthetic score; a pair without a score is dropped.
      max_watermark: greatest watermark score; a pair without a score is dropped.
    """

    min_side: int | None = None
    max_aspect: float | None = None
    max_pixels: int | None = None
    min_caption: int = 1
    max_caption: int | None = None
    captions: bool = True
    min_aesthetic: float | None = None
    max_watermark: float | None = None

    def __post_init__(self):
        for name, least in (("min_side", 1), ("max_aspect", 1), ("max_pixels", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"the filter {name} is {value}: give {least} or more, or leave it")
        if self.min_caption < 1:
            raise UserError(f"the filter min_caption is {self.min_caption}: give 1 or more")
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise UserError(
                f"the filter max_caption {self.max_caption} is under min_caption "
                f"{self.min_caption}: no caption is of both"
            )
        for name in ("min_aesthetic", "max_watermark"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"the filter {name} is {value}: give a number, or leave it")

    def keeps(self, caption: str) -> bool:
        """Whether a caption is of the right length."""
        return bool(self.right(np.array([len(caption)]))[0])

    def examine(self, facts: Facts) -> np.ndarray:
        """Why each pair is dropped: its reason's number in `REASONS`, or `KEPT`; int8 [N]."""
        width, height = facts["source_width"], facts["source_height"]
        short, long = np.minimum(width, height), np.maximum(width, height)
        lengths, owner = facts.caption_lengths()
        some = np.bincount(owner, minlength=len(facts)) > 0
        fitting = np.bincount(owner[self.right(lengths)], minlength=len(facts)) > 0
        aesthetic, watermark = facts["aesthetic"], facts["watermark"]
        out = np.full(len(facts), KEPT, np.int8)

        def drop(reason: str, where: np.ndarray) -> None:
            out[(out == KEPT) & where] = CODE[reason]

        drop("unreadable", facts["error"] != "")
        if self.min_side is not None:
            drop("small", short < self.min_side)
        if self.max_aspect is not None:
            drop("long", long > self.max_aspect * short)
        if self.max_pixels is not None:
            drop("large", width.astype(np.int64) * height > self.max_pixels)
        drop("tile", facts["width"] == 0)
        if self.captions:
            drop("no caption", ~some)
            drop("caption length", ~fitting)
        if self.min_aesthetic is not None:
            drop("no aesthetic score", np.isnan(aesthetic))
            drop("aesthetic", aesthetic < self.min_aesthetic)
        if self.max_watermark is not None:
            drop("no watermark score", np.isnan(watermark))
            drop("watermark", watermark > self.max_watermark)
        return out

    def right(self, length: np.ndarray) -> np.ndarray:
        """Whether captions of these lengths are kept."""
        right = length >= self.min_caption
        return right if self.max_caption is None else right & (length <= self.max_caption)
