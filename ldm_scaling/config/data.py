"""The pictures and captions."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ldm_scaling.config.check import positive, require

OPENMOJI = "openmoji"
SHARDS = "shards"
"""A source of this kind is prepared already, and used where it lies."""
_KIND = r"[a-z][a-z0-9_]*:"
# Bookkeeping: what may change between two runs of one study.
_FREE = ("workers", "max_corrupt", "cache")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """How a collection of image-text pairs becomes shards, see `data.prepare`.

    Attributes:
      min_side: fewest pixels of the short side; -1 is `Data.side`.
      max_aspect: largest ratio of the long side to the short one; 0 is any.
      max_pixels: most pixels; 0 is any that Pillow takes.
      min_caption, max_caption: fewest and most characters of a caption; others are removed, and a
        pair that none is left of is dropped. `max_caption` 0 is any.
      captions: whether a pair needs a caption.
      min_aesthetic, max_watermark: bounds of scores that the collection has; 0 and 1 are no bounds,
        with others pairs without the score are dropped.
      exact: whether pictures that are the same in every pixel are dropped but for one, which takes
        their captions over.
      perceptual: bits of 64 in which perceptual hashes of pictures that look the same differ at
        most; -1 keeps them.
      validation_share: share of the pairs that are kept for validation, by their key's hash.
      limit: most pairs that are kept, the first by a hash of their keys; 0 is all.
      store_side: short side that larger pictures are stored with; 0 keeps their bytes.
      tile: side of the tiles that photographs are cut into; 0 keeps them whole.
      skip_broken: whether a part that cannot be read to its end is left out.
      caption_columns: names of columns to take captions from; none are the usual ones.
      caption_encoding: of captions in files that are not UTF-8 and do not say what they are.
      aesthetic_column, watermark_column: names of the scores' columns; empty are the usual ones.
    """

    min_side: int = -1
    max_aspect: float = 0.0
    max_pixels: int = 0
    min_caption: int = 1
    max_caption: int = 0
    captions: bool = True
    min_aesthetic: float = 0.0
    max_watermark: float = 1.0
    exact: bool = True
    perceptual: int = 4
    validation_share: float = 0.05
    limit: int = 0
    store_side: int = 0
    tile: int = 0
    skip_broken: bool = False
    caption_columns: tuple[str, ...] = ()
    caption_encoding: str = "utf-8"
    aesthetic_column: str = ""
    watermark_column: str = ""

    def __post_init__(self):
        for name in ("max_aspect", "max_pixels", "max_caption", "limit", "store_side", "tile"):
            value = getattr(self, name)
            require(value >= 0, f"data.prepare.{name}", value, "not below 0")
        require(self.min_side >= -1, "data.prepare.min_side", self.min_side, "-1 or more")
        require(-1 <= self.perceptual <= 12, "data.prepare.perceptual", self.perceptual,
                "-1 (off) to 12 bits")
        require(0 < self.validation_share < 1, "data.prepare.validation_share",
                self.validation_share, "above 0 and below 1")
        require(self.max_aspect == 0 or self.max_aspect >= 1, "data.prepare.max_aspect",
                self.max_aspect, "1 or more, or 0 for any")
        require(self.min_caption >= 1, "data.prepare.min_caption", self.min_caption,
                "1 or more; pairs without captions are kept by data.prepare.captions=False")
        require(self.max_caption == 0 or self.max_caption >= self.min_caption,
                "data.prepare.max_caption", self.max_caption,
                f"at least min_caption, which is {self.min_caption}, or 0 for any")
        require(not (self.tile and self.store_side), "data.prepare.store_side", self.store_side,
                f"tiles are stored as they are cut: 0 with tile={self.tile}")


@dataclasses.dataclass(frozen=True)
class Data:
    """The pictures.

    Attributes:
      source: `openmoji`, pictograms composed into captioned pictures; or a collection of
        image-text pairs as KIND:PATH, see docs/data.md, or several with commas between them.
      weights: shares of several sources in a batch; empty is by their sizes.
      hash: of prepared shards. Filled in where all sources are shards; given, it is what they must
        have.
      side: side of a picture in pixels.
      train_pictures, validation_pictures: how many. Composed pictures are as many, and the two
        share no concept; of a collection's splits these are taken at most, 0 is all.
      seed: what they are composed from.
      text_length: tokens of a caption, longer ones are cut.
      text_weights: folder of a published text encoder, CLIP's or T5's; empty is MiniLM.
      text_hash: of its weights and tokenizer. Filled in when they are read; given, it is what they
        must have.
      flip: whether half of the pictures are mirrored, but for captions that name a side.
      max_aspect: of the sizes that collections are trained at, in buckets of about side^2 pixels;
        1 is the square alone. What is measured is square.
      max_corrupt: share of a source's records that may be damaged before a run stops.
      latent_dtype: float32, or float16, half as large, that latents are kept in.
      text_dtype: the same of text states; float32 where an encoder's leave float16's range.
      workers: processes that read ahead; 0 is threads.
      cache: folder of latents and text states, for several workdirs; empty is the workdir.
      prepare: how collections become shards.
    """

    source: str = OPENMOJI
    weights: tuple[float, ...] = ()
    hash: str = ""
    side: int = 32
    train_pictures: int = 100_000
    validation_pictures: int = 10_000
    seed: int = 0
    text_length: int = 20
    text_weights: str = ""
    text_hash: str = ""
    flip: bool = False
    max_aspect: float = 1.0
    max_corrupt: float = 0.01
    latent_dtype: str = "float32"
    text_dtype: str = "float16"
    workers: int = 0
    cache: str = ""
    prepare: Prepare = dataclasses.field(default_factory=Prepare)

    def __post_init__(self):
        least, why = (1, "; 0 is all of a collection, and data.source names none") if (
            self.composed) else (0, "")
        positive(self, "side")
        for name in ("train_pictures", "validation_pictures"):
            require(getattr(self, name) >= least, f"data.{name}", getattr(self, name),
                    f"at least {least}{why}")
        wrong = [s for s in self.sources if s != OPENMOJI and not re.match(f"{_KIND}.", s)]
        require(not wrong, "data.source", self.source, "openmoji, or KIND:PATH, e.g. "
                "folder:photos; a kind is lower-case letters, digits and _")
        require(self.composed or OPENMOJI not in self.sources, "data.source", self.source,
                "openmoji stands alone")
        if self.weights:
            require(len(self.weights) == len(self.sources), "data.weights", self.weights,
                    f"one for each of the {len(self.sources)} sources")
            require(all(w > 0 for w in self.weights), "data.weights", self.weights, "above 0")
        if self.composed:  # Many of their captions name a side, and all are square.
            require(not self.flip, "data.flip", self.flip, "composed pictures are not mirrored")
            require(self.max_aspect == 1, "data.max_aspect", self.max_aspect,
                    "composed pictures are square: 1")
        require(16 <= self.side <= 1024, "data.side", self.side, "use 16..1024")
        require(self.seed >= 0, "data.seed", self.seed, "not below 0")
        require(3 <= self.text_length <= 512, "data.text_length", self.text_length, "use 3..512")
        require(1 <= self.max_aspect <= 8, "data.max_aspect", self.max_aspect, "in 1..8")
        require(0 <= self.max_corrupt < 1, "data.max_corrupt", self.max_corrupt, "in [0, 1)")
        for name in ("latent_dtype", "text_dtype"):
            require(getattr(self, name) in ("float16", "float32"), f"data.{name}",
                    getattr(self, name), "float16 or float32")
        require(self.workers >= 0, "data.workers", self.workers, "not below 0")
        require("://" not in self.cache, "data.cache", self.cache,
                "a folder: mount a bucket, for example with gcsfuse")

    @property
    def composed(self) -> bool:
        """Whether pictures are composed and not read."""
        return self.source == OPENMOJI

    @property
    def sources(self) -> tuple[str, ...]:
        """Each source; a comma parts two where a kind follows it."""
        return tuple(re.split(f",(?={_KIND})", self.source))

    def identity(self) -> dict[str, Any]:
        """What decides numbers; keys that are at their default and concern collections only are
        left out.
        """
        tree = {k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE}
        if self.hash:  # It says how the shards were made, wherever they lie.
            del tree["source"], tree["prepare"]
        if self.text_hash:
            del tree["text_weights"]
        for name, value in NEUTRAL_DATA.items():
            if tree.get(name) == value:
                del tree[name]
        return tree


# Keys of which `Data.identity` says nothing at these values.
NEUTRAL_DATA = {
    name: value for name, value in dataclasses.asdict(Data()).items()
    if name in ("weights", "hash", "text_weights", "text_hash", "flip", "max_aspect",
                "latent_dtype", "text_dtype", "prepare")
}
