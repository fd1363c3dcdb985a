"""How a collection is prepared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from ldm_scaling.data.preparing.duplicates import Duplicates
from ldm_scaling.data.preparing.filters import Filters
from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """How a collection is prepared.

    Attributes:
      name: of the data set: small letters, digits and `_`.
      filters: which pairs are kept.
      duplicates: which duplicates are removed.
      validation_share: of the groups, in the validation split, by hash of the group.
      salt: changes the split, the order and what `limit` takes.
      store_side: brings the short side of larger images down to so many pixels; None stores them
        as they are.
      tile: cuts images into tiles of so many pixels, side by side from the upper left, as PNG; the
        tiles of one lie in one split. Bounds on size are of the whole image.
      limit: keeps so many pairs, the first by hash of the key.
      skip_broken: leaves out a part that cannot be read to its end, instead of stopping.
      workers: processes, or threads where there are fewer parts; None is one for each core.
    """

    name: str = "pairs"
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    validation_share: float = 0.05
    salt: str = ""
    store_side: int | None = None
    tile: int | None = None
    limit: int | None = None
    skip_broken: bool = False
    workers: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(
                f"the data set's name {self.name!r} needs small letters, digits and _, a letter "
                "first"
            )
        if not 0 <= self.validation_share < 1:
            raise UserError(f"validation_share {self.validation_share} is outside 0 <= share < 1")
        for field in ("store_side", "tile", "limit", "workers"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}: give 1 or more, or leave it")
        if self.tile is not None and self.store_side is not None:
            raise UserError("store_side and tile are both set: tiles are stored as they are cut")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain JSON."""
        plain = dataclasses.asdict(self)
        del plain["workers"]
        return json.loads(json.dumps(plain))

    def order(self, key: str) -> str:
        """What records are sorted by within a shard, and limited by."""
        return hashlib.sha256(f"order {self.salt} {key}".encode()).hexdigest()[:32]

    def split(self, group: str) -> str:
        """The split that a group is in."""
        digest = hashlib.sha256(f"split {self.salt} {group}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return "validation" if share < self.validation_share else "train"
