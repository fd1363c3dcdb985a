"""Curves: the best guidance of every cell, and quality against cost. Pure functions on records."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import labels, repeated, scores
from ldm_scaling.study.records import (
    CHOSEN,
    TEXT_TO_IMAGE,
    Identity,
    Record,
    raced_reference,
)

Cell = tuple[str, str, int]
"""(model, sampler, steps): what has one best guidance rate."""

Choice = dict[Cell, float]
"""The guidance rate chosen for every cell."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One cell of the sweep at the guidance chosen for it.

    Attributes:
      model: name of the size.
      sampler: name of the sampler.
      steps: sampling steps.
      guidance: rate chosen on the selection block.
      cost: normalised cost x network calls.
      seconds: measured seconds per image; 0 where they were not measured.
      value: the measure on the report block.
      low: lower end of its 95% interval, or None.
      high: upper end of its 95% interval, or None.
      chosen_by: loss on the selection block (the measure that chose the guidance, its sign such
        that smaller is better); what later choices between cells may use without looking at the
        report block.
      replicates_R: paired bootstrap replicates on the report block; empty where none were drawn.
      num_images: images behind `value`.
      task: what the network is for, as `Record.task`.
      choosing_images: images behind `chosen_by`, as many unless told: fewer after a race.
      train_step: training step of its checkpoint.
      taught: of `cost`, the share of training where that is counted, see `pricing.Training`.
      lucky: whether replicates hold the luck of a training run, see `study.repeated`.
    """

    model: str
    sampler: str
    steps: int
    guidance: float
    cost: float
    seconds: float
    value: float
    low: float | None
    high: float | None
    chosen_by: float
    replicates_R: np.ndarray
    num_images: int
    task: str = TEXT_TO_IMAGE
    choosing_images: int | None = None
    train_step: int = 0
    taught: float = 0.0
    lucky: bool = False

    def at(self, axis: str) -> float:
        """Its place on an axis of `labels.AXES`: "cost", "seconds" or "steps"."""
        return {"cost": self.cost, "seconds": self.seconds, "steps": float(self.steps)}[axis]

    @property
    def freedom(self) -> float:
        """Degrees of freedom of its images, see `bootstrap.interval`; those of one block, if it is
        a mean over several. Replicates that hold luck are as wide as that already."""
        return math.inf if self.lucky else self.num_images - 1


Curves = dict[tuple[str, str], list[Point]]
"""(model, sampler) -> points, sorted by cost."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """A cell of which something has not been measured.

    Attributes:
      cell: (model, sampler, steps).
      guidance: rates that other cells of the sampler have and this one lacks (selection block).
      reported: whether the chosen rate was measured on the report block.
    """

    cell: Cell
    guidance: tuple[float, ...]
    reported: bool


def models(records: Iterable[Record]) -> list[str]:
    """The sizes, smallest first (by parameters, then by name)."""
    return [m for _, m in sorted({(r.params, r.identity.model) for r in records})]


def samplers(records: Iterable[Record]) -> list[str]:
    """The samplers, DDIM (the paper's default) first, then by name."""
    found = {r.identity.sampler for r in records}
    return sorted(found, key=lambda s: (s.partition(", ")[0] != "ddim", s))


def drawn(records: Iterable[Record], curves: Curves) -> list[str]:
    """The samplers that have a curve, in the order of `samplers`."""
    return [s for s in samplers(records) if any(s == k for _, k in curves)]


def measures(records: Sequence[Record]) -> list[str]:
    """The measures that any of these holds, in the order of `labels.measures`."""
    return [name for name in labels.measures() if any(name in r.metrics for r in records)]


def longest(records: Sequence[Record], settings: Sequence[str] = ()) -> list[Record]:
    """The records of each size's longest training, of one task.

    Students of halving are no lengths of one training: each cell has that of `own_students`. Of
    several settings of what was made of members one is taken, see `one_setting`.
    """
    records = one_setting(records, settings)
    steps: dict[str, int] = {}
    for r in records:
        steps[r.identity.model] = max(steps.get(r.identity.model, 0), r.identity.train_step)
    students = own_students([r for r in records if r.student_steps])
    return [
        r for r in records if not r.student_steps and
        r.identity.train_step == steps[r.identity.model]
    ] + students


def own_students(records: Sequence[Record]) -> list[Record]:
    """Of students of halving, which are measured at each other's steps too, each cell's own: that
    of as many steps, or the nearest."""
    nearest: dict[Cell, tuple[int, int]] = {}
    for r in records:
        cell = (r.identity.model, r.identity.sampler, r.identity.steps)
        away = (abs(r.student_steps - r.identity.steps), r.student_steps)
        nearest[cell] = min(nearest.get(cell, away), away)
    return [
        r for r in records if r.student_steps == nearest[
            r.identity.model, r.identity.sampler, r.identity.steps][1]
    ]


def one_setting(records: Sequence[Record], settings: Sequence[str] = ()) -> list[Record]:
    """The records with one setting of each task, where a workdir holds students of several methods
    or settings, or cascades, fine-tunings or DreamBooth of several: one of `settings` where there
    are records of it, else that of most sizes, of these the first method by name, CoDi's before
    LCM's, of its settings the one that was trained for longest, and the first by name.

    Where each size has a workdir of its own, their configs may differ in what a size needs: others
    of `settings`, of the same method and of other sizes, join it and take its name.

    Args:
      records: of any tasks.
      settings: to be preferred, such as those of workdirs' last configs.
    """
    kept = _kept_settings(records, settings)
    return [
        r if r.setting == kept[r.task][0] else dataclasses.replace(r, setting=kept[r.task][0])
        for r in records if r.setting in kept[r.task]
    ]


def _kept_settings(records: Sequence[Record], settings: Sequence[str]) -> dict[str, list[str]]:
    """Of each task the setting that is taken, and those that join it, see `one_setting`."""
    found: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        found[r.task][r.setting].append(r)
    out = {}
    for task, own in found.items():
        sizes = {name: {r.identity.model for r in some} for name, some in own.items()}
        steps = {name: max(r.identity.train_step for r in some) for name, some in own.items()}
        first, *rest = sorted(own, key=lambda name: (
            name not in settings, -len(sizes[name]), _method(name), -steps[name], name))
        out[task], taken = [first], sizes[first]
        for name in rest:
            both = {first, name} <= {*settings} and _method(name) == _method(first)
            if both and not taken & sizes[name]:
                out[task].append(name)
                taken = taken | sizes[name]
    return out


def _method(setting: str) -> str:
    return setting.rpartition("_")[0]


def other_settings(records: Sequence[Record], settings: Sequence[str] = ()) -> list[str]:
    """What `one_setting` leaves out, a sentence for each task of which it does."""
    steps: dict[str, dict[str, int]] = defaultdict(dict)
    for r in records:
        own = steps[r.task]
        own[r.setting] = max(own.get(r.setting, 0), r.identity.train_step)
    out = []
    for task, kept in _kept_settings(records, settings).items():
        def named(some: Iterable[str], word: str, own: dict[str, int] = steps[task]) -> str:
            return labels.listing(
                [f"{setting or 'one without a name'} ({own[setting]:,} steps of training)"
                 for setting in some], word)

        if others := sorted(steps[task].keys() - {*kept}):
            out.append(
                f"{labels.task(task)}: the records are of {len(steps[task])} settings, of which "
                f"{named(kept, 'and')} {'are' if kept[1:] else 'is'} used, and not "
                f"{named(others, 'or')}."
            )
    return out


def last_rounds(records: Sequence[Record]) -> list[Record]:
    """The records without those of a race that others replace, which hold their images and more: of
    a later round, of another race that drew more, or of all images without a race."""
    def race(r: Record) -> Identity:
        i = r.identity
        reference = i.reference_hash if r.round else raced_reference(i)
        return dataclasses.replace(i, num_images=0, reference_hash=reference)

    def drawn(r: Record) -> tuple[bool, int, int]:
        return not r.round, r.identity.num_images, r.round

    if not any(r.round for r in records):
        return list(records)
    last: dict[Identity, tuple[bool, int, int]] = {}
    for r in records:
        last[race(r)] = max(drawn(r), last.get(race(r), drawn(r)))
    return [r for r in records if not r.round or drawn(r) == last[race(r)]]


def distinct(records: Sequence[Record]) -> list[Record]:
    """The records with one name per arm, see `arms`."""
    return [arm for _, arm in arms(records)]


def arms(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Each record as it is stored and with its arm's name, checked to hold each configuration once.

    A sampler measured with several timestep spacings becomes several arms ("ddim, trailing"); so
    does one behind several first stages of a cascade ("ddim, after 4 of ddim"), whose spacing is
    named where there are several too ("ddim, after 4 of ddim, trailing").
    Of a guidance rate's rounds in a race only the last is kept, and training runs of one size
    become their mean, see `repeated.merged`. Raises `UserError` when two records
    still share model, sampler, steps, guidance and seed block (two checkpoints, two code versions):
    a curve through a mixture would mean nothing. So when rates of one cell that did not race have
    other numbers of images on a block: with fewer a distance is larger.
    """
    records = repeated.merged(last_rounds(records))
    spacings: dict[str, set[str]] = defaultdict(set)
    firsts: dict[str, set[str]] = defaultdict(set)
    for r in records:
        spacings[r.identity.sampler].add(r.identity.spacing)
        if r.first:
            firsts[r.first.sampler].add(r.first.spacing)
    out = []
    for stored in records:
        r, i = stored, stored.identity
        name = f"{i.sampler}, {i.spacing}" if len(spacings[i.sampler]) > 1 else i.sampler
        if r.first and ", after " not in name:
            name += f", after {r.first.steps} of {r.first.sampler}"
            name += f", {r.first.spacing}" * (len(firsts[r.first.sampler]) > 1)
        if name != i.sampler:
            r = dataclasses.replace(r, identity=dataclasses.replace(i, sampler=name))
        out.append((stored, r))
    _check_arms(out)
    return out


class Clash(UserError):
    """Two records of one configuration.

    Attributes:
      keys: of the two.
      what: the configuration, and in what the two differ.
      count: configurations of which that holds.
    """

    def __init__(self, a: Identity, b: Identity, count: int):
        other = dataclasses.asdict(b)
        differ = [f"{k} {v!r} and {other[k]!r}" for k, v in dataclasses.asdict(a).items()
                  if v != other[k]] or ["nothing: the record was given twice"]
        self.keys, self.count = (a.key, b.key), count
        self.what = (
            f"two records for {b.model}, {b.sampler}, {labels.steps(b.steps)}, guidance "
            f"{b.guidance}, seed block {b.seed_block}; they differ in {'; '.join(differ)}"
        )
        super().__init__(f"{self.what}: keep one of {a.key}.json and {b.key}.json in the records "
                         "folder")


def _check_arms(found: Sequence[tuple[Record, Record]]) -> None:
    """Raises `UserError` where `arms` would hold a configuration twice, or rates of one cell other
    numbers of images."""
    places = [(i.model, i.sampler, i.steps, i.guidance, i.seed_block)
              for i in (arm.identity for _, arm in found)]
    seen: dict[tuple, Identity] = {}
    whole: dict[tuple, Identity] = {}
    for place, (stored, arm) in zip(places, found, strict=True):
        i = stored.identity
        if place in seen:
            twice = sum(n > 1 for n in Counter(places).values())
            raise Clash(seen[place], i, twice)
        seen[place] = i
        if not arm.round:
            *cell, _, block = place
            other = whole.setdefault((*cell, block), i)
            if other.num_images != i.num_images:
                raise UserError(_uneven(other, i))


def _uneven(a: Identity, b: Identity) -> str:
    return (
        f"{b.model}, {b.sampler}, {b.steps} steps, seed block {b.seed_block}: guidance "
        f"{a.guidance:g} was measured on {a.num_images:,} images and {b.guidance:g} on "
        f"{b.num_images:,}, which does not compare: measure all rates with one sweep.num_images, "
        f"and keep the others, {a.key}.json or {b.key}.json and their like, out of the records "
        "folder"
    )


def best_guidance(records: Sequence[Record], metric: str, select_block: int = 0) -> Choice:
    """The guidance rate with the best `metric` in every cell, on one seed block.

    Ties go to the smaller rate. Report the outcome on *another* block: on the same one the
    chosen value is biased towards the good side (the smallest of several noisy numbers). Of rates
    that raced those of the last round are compared.
    """
    sign = labels.measure(metric).sign
    rates: dict[Cell, list[Record]] = defaultdict(list)
    for r in records:
        i = r.identity
        if i.seed_block == select_block and metric in r.metrics:
            rates[i.model, i.sampler, i.steps].append(r)
    best: Choice = {}
    for cell, own in sorted(rates.items()):
        last = max((r.identity.num_images for r in own if r.round), default=0)
        candidates = [r for r in own if not r.round or r.identity.num_images == last]
        best[cell] = min((sign * r.metrics[metric], r.identity.guidance) for r in candidates)[1]
    return best


def quality_curves(
    records: Sequence[Record],
    metric: str,
    choose_by: str | None = None,
    select_block: int = 0,
    report_block: int = 1,
) -> Curves:
    """`metric` at the chosen guidance against cost, per (model, sampler), on the report block.

    Args:
      records: of one study, see `distinct`.
      metric: the measure to report.
      choose_by: the measure that chooses the guidance; `metric` itself unless given.
      select_block: seed block that chooses.
      report_block: seed block that is reported.

    Returns:
      Points sorted by cost. A cell whose chosen rate has no record on the report block is left
      out (`gaps` lists it), so an unfinished sweep gives partial curves.
    """
    choose_by = choose_by or metric
    sign = labels.measure(choose_by).sign
    choice = best_guidance(records, choose_by, select_block)
    place = {(r.identity.model, r.identity.sampler, r.identity.steps, r.identity.guidance,
              r.identity.seed_block): r for r in records}
    curves: Curves = defaultdict(list)
    for (model, sampler, steps), guidance in choice.items():
        record = place.get((model, sampler, steps, guidance, report_block))
        if record is None or metric not in record.metrics:
            continue
        chosen = place[model, sampler, steps, guidance, select_block]
        replicates_R = np.asarray(record.replicates.get(metric, ()), np.float64)
        low, high = _ends(record, metric)
        curves[model, sampler].append(
            Point(model, sampler, steps, guidance, record.cost, record.seconds_per_image,
                  record.metrics[metric], low, high, sign * chosen.metrics[choose_by],
                  replicates_R, record.identity.num_images, record.task,
                  chosen.identity.num_images, record.identity.train_step,
                  lucky=record.freedom > 0)
        )
    return {key: sorted(points, key=lambda p: p.cost) for key, points in sorted(curves.items())}


def _ends(record: Record, metric: str) -> tuple[float | None, float | None]:
    """A record's interval. Those of few images that earlier versions kept are narrower than they
    should be."""
    kept, drawn = record.intervals.get(metric), record.replicates.get(metric)
    freedom = record.identity.num_images - 1
    if not drawn or record.freedom or (kept and freedom >= bootstrap.FEW):
        return kept or (None, None)
    found = scores.interval(metric, np.asarray(drawn), freedom, bool(record.round))
    return (min(found[0], kept[0]), max(found[1], kept[1])) if kept else found


def chosen_curves(
    records: Sequence[Record], metric: str, choose_by: str, select_block: int = 0,
    report_block: int = 1,
) -> tuple[str, Curves]:
    """The measure that chooses guidance, and the curves of `metric`, see `quality_curves`.

    A sweep reports one rate of each cell, the best by one measure. So it is the measure at whose
    best rates most cells are reported: `choose_by` itself where it does as well as any. `chosen_by`
    of the points is of `choose_by` all the same.
    """
    at = {(r.identity.model, r.identity.sampler, r.identity.steps, r.identity.guidance): r.metrics
          for r in records if r.identity.seed_block == select_block}
    sign = labels.measure(choose_by).sign

    def curves(chooser: str) -> Curves:
        found = {
            key: [
                dataclasses.replace(p, chosen_by=sign * chosen) for p in curve
                if (chosen := at[p.model, p.sampler, p.steps, p.guidance].get(choose_by))
                is not None
            ]
            for key, curve in quality_curves(
                records, metric, chooser, select_block, report_block).items()
        }
        return {key: curve for key, curve in found.items() if curve}

    choosers = dict.fromkeys([choose_by, *measures(records)])
    return max(((name, curves(name)) for name in choosers),
               key=lambda one: sum(map(len, one[1].values())))


def own_blocks(
    records: Sequence[Record], select_block: int, report_block: int
) -> tuple[int, int]:
    """The seed blocks that choose the guidance and are reported, of records of one task.

    Networks that take no guidance (super-resolution, distilled ones) leave nothing to choose: where
    they were measured on the report block alone, it stands for both. It never does for
    text-to-image ones: steps within a budget are chosen too.

    Raises:
      UserError: where there would be something to choose.
    """
    if any(r.identity.seed_block == select_block or r.task in CHOSEN for r in records):
        return select_block, report_block
    rates: dict[Cell, set[float]] = {}
    for r in records:
        i = r.identity
        rates.setdefault((i.model, i.sampler, i.steps), set()).add(i.guidance)
    for cell, some in rates.items():
        if len(some) > 1:
            raise UserError(
                f"{cell[0]}, {labels.sampler(cell[1])}, {cell[2]} steps was measured at "
                f"guidance {sorted(some)} on seed block {report_block} alone: measure "
                f"block {select_block} too, where one is chosen without bias"
            )
    return report_block, report_block


def gaps(
    records: Sequence[Record], metric: str, select_block: int = 0, report_block: int = 1
) -> list[Gap]:
    """What a full grid would hold and these records do not, sampler by sampler.

    The full grid of a sampler is every size x every step count x every guidance rate that any
    record of the sampler has. A grid that was thinned on purpose shows up here as well.
    """
    sizes = models(records)
    curves = quality_curves(records, metric, None, select_block, report_block)
    reported = {(p.model, p.sampler, p.steps) for curve in curves.values() for p in curve}
    measured: dict[Cell, set[float]] = defaultdict(set)
    for r in records:
        i = r.identity
        if i.seed_block == select_block and metric in r.metrics:
            measured[i.model, i.sampler, i.steps].add(i.guidance)
    out = []
    for sampler in samplers(records):
        steps = sorted({r.identity.steps for r in records if r.identity.sampler == sampler})
        rates = set().union(*(g for (_, s, _), g in measured.items() if s == sampler))
        for cell in ((m, sampler, n) for m in sizes for n in steps):
            lacking = tuple(sorted(rates - measured.get(cell, set())))
            if lacking or cell not in reported:
                out.append(Gap(cell, lacking, cell in reported))
    return out
