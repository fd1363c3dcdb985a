"""Seed blocks: guidance is chosen on one and reported on any number of others."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, scores
from ldm_scaling.study.records import Record


def blocks(records: Sequence[Record]) -> list[int]:
    """The seed blocks there are, rising."""
    return sorted({r.identity.seed_block for r in records})


def pooled(records: Sequence[Record], select_block: int, report_blocks: Sequence[int]
           ) -> list[Record]:
    """The records with the blocks that report merged into the first of them.

    A metric becomes its mean over the blocks: still the expected score at one block's number of
    images, known K times as precisely. Blocks hold other prompts and noise, so their replicates
    are independent, and the mean of the r-th ones is a replicate of the mean, paired between
    configurations as before. All that works on two blocks then works on K + 1.

    The blocks are those that a task has at a training step: networks that were measured on fewer
    (earlier checkpoints, other tasks) have the mean over these. Of them a configuration that lacks
    one is left out, as in an unfinished sweep. Of a single block the records stay what they are;
    they stand as the first of `report_blocks`.

    Raises:
      UserError: when a block both chooses and reports, none reports, one of several holds a
        configuration twice, or the blocks of a configuration different numbers of replicates.
    """
    report_blocks = list(dict.fromkeys(report_blocks))
    if not report_blocks or select_block in report_blocks:
        raise UserError(
            f"guidance is chosen on seed block {select_block} and reported on {report_blocks}: "
            "give at least one other block that reports"
        )
    groups: dict[tuple, list[Record]] = defaultdict(list)
    out = []
    for r in records:
        if r.identity.seed_block in report_blocks:
            everywhere = dataclasses.replace(r.identity, seed_block=0)
            groups[(r.task, *dataclasses.astuple(everywhere))].append(r)
        elif r.identity.seed_block == select_block:
            out.append(r)
    measured: dict[tuple, set[int]] = defaultdict(set)
    for r in (r for group in groups.values() for r in group):
        measured[_kind(r)].add(r.identity.seed_block)
    for group in groups.values():
        there = [b for b in report_blocks if b in measured[_kind(group[0])]]
        if len(there) == 1:
            out += [_on_block(r, report_blocks[0]) for r in group]
        elif {r.identity.seed_block for r in group} == set(there):
            out.append(_on_block(_mean(group, there), report_blocks[0]))
    return out


def _kind(record: Record) -> tuple[str, int]:
    """What is measured on the same blocks."""
    return record.task, record.identity.train_step


def _on_block(record: Record, block: int) -> Record:
    if record.identity.seed_block == block:
        return record
    return dataclasses.replace(
        record, identity=dataclasses.replace(record.identity, seed_block=block))


def _mean(group: Sequence[Record], order: Sequence[int]) -> Record:
    if len(group) > len(order):
        raise UserError(
            f"{group[0].identity.model}, {group[0].identity.sampler}, {group[0].identity.steps} "
            f"steps: {len(group)} records of {len(order)} seed blocks; give each once"
        )
    group = sorted(group, key=lambda r: order.index(r.identity.seed_block))
    metrics = {
        name: float(np.mean([r.metrics[name] for r in group]))
        for name in group[0].metrics if all(name in r.metrics for r in group)
    }
    replicates, intervals = {}, {}
    for name in metrics:
        drawn = [r.replicates.get(name, []) for r in group]
        if len({len(d) for d in drawn}) > 1:
            raise UserError(
                f"{group[0].identity.model}, {group[0].identity.sampler}, "
                f"{group[0].identity.steps} steps: its seed blocks hold "
                f"{[len(d) for d in drawn]} replicates; measure them with one number"
            )
        if drawn[0]:
            mean_R = np.mean(drawn, axis=0)
            replicates[name] = mean_R.tolist()
            freedom = len(group) * (group[0].identity.num_images - 1)
            intervals[name] = scores.interval(
                name, mean_R, freedom, any(r.round for r in group))
    timed = [r.seconds_per_image for r in group if r.seconds_per_image]
    return dataclasses.replace(
        group[0],
        metrics=metrics, replicates=replicates, intervals=intervals,
        seconds_per_image=float(np.mean(timed)) if timed else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Optimism:
    """How much choosing and reporting on the same images would have flattered one cell.

    Attributes:
      cell: (model, sampler, steps).
      guidance: rate chosen on the selection block.
      chosen: the measure there, where it was chosen.
      values: the measure on each block that reports, in their order.
      reported: its mean over them.
      low, high: interval of `reported` from the spread between blocks (Student's t): it needs no
        bootstrap, but at least two blocks; None otherwise.
      flattery: how much better `chosen` looks than `reported`, in the measure's units.
    """

    cell: curves_lib.Cell
    guidance: float
    chosen: float
    values: tuple[float, ...]
    reported: float
    low: float | None
    high: float | None
    flattery: float


def optimism(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int],
    level: float = 0.95,
) -> list[Optimism]:
    """`Optimism` of every cell whose chosen rate was measured on all of `report_blocks`."""
    sign = labels.measure(metric).sign
    choice = curves_lib.best_guidance(records, metric, select_block)
    place = {(r.identity.model, r.identity.sampler, r.identity.steps, r.identity.guidance,
              r.identity.seed_block): r.metrics.get(metric) for r in records}
    out = []
    for cell, guidance in choice.items():
        values = [place.get((*cell, guidance, b)) for b in report_blocks]
        if any(v is None for v in values):
            continue
        chosen, reported = place[(*cell, guidance, select_block)], float(np.mean(values))
        low, high = (bootstrap.block_interval(np.array(values), level) if len(values) > 1
                     else (None, None))
        out.append(Optimism(cell, guidance, chosen, tuple(values), reported, low, high,
                            sign * (reported - chosen)))
    return out


@dataclasses.dataclass(frozen=True)
class Flattery:
    """How much better the choosing block looks than those that report, over all cells.

    Attributes:
      mean: over cells and blocks, in the measure's units; above 0 where the choosing block looks
        better. It holds that block's own luck too, which all its cells share.
      low, high: 95% for what choosing alone does: Student's t of the spread between the blocks
        that report, of which the choosing block's luck is one more draw; None with one block.
      cells: how many.
    """

    mean: float
    low: float | None
    high: float | None
    cells: int


def flattery(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int],
    level: float = 0.95,
) -> Flattery | None:
    """The mean `Optimism` of the cells that all of `report_blocks` hold; None without any.

    Of choosing records with as many images as those that report: not of a race's.
    """
    sign = labels.measure(metric).sign
    found = optimism(records, metric, select_block, report_blocks, level)
    if not found:
        return None
    mean_B = np.mean([sign * (np.array(o.values) - o.chosen) for o in found], axis=0)
    low = high = None
    if len(mean_B) > 1:
        half = (scipy.stats.t.ppf((1 + level) / 2, len(mean_B) - 1) * mean_B.std(ddof=1)
                * np.sqrt(1 + 1 / len(mean_B)))
        low, high = (float(mean_B.mean() + side) for side in (-half, half))
    return Flattery(float(mean_B.mean()), low, high, len(found))
