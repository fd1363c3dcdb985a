"""`dreambench:PATH`: the subjects of DreamBooth's evaluation, a few photographs of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ldm_scaling.data import dreambench
from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.data.sources import listing
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import Options


def collection(name: str, path: Path, options: Options) -> DreamBench:
    """The real images, by subject and name."""
    return DreamBench(name, path, options)


@dataclasses.dataclass(frozen=True)
class DreamBench:
    """Photographs of subjects; a part is some of them.

    A pair's key is SUBJECT/FILE, its group the subject, its caption "a photo of a CLASS", which is
    DreamBooth's prompt of the class (arXiv 2208.12242, section 3.2).

    Attributes:
      name: as in `Collection`.
      root: the folder, as `data.dreambench` reads it.
      options: how it is read.
    """

    name: str
    root: Path
    options: Options
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def _bench(self) -> dreambench.DreamBench:
        return dreambench.read(self.root)

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        count = len(self.once.get(self._bench).images)
        return listing.parts(self.root, count, self.options)

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`."""
        bench = self.once.get(self._bench)
        for i in range(*slice(part.start, part.stop).indices(len(bench.images))):
            subject = bench.subjects[i]
            data, error = listing.contents(bench.images.path(i))
            key = listing.key(bench.images.names[i])
            caption = f"a photo of a {bench.classes[subject]}"
            yield Pair(key, data, (caption,), group=subject, error=error)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`."""
        names = [dreambench.FILE, *self._bench().images.names]
        return listing.fingerprint(self.root, names, self.options)
