"""`Source`: what figures are drawn from, sorted by what the measured networks are for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from etils import epath
from matplotlib.figure import Figure

from ldm_scaling import files
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import image_grids, labels, plot_style, repeated
from ldm_scaling.study.baselines import Baselines
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.figures import rows
from ldm_scaling.study.records import RESTORING, Record
from ldm_scaling.study.statistics import bands, blocks
from ldm_scaling.study.statistics.bands import Band

Losses = Mapping[str, Sequence[Sequence[float | None]]]
"""model -> rows [step, train loss, validation loss or None]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """One picture and its numbers.

    Attributes:
      figure: the picture.
      rows: what it shows, for the CSV beside it; columns are the keys, in their order.
    """

    figure: Figure
    rows: Sequence[Mapping[str, object]]

    def write(self, directory: epath.PathLike, name: str, words: str = "") -> None:
        """Writes the picture in each of `plot_style.FORMATS`, the numbers as CSV beside it, and
        its verdict in words, where it has one, as text."""
        directory = epath.Path(directory)
        plot_style.save(self.figure, directory, name)
        files.atomic_write_text(directory / f"{name}.csv", rows.text(self.rows))
        if words:
            files.atomic_write_text(directory / f"{name}.txt", words + "\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What there is to draw.

    Attributes:
      records: of one study, finished or not, of any task and training length.
      metric: the main measure.
      select_block: seed block that chooses the guidance.
      report_blocks: seed blocks that are reported; the mean over several, see `statistics.blocks`.
      loss_curves: of every size.
      images: of cells, for the grids at equal cost.
      captions: of the images.
      baselines: that restored pictures are held against, of any tasks.
      settings: to be preferred where there are several, see `curves.one_setting`.
      spacing: that students' teachers are to be drawn with, see `students.teacher`.
      first_of_several: whether records are of first training runs alone, where there are others.
    """

    records: Sequence[Record]
    metric: str
    select_block: int = 0
    report_blocks: Sequence[int] = (1,)
    loss_curves: Losses = dataclasses.field(default_factory=dict)
    images: image_grids.Images = dataclasses.field(default_factory=dict)
    captions: Sequence[str] = ()
    baselines: Sequence[Baselines] = ()
    settings: Sequence[str] = ()
    spacing: str = ""
    first_of_several: bool = False

    def __post_init__(self) -> None:
        labels.measure(self.metric)

    @property
    def report_block(self) -> int:
        """The block that stands for all that are reported."""
        return self.report_blocks[0]

    @functools.cached_property
    def _pooled(self) -> list[Record]:
        merged = repeated.merged(curves_lib.last_rounds(self.records))
        return blocks.pooled(merged, self.select_block, self.report_blocks)

    @functools.cached_property
    def first_runs(self) -> Source:
        """The same of the first training runs alone, which students are made of."""
        own = repeated.first_runs(self.records)
        return dataclasses.replace(self, records=own, first_of_several=len(own) < len(self.records))

    def of_task(self, task: str) -> list[Record]:
        """Records of networks for a task, at any training step, those of the blocks that report as
        one."""
        return [r for r in self._pooled if r.task == task]

    @functools.cached_property
    def restoring(self) -> dict[str, list[Record]]:
        """The records of every image-conditioned task that there are some of, of one fine-tuning
        each, by the part of a figure that is the task's: nothing of super-resolution, the paper's,
        else its name."""
        found = {task: curves_lib.one_setting(self.of_task(task), self.settings)
                 for task in RESTORING}
        return {"" if task == RESTORING[0] else task: own for task, own in found.items() if own}

    @functools.cached_property
    def main(self) -> list[Record]:
        """The text-to-image records of each size's longest training, one per configuration."""
        return self.distinct(self.of_task("text_to_image"))

    def distinct(self, records: Sequence[Record]) -> list[Record]:
        """Of each size the longest training, see `curves.distinct`."""
        return curves_lib.distinct(curves_lib.longest(records, self.settings))

    @functools.cached_property
    def curves(self) -> Curves:
        """The main measure's curves of `main`."""
        return self.curves_of(self.main, self.metric)

    @functools.cached_property
    def bands(self) -> dict[tuple[str, str], Band]:
        """The bands of `curves`."""
        return bands.of_curves(self.curves)

    @functools.cached_property
    def samplers(self) -> list[str]:
        """Those that have a curve, DDIM first."""
        return curves_lib.drawn(self.main, self.curves)

    @functools.cached_property
    def sizes(self) -> list[str]:
        """Of `main`, smallest first."""
        return curves_lib.models(self.main)

    def measures(self, records: Sequence[Record]) -> list[str]:
        """The measures that these hold: the main one first, then in the table's order."""
        return sorted(curves_lib.measures(records), key=lambda name: name != self.metric)

    def pair(self, records: Sequence[Record]) -> list[str]:
        """The main measure and the one it is seen against, see `labels.traded`, of those that
        these records hold."""
        held = self.measures(records)
        return [m for m in (self.metric, labels.traded(self.metric, held)) if m in held]

    def blocks(self, records: Sequence[Record]) -> tuple[int, int]:
        """The seed blocks that choose the guidance and are reported, see `curves.own_blocks`."""
        return curves_lib.own_blocks(records, self.select_block, self.report_block)

    def curves_of(self, records: Sequence[Record], metric: str) -> Curves:
        """Curves of distinct records; guidance is chosen by the main measure where they hold it, or
        by that which the sweep reports the best rates of, see `curves.chosen_curves`."""
        chooses = self.metric if any(self.metric in r.metrics for r in records) else metric
        return curves_lib.chosen_curves(records, metric, chooses, *self.blocks(records))[1]

    def chooser(self, records: Sequence[Record]) -> str:
        """The measure that chooses the guidance of distinct records, which hold the main one."""
        return curves_lib.chosen_curves(
            records, self.metric, self.metric, *self.blocks(records))[0]
