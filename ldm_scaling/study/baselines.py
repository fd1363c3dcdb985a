"""What restored pictures are held against: the condition as it is given, enlarged, and the pictures
out of the autoencoder, which bounds whoever draws in its latents."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath
from matplotlib.axes import Axes

from ldm_scaling import __version__, files
from ldm_scaling.config.measuring import FRECHET
from ldm_scaling.errors import UserError
from ldm_scaling.study import curves, labels
from ldm_scaling.study.plot_style import INK, SOFT
from ldm_scaling.study.records import ANEW, Record

GIVEN, AUTOENCODER = "as given", "autoencoder alone"
_SAID = (FRECHET, "stlpips_alex", "psnr")  # A distance, and two to each picture's own.
FOLDER = "baselines"


@dataclasses.dataclass(frozen=True)
class Baselines:
    """The scores of one seed block.

    Attributes:
      task: see `records.RESTORING`.
      reference_hash: of what scored them, as in records.
      seed_block, num_images: of the pictures.
      metrics: baseline -> measure -> value.
      intervals: baseline -> measure -> (low, high), 95%.
    """

    task: str
    reference_hash: str
    seed_block: int
    num_images: int
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]

    def fits(self, record: Record) -> bool:
        """Whether a record is of the same pictures and measures."""
        i = record.identity
        return record.task == self.task and (
            (i.reference_hash, i.num_images) == (self.reference_hash, self.num_images)
        )

    def value(self, name: str, metric: str) -> str:
        """`0.61 [0.59, 0.63]`."""
        return (
            f"{labels.number(self.metrics[name][metric])} "
            f"{labels.interval(*self.intervals[name][metric])}"
        )


def path_of(
    workdir: epath.Path, task: str, reference_hash: str, seed_block: int, num_images: int
) -> epath.Path:
    """Where they lie in a workdir."""
    name = files.sha256_of([task, reference_hash, seed_block, num_images, __version__])
    return epath.Path(workdir) / FOLDER / f"{task}_{name[:8]}.json"


def write(path: epath.Path, baselines: Baselines) -> None:
    """Writes them, whole or not at all."""
    files.write_json(path, dataclasses.asdict(baselines))


def _read(path: epath.Path) -> Baselines:
    try:
        body: dict[str, Any] = json.loads(path.read_text())
        body["intervals"] = {
            name: {metric: (ends[0], ends[1]) for metric, ends in of.items()}
            for name, of in body["intervals"].items()
        }
        found = Baselines(**body)
        values = [v for of in found.metrics.values() for v in of.values()]
        if not values or not all(map(math.isfinite, values)):
            raise ValueError("it has no values")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise UserError(f"the baselines in {path} are damaged ({e}): {ANEW}") from e
    return found


def of_records(workdir: epath.PathLike, records: Sequence[Record]) -> list[Baselines]:
    """Those in a workdir that fit records, one of each task and reference.

    Raises:
      UserError: for a damaged file.
    """
    folder = epath.Path(workdir) / FOLDER
    if not folder.exists():
        return []
    found = [_read(p) for p in sorted(folder.glob("*.json")) if not p.name.startswith(".")]
    fit = fitting(found, records)
    return list({(b.task, b.reference_hash, b.num_images): b for b in reversed(fit)}.values())


def fitting(held: Sequence[Baselines], records: Sequence[Record]) -> list[Baselines]:
    """Those that fit records."""
    return [b for b in held if any(map(b.fits, records))]


def findings(held: Sequence[Baselines], records: Sequence[Record]) -> list[str]:
    """What is said of restored pictures and their baselines, see `sentences`."""
    return list(dict.fromkeys(
        line for b in held for metric in _SAID for line in sentences(b, records, metric)))


def sentences(baselines: Baselines, records: Sequence[Record], metric: str) -> list[str]:
    """How the largest member compares with them after the longest fine-tuning, at the most steps of
    the first sampler, in a sentence. Nothing is picked by what it scored."""
    sign = labels.measure(metric).sign
    fit = [r for r in records if baselines.fits(r) and metric in r.intervals
           and r.identity.seed_block == baselines.seed_block]
    if not fit or metric not in baselines.metrics[GIVEN]:
        return []
    largest = max(r.params for r in fit)
    order = curves.samplers(fit)
    best = max(
        (r for r in fit if r.params == largest),
        key=lambda r: (r.identity.train_step, -order.index(r.identity.sampler), r.identity.steps),
    )
    i, short = best.identity, labels.measure(metric).short
    better = sign * (baselines.metrics[GIVEN][metric] - best.metrics[metric]) > 0
    (low, high), (least, most) = best.intervals[metric], baselines.intervals[GIVEN][metric]
    sure = "" if high < least or most < low else ", which the intervals leave open"
    said = (
        f"{labels.task(baselines.task)}: {i.model} reaches {short} "
        f"{labels.number(best.metrics[metric])} {labels.interval(*best.intervals[metric])} in "
        f"{labels.steps(i.steps)} after {labels.steps(i.train_step)} of fine-tuning, "
        f"{'better' if better else 'worse'} than the condition {GIVEN} and enlarged, "
        f"{baselines.value(GIVEN, metric)}{sure}"
    )
    if AUTOENCODER in baselines.metrics:
        said += f"; real pictures through the {AUTOENCODER} have "
        said += baselines.value(AUTOENCODER, metric)
    return [f"{said}."]


def draw(ax: Axes, held: Sequence[Baselines], metric: str) -> None:
    """Dashed lines for them; where one lies outside the panel, its value at the edge."""
    low, high = sorted(ax.get_ylim())
    at_edge = {True: 0, False: 0}
    named = {f"{name}: {labels.number(of[metric])}": of[metric]
             for b in held for name, of in b.metrics.items() if metric in of}
    for text, value in named.items():  # Several workdirs may hold the same.
        inside = low <= value <= high
        if inside:
            ax.axhline(value, color=SOFT, linestyle="--", linewidth=1, zorder=0)
        else:
            text += " (above)" if value > high else " (below)"
        y = value if inside else (high if value > high else low)
        above = y < (low + high) / 2
        lines = 0
        if not inside:  # Below one another.
            lines = at_edge[above]
            at_edge[above] += 1
        away = (3 + 10 * lines) * (1 if above else -1)
        ax.annotate(
            text, (0.02, y), xycoords=("axes fraction", "data"), xytext=(0, away),
            textcoords="offset points", va="bottom" if above else "top", fontsize=8,
            color=INK if inside else SOFT,
        )
