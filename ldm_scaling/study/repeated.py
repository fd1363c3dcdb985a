"""Sizes that were trained several times, see `config.Study.repeats`: the mean of their runs, with
replicates that hold the chance of another run. Pure functions on records.

The runs of a size share autoencoder, pictures, prompts and the noise that is sampled, and differ
in what another seed changes. That is a run's luck, which moves all of its cells together, so a
replicate draws luck for a size as a whole: a mixture of all runs' deviations from the mean of their
size, cell by cell, with random normal weights. Its covariance over cells is the runs' own, and what
few runs leave unknown of its scale is drawn too, which makes intervals Student's. All sizes' runs
are taken to scatter alike (a distance relative to its value), as `statistics.scatter` takes those
of a law: two or three runs of one size alone say nearly nothing of its spread. So a size that was
trained once has the same luck, undivided.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ldm_scaling.config import repeats
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import labels, scores
from ldm_scaling.study.records import TEXT_TO_IMAGE, Identity, Record

LEAST_FREEDOM = 2
"""Runs beyond each size's first, over all sizes, from which on luck is drawn: of one alone even
Student's t has no spread."""
_SALT = 20240401


def merged(records: Sequence[Record], luck: bool = True) -> list[Record]:
    """The records with those of further training runs in the first's, which stand for all: metrics
    are means over the runs that have the configuration, replicates hold luck as well.

    What further runs lack is moved as the mean moves the first run's record beside it, of the same
    sampler, steps and block: other rates on the block that chose, so that the same one stays the
    best and sizes compare by their means, and checkpoints along training. Whatever was trained
    once, students and cascades too, has the luck of one run.

    Args:
      records: of one study, of any tasks: luck is told by all sizes together.
      luck: whether replicates are to hold it, or are means too.
    """
    runs, firsts = _further(records), first_runs(records)
    if not runs or not firsts:
        return list(records)
    found = _Luck.of(firsts, runs)
    moves: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    means = []
    for r in firsts:
        own = [r, *runs.get((r.identity.model_hash, _place(r)), ())]
        mean = r if len(own) == 1 else _mean(own)
        means.append(mean)
        if mean is not r:
            moves[_beside(r)].append({
                name: _moved(name, r.metrics[name], mean.metrics[name], found)
                for name in mean.metrics})
    out = []
    for r, mean in zip(firsts, means, strict=True):
        there = moves.get(_beside(r)) if mean is r else None
        now = _moved_by(r, there, found) if there else mean
        out.append(found.into(now) if luck else now)
    return out


def first_runs(records: Sequence[Record]) -> list[Record]:
    """The records without those of further runs: students, and all that is made of members, begin
    with the first."""
    return [r for r in records if not r.repeats]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the training runs of one size differ in a measure.

    Attributes:
      sd: standard deviation of a run about its size's mean, over all cells that are reported; of a
        distance relative to its value.
      relative: whether it is.
      freedom: runs beyond each size's first.
      sizes: that were trained several times.
    """

    sd: float
    relative: bool
    freedom: int
    sizes: int


def spread(records: Sequence[Record], metric: str) -> Spread | None:
    """The `Spread` of a measure by the records of all runs; None where no size has several."""
    runs = _further(records)
    luck = _Luck.of(first_runs(records), runs)
    shares = [d_J @ d_J / freedom for (_, name), (d_J, freedom) in luck.deviations.items()
              if name == metric]
    if not shares:
        return None
    return Spread(float(np.sqrt(np.mean(shares))), metric in luck.relative, luck.freedom,
                  len({hash for hash, _ in runs}))


def by_run(records: Sequence[Record], metric: str) -> dict[Identity, dict[int, float]]:
    """Configurations that several runs are measured at, as the first's records name them -> the
    measure by run, from 0."""
    runs = _further(records)
    out = {}
    for r in first_runs(records):
        own = [r, *runs.get((r.identity.model_hash, _place(r)), ())]
        if len(own) > 1 and all(metric in o.metrics for o in own):
            out[r.identity] = {o.run: o.metrics[metric] for o in own}
    return out


def words(records: Sequence[Record]) -> str:
    """How often the sizes of merged records were trained, and whether intervals cover the chance of
    another run, in a sentence or two; empty where none has several runs."""
    members = [r for r in records if r.task == TEXT_TO_IMAGE]
    # Without replicates nothing tells blocks that report from others.
    drawn = [r for r in members if r.replicates]
    trained: dict[str, list[int]] = {}
    for r in sorted(drawn or members, key=lambda r: (r.params, r.identity.model)):
        trained.setdefault(r.identity.model, []).append(r.runs)
    by: dict[int, list[str]] = defaultdict(list)
    for model, own in trained.items():
        by[max(own)].append(model)
    if max(by, default=1) == 1:
        return ""
    told = "; ".join(
        f"{labels.listing(by[n])} {'was' if len(by[n]) == 1 else 'were'} trained "
        f"{'once' if n == 1 else f'{n} times'}" for n in sorted(by, reverse=True))
    freedom = luck_of(records)
    few = sum(n < max(own) for own in trained.values() for n in own)
    less = f" {labels.counted(few, 'cell')} {'has' if few == 1 else 'have'} fewer runs." * (few > 0)
    if not freedom:
        why = "two runs of one size do not say how far another would be" if drawn else (
            "there are no replicates")
        return (f"{told}: values are means over runs, but {why}, and no interval covers that."
                f"{less}")
    return (f"{told}: values are means over runs, and intervals and probabilities cover the chance "
            f"of another run ({freedom} degrees of freedom, all sizes together).{less}")


def luck_of(records: Sequence[Record]) -> int:
    """Degrees of freedom of the luck that replicates of merged records hold; 0 where they hold
    none."""
    return max((r.freedom for r in records), default=0)


def networks(records: Sequence[Record], models: Sequence[str]) -> list[str]:
    """Names of the training runs of sizes that have records, see `config.repeats`, the first ones
    before others."""
    further = {(r.run, r.identity.model) for r in records if r.repeats}
    order = {model: k for k, model in enumerate(models)}
    return [*models, *(repeats.name(model, run) for run, model in sorted(
        (own for own in further if own[1] in order), key=lambda own: (own[0], order[own[1]])))]


def _further(records: Sequence[Record]) -> dict[tuple[str, Identity], list[Record]]:
    """The further runs' records by the first's network and the configuration."""
    out: dict[tuple[str, Identity], list[Record]] = defaultdict(list)
    for r in sorted((r for r in records if r.repeats), key=lambda r: r.run):
        out[r.repeats, _place(r)].append(r)
    return out


def _place(record: Record) -> Identity:
    """The configuration that several runs are measured at."""
    return dataclasses.replace(record.identity, model_hash="")


def _beside(record: Record) -> Identity:
    """The same network's configuration at whatever guidance and length of training."""
    return dataclasses.replace(record.identity, guidance=0.0, train_step=0)


def _pool(record: Record) -> Identity:
    """What sizes are alike in where their runs' deviations are held to be one another's."""
    return dataclasses.replace(_place(record), model="", guidance=0.0, train_step=0)


def _mean(runs: Sequence[Record]) -> Record:
    """The mean over runs at one configuration, of the measures that all have, the first one's in
    all else."""
    held = [name for name in runs[0].metrics if all(name in r.metrics for r in runs)]
    for name in held:
        numbers = [len(r.replicates.get(name, ())) for r in runs]
        if len({*numbers}) > 1:
            i = runs[0].identity
            raise UserError(f"{i.model}, {i.sampler}, {i.steps} steps: its training runs hold "
                            f"{numbers} replicates; measure them with one number")
    drawn = [name for name in held if runs[0].replicates.get(name)]
    replicates = {name: np.mean([r.replicates[name] for r in runs], axis=0) for name in drawn}
    return dataclasses.replace(
        runs[0], runs=len(runs),
        metrics={name: float(np.mean([r.metrics[name] for r in runs])) for name in held},
        replicates={name: values_R.tolist() for name, values_R in replicates.items()},
        intervals={name: scores.interval(name, values_R, runs[0].identity.num_images - 1)
                   for name, values_R in replicates.items()},
    )


def _moved(name: str, one: float, mean: float, luck: _Luck) -> float:
    return mean / one if name in luck.relative else mean - one


def _moved_by(record: Record, moves: Sequence[dict[str, float]], luck: _Luck) -> Record:
    """The record with its metrics, replicates and intervals moved by the mean of some moves."""
    metrics, replicates, intervals = dict(record.metrics), {}, {}
    for name in record.metrics:
        own = [move[name] for move in moves if name in move]
        by = float(np.mean(own)) if own else 1.0 if name in luck.relative else 0.0

        def moved(value: float, name: str = name, by: float = by) -> float:
            return value * by if name in luck.relative else value + by

        metrics[name] = moved(record.metrics[name])
        if name in record.replicates:
            replicates[name] = [moved(value) for value in record.replicates[name]]
        if name in record.intervals:
            low, high = record.intervals[name]
            intervals[name] = moved(low), moved(high)
    return dataclasses.replace(
        record, metrics=metrics, replicates=replicates, intervals=intervals)


@dataclasses.dataclass(frozen=True, eq=False)
class _Luck:
    """What runs of one size differ by.

    Attributes:
      deviations: (pool, metric) -> of each of J runs from its size's mean, 0 of those that lack the
        cell; and how many runs there are beyond each size's first. Of relative metrics in logs.
      relative: metrics whose deviations are relative: distances above 0.
      freedom: runs beyond each size's first, of all cells.
      runs: J.
    """

    deviations: dict[tuple[Identity, str], tuple[np.ndarray, int]]
    relative: frozenset[str]
    freedom: int
    runs: int

    @classmethod
    def of(
        cls, firsts: Sequence[Record], runs: dict[tuple[str, Identity], list[Record]]
    ) -> _Luck:
        first_of = {(r.identity.model_hash, _place(r)): r for r in firsts}
        groups = [[first_of[key], *own] for key, own in runs.items() if key in first_of]
        reported = [own for own in groups if any(r.replicates for r in own)]
        values: dict[str, list[float]] = defaultdict(list)
        for r in (r for own in groups for r in own):
            for name, value in r.metrics.items():
                values[name].append(min([value, *r.replicates.get(name, ())]))
        distances = {name for name in values if name in labels.measures()
                     and labels.measure(name).better == "lower"}
        relative = frozenset(name for name in distances if min(values[name]) > 0)
        hashes = sorted({r.identity.model_hash for own in groups for r in own})
        number = {hash: k for k, hash in enumerate(hashes)}
        found: dict[tuple[Identity, str], tuple[np.ndarray, int]] = {}
        for own in reported:
            for name in own[0].metrics:
                if any(name not in r.metrics for r in own):
                    continue
                value_R = np.array([r.metrics[name] for r in own])
                value_R = np.log(value_R) if name in relative else value_R
                d_J, freedom = found.get((_pool(own[0]), name), (np.zeros(len(number)), 0))
                d_J[[number[r.identity.model_hash] for r in own]] = value_R - value_R.mean()
                found[_pool(own[0]), name] = d_J, freedom + len(own) - 1
        freedom = len(number) - len({own[0].identity.model_hash for own in groups})
        return cls(found, relative, freedom, len(number))

    def _of_cell(self, record: Record, name: str) -> tuple[np.ndarray, int] | None:
        """The deviations at a record's cell, or where no runs have that the mean over cells that
        differ from it in nothing but the sampler, its steps and spacing."""
        pool = _pool(record)
        if (pool, name) in self.deviations:
            return self.deviations[pool, name]

        def anyhow(i: Identity) -> Identity:
            return dataclasses.replace(i, sampler="", steps=0, spacing="", version="", first="")

        alike = [found for (other, metric), found in self.deviations.items()
                 if metric == name and anyhow(other) == anyhow(pool)]
        if not alike:
            return None
        return np.mean([d_J for d_J, _ in alike], axis=0), max(freedom for _, freedom in alike)

    def into(self, record: Record) -> Record:
        """The record with luck in its replicates."""
        if self.freedom < LEAST_FREEDOM or not record.replicates:
            return record
        replicates, intervals = dict(record.replicates), dict(record.intervals)
        for name, values in record.replicates.items():
            found = self._of_cell(record, name)
            if found is None or not values:
                continue
            d_J, freedom = found
            # One luck of a size, whatever the cell, block and metric.
            rng = np.random.default_rng(
                [_SALT, zlib.crc32(record.identity.model_hash.encode()), len(values)])
            weight_RJ = rng.normal(size=(len(values), self.runs))
            tail_R = np.sqrt(self.freedom / rng.chisquare(self.freedom, len(values)))
            luck_R = tail_R * (weight_RJ @ d_J) / np.sqrt(record.runs * freedom)
            values_R = bootstrap.widened(np.array(values), record.identity.num_images - 1)
            values_R = values_R * np.exp(luck_R) if name in self.relative else values_R + luck_R
            replicates[name] = values_R.tolist()
            # Both have Student's tails already.
            intervals[name] = scores.interval(name, values_R, math.inf, bool(record.round))
        return dataclasses.replace(
            record, replicates=replicates, intervals=intervals, freedom=self.freedom)
