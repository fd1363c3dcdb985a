"""The pictures and captions."""

from __future__ import annotations

import dataclasses

from ldm_scaling.config.check import positive, require


@dataclasses.dataclass(frozen=True)
class Data:
    """The pictures.

    Attributes:
      source: `openmoji`, pictograms composed into captioned pictures.
      side: side of a picture in pixels.
      train_pictures, validation_pictures: how many; the two share no concept.
      seed: what they are composed from.
      text_length: tokens of a caption, longer ones are cut.
    """

    source: str = "openmoji"
    side: int = 32
    train_pictures: int = 100_000
    validation_pictures: int = 10_000
    seed: int = 0
    text_length: int = 20

    def __post_init__(self):
        positive(self, "side", "train_pictures", "validation_pictures")
        require(self.source == "openmoji", "data.source", self.source, "choose openmoji")
        require(16 <= self.side <= 1024, "data.side", self.side, "use 16..1024")
        require(self.seed >= 0, "data.seed", self.seed, "not below 0")
        require(3 <= self.text_length <= 512, "data.text_length", self.text_length, "use 3..512")
