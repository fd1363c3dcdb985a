"""The catalogue: every figure of the paper, how it is drawn, and what it needs.

A figure is one function `Source -> {part: Drawn}` and one line of `FIGURES`. Its picture is written
in three formats, its numbers as CSV, and the report shows it in its section.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Sequence

from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.study import plot_style
from ldm_scaling.study.figures import (
    cascades,
    compute,
    distilled,
    downstream,
    equal_compute,
    families,
    family,
    foretold,
    guidance,
    repeats,
    scaling,
    text_to_image,
)
from ldm_scaling.study.figures.source import Drawn, Source

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One figure.

    Attributes:
      name: of its files, before the part's name; what stands before the first `_` is its short
        name.
      paper: the paper's figure, or nothing.
      title: for readers.
      draw: its parts by name ("" where there is one); none where the records do not hold what it
        needs.
      needs: which records those are, to follow "needs".
      section: of the report.
      alt: what it shows, in words.
    """

    name: str
    paper: str
    title: str
    draw: Callable[[Source], dict[str, Drawn]]
    needs: str
    section: str
    alt: str

    @property
    def heading(self) -> str:
        """Title and the paper's figure."""
        return f"{self.title} ({self.paper})" if self.paper else self.title


_CURVE = "records on both seed blocks"
_RESTORED = "records of super_resolution or another image-conditioned task"
FIGURES: list[Entry] = [
    Entry("tab1_family", "Tab. 1", "The family", family.table,
          f"{_CURVE} at one step count that all sizes share", "family",
          "Parameters, GFLOPs, cost and quality of every size; of the paper's sizes its own "
          "figures beside them."),
    Entry("tab1_cost", "Tab. 1", "What a size costs", family.cost,
          "records of text-to-image networks", "family",
          "GFLOPs of a network call against parameters: this study's sizes, and the paper's family "
          "as counted here and as printed, with the one misprint marked."),
    Entry("fig9_cost", "Fig. 9", "Cost and quality", text_to_image.cost, _CURVE, "quality",
          "Left: sampling cost against steps for every size. Right: quality at the best guidance "
          "against sampling cost for every size, with 95% intervals."),
    Entry("fig9_seconds", "Fig. 9, measured time", "Seconds and quality", text_to_image.seconds,
          f"{_CURVE}, timed on one kind of device; those of the reported block count, where "
          "seconds_per_image of 0 is no measurement", "quality",
          "The same as figure 9 with measured seconds per image in place of cost."),
    Entry("fig11_samplers", "Fig. 11", "Other samplers", text_to_image.samplers,
          f"{_CURVE} of two samplers", "quality",
          "Quality against sampling cost for the other samplers, with those of the first sampler "
          "dashed behind them."),
    Entry("fig3_compute", "Fig. 3", "Quality and training compute", compute.training,
          f"{_CURVE} of three networks that differ in size or training steps", "quality",
          "Quality against training compute, a line for each size through its checkpoints."),
    Entry("runs", "", "Training again", repeats.runs,
          f"{_CURVE} of sizes that were trained several times, config.repeats", "quality",
          "Left: quality against sampling cost, the mean over training runs, a dot for each run. "
          "Right: how far each run lies from the mean of its size, over all cells."),
    Entry("winners", "", "Winner by budget", text_to_image.winner, _CURVE, "winners",
          "The best size at each budget: the probability of each, stacked, where there are "
          "replicates."),
    Entry("fig7_guidance", "Fig. 7", "Best guidance", guidance.best_rates,
          "records of two guidance rates on the choosing seed block", "heat",
          "The best guidance rate of every size and step count, one panel per sampler."),
    Entry("fig8_guidance", "Fig. 8", "Guidance and steps", text_to_image.heat,
          "records on the choosing seed block", "heat",
          "Quality over guidance and steps, one panel per size, the best of several rates framed."),
    Entry("tradeoff", "", "Both measures along guidance", text_to_image.trade,
          "records of two measures on the choosing seed block", "trade",
          "The two measures against each other as guidance rises."),
    Entry("fig10_images", "Fig. 10", "Images at equal cost", text_to_image.images,
          "the workdir's strips of images for the records of two sizes at nearly the same cost",
          "images",
          "Sampled images of the same captions, one row per size, grouped so that the rows of a "
          "group cost nearly the same."),
    Entry("families", "", "Families at equal cost", families.by_cost,
          f"{_CURVE} of two families of networks", "family",
          "What each family of networks reaches within a sampling budget, at its best size, "
          "sampler and steps."),
    Entry("training", "", "Training curves", text_to_image.losses,
          "records of text-to-image networks, and the workdir's loss curves of them", "training",
          "Training loss (thin lines) and validation loss (marked) against the step, by size."),
    Entry("law_compute", "", "A law of training compute", scaling.by_compute,
          "validation losses in the workdir, or records on both seed blocks, of three networks "
          "that differ in compute", "training",
          "Validation loss and quality against training compute, with a power law and its 95% "
          "interval."),
    Entry("law_size", "", "A law of size", scaling.by_size,
          "validation losses in the workdir, or records on both seed blocks, of three sizes",
          "training",
          "Validation loss and quality at the end of training against parameters, with the power "
          "law and its 95% interval."),
    Entry("law_isoflop", "", "Sizes at equal training compute", equal_compute.profiles,
          "validation losses or checkpoints' records of four sizes whose runs pass the same "
          "training compute", "training",
          "Left: loss against parameters, a parabola for each training compute, its least marked. "
          "Right: the best size against training compute."),
    Entry("law_largest", "", "The largest size foretold", foretold.largest,
          "validation losses in the workdir, or records on both seed blocks, of four sizes",
          "training",
          "Loss and quality against training compute, and what a law of the smaller sizes "
          "foretells of the largest, with its 95% interval."),
    Entry("fig4_super", "Fig. 4", "Super-resolution and fine-tuning compute", compute.fine_tuning,
          f"{_RESTORED} with a distance, of three sizes or fine-tuning lengths", "downstream",
          "Distances of super-resolution against fine-tuning compute, a line for each size."),
    Entry("fig17_super", "Fig. 17", "Super-resolution's inception score",
          compute.fine_tuning_score,
          f"{_RESTORED} with a score of labels, of three sizes or fine-tuning lengths",
          "downstream",
          "Inception score of super-resolution against fine-tuning compute."),
    Entry("fig12_super", "Fig. 12", "Super-resolution and sampling cost",
          downstream.super_resolution, f"{_RESTORED} with a distance", "downstream",
          "Distance of super-resolution against sampling cost, few and many steps apart."),
    Entry("fig6_dreambooth", "Fig. 6", "DreamBooth by size", downstream.dreambooth,
          "records of task dreambooth with fidelity to subject or prompt", "downstream",
          "Fidelity to subject and prompt of every size after DreamBooth."),
    Entry("fig13_distilled", "Fig. 13", "Consistency distillation", distilled.consistency,
          "records of task consistency beside undistilled ones of the same sizes", "downstream",
          "Quality of distilled networks in few steps beside undistilled ones in more, by size and "
          "against sampling cost."),
    Entry("fig19_guided", "Fig. 19", "Guided distillation", distilled.halving,
          "records of task guided_distillation or progressive_distillation", "downstream",
          "Quality of students of every stage over their sampling steps, a panel for each size."),
    Entry("cascade_cost", "", "Cascades at equal cost", cascades.by_cost,
          "records of task cascade beside those of single networks", "downstream",
          "What single networks and cascades of two reach within a sampling budget, each at its "
          "best networks and steps."),
    Entry("cascade_split", "", "A budget over two stages", cascades.split,
          "records of task cascade", "downstream",
          "Left: quality of every cascade against sampling cost, coloured by the first stage's "
          "share. Right: the share that is best within a budget."),
]


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of the figures that were asked for.

    Attributes:
      names: of the pictures, without suffix, in the catalogue's order.
      skipped: one line for each figure that the records do not allow, or that failed.
    """

    names: tuple[str, ...]
    skipped: tuple[str, ...]


def chosen(names: Sequence[str]) -> list[Entry]:
    """Figures by their names or short names (`fig9` is fig9_cost and fig9_seconds); all without
    any.

    Raises:
      UserError: for a name that none has, with the nearest.
    """
    wanted = set()
    for name in names:
        found = [e.name for e in FIGURES if e.name == name or e.name.split("_")[0] == name]
        if not found:
            known = [e.name for e in FIGURES]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"no figure is called {name!r}; {hint}")
        wanted.update(found)
    return [e for e in FIGURES if e.name in wanted or not names]


def write(
    directory: epath.PathLike, source: Source, names: Sequence[str] = ()
) -> Written:
    """Writes figures as PNG, SVG and PDF, each with a CSV of its numbers.

    Files of parts that are no longer drawn (of samplers that the study dropped) are removed; no
    other file is: which parts were drawn here is kept beside them, in `.parts`. A figure whose
    numbers fail (overflow, a singular matrix) is skipped, so that the others are drawn; one that is
    asked for alone says so.

    Args:
      directory: folder for the files.
      source: what there is to draw.
      names: see `chosen`.

    Raises:
      UserError: for an unknown name, two records of one configuration, or replicates that cannot
        be paired; and for a figure asked for alone that fails.
    """
    written, skipped = [], []
    entries = chosen(names)
    directory = epath.Path(directory)
    parts_before = parts_in(directory)
    for entry in entries:
        why = f"{entry.name} needs {entry.needs}"
        try:
            with plot_style.style():
                parts = entry.draw(source)
        except UserError:
            raise
        except (ArithmeticError, ValueError) as error:
            why = f"{entry.name} failed: {type(error).__name__}: {error}"
            log.exception("%s", why)
            if len(entries) == 1:
                raise UserError(f"{why}; look for records or losses far off the others") from error
            parts = {}
        drawn = {f"{entry.name}_{part}" if part else entry.name: one
                 for part, one in parts.items()}
        mine = {entry.name, *(p for p in parts_before if entry_of(p) is entry)}
        old = mine - drawn.keys()
        for name in old:
            for kind in (*plot_style.FORMATS, "csv"):
                (directory / f"{name}.{kind}").unlink(missing_ok=True)
        parts_now = (parts_before - mine) | (drawn.keys() - {entry.name})
        if parts_now != parts_before or not (directory / _PARTS).exists() and parts_now:
            text = "".join(f"{part}\n" for part in sorted(parts_now))
            files.atomic_write_text(directory / _PARTS, text)
            parts_before = parts_now
        for name, one in drawn.items():
            one.write(directory, name)
        written += drawn
        if not drawn:
            skipped.append(why)
    return Written(tuple(written), tuple(skipped))


_PARTS = ".parts"


def parts_in(directory: epath.PathLike) -> set[str]:
    """Names of those pictures in a folder that are a figure's parts and were drawn by `write`:
    those in `.parts`, or without one those that have a part's name, every format and numbers."""
    directory = epath.Path(directory)
    path = directory / _PARTS
    if path.exists():
        return set(path.read_text("utf-8").splitlines())
    there = {p.name for p in directory.iterdir()} if directory.exists() else set()
    stems = {name.removesuffix(".csv") for name in there if name.endswith(".csv")}
    return {
        stem for stem in stems if (entry := entry_of(stem)) and entry.name != stem
        and there >= {f"{stem}.{kind}" for kind in plot_style.FORMATS}
    }


def entry_of(name: str) -> Entry | None:
    """The figure that a picture of this name is, or would be a part of."""
    return next((e for e in FIGURES if name == e.name or name.startswith(f"{e.name}_")), None)
