"""Several sources in the same batches, by weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from ldm_scaling.data.loading.source import Source
from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """What `loader.train_loader` takes in place of a source.

    Each source is shuffled and repeated by itself, so that a small one goes through several epochs
    while a large one goes through a part of its first. After any number of examples each source's
    count is next to its share: within 1 of it for two sources, see `order.turn`. (grain's own
    `MapDataset.mix` cuts weights to hundredths of the smallest, and is further off.)

    Attributes:
      sources: all give arrays of the same names, types and shapes.
      weights: above 0; only their ratio matters.

    Raises:
      UserError: naming weights that are not above 0, or not one for each source.
    """

    sources: Sequence[Source]
    weights: Sequence[float]

    def __post_init__(self):
        if not self.sources or len(self.sources) != len(self.weights):
            raise UserError(
                f"a mixture of {len(self.sources)} sources with {len(self.weights)} weights: give "
                "one weight for each"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise UserError(
                f"a mixture with weights {list(self.weights)}: they must be above 0; leave out a "
                "source that is not wanted"
            )

    def shares(self) -> tuple[Fraction, ...]:
        """The weights as exact fractions that sum to 1; a weight of 0.1 is one tenth."""
        exact = [Fraction(repr(float(weight))) for weight in self.weights]
        return tuple(weight / sum(exact) for weight in exact)
