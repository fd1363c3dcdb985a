"""Budgets of training as people write them, "1e18 flops" or "300 h"; what a time is in FLOPs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import chips
from ldm_scaling.study import budgets, labels
from ldm_scaling.study.costing import Unit
from ldm_scaling.study.statistics.scaling import BACKWARD
from ldm_scaling.training.meter import PRODUCTIVE

FORMS = '"1e18 flops", "3 exaflops", "300 h", "2 days" or "20 gpu hours"'
UTILISATION = 0.35
"""Of a chip's peak, where none is given: that of 866m's training on one H200, benchmarks/gpu."""

_SPELLINGS: dict[str, tuple[Unit, float]] = {
    **{name: unit for name, unit in budgets.SPELLINGS.items() if unit[0] in ("seconds", "gflops")},
    **{f"{name}{plural}": ("seconds", scale) for name, scale in (
        ("h", 3600.0), ("hr", 3600.0), ("hour", 3600.0), ("d", 86400.0), ("day", 86400.0),
        ("week", 604800.0), ("minute", 60.0)) for plural in ("", "s")},
}


@dataclasses.dataclass(frozen=True)
class TrainBudget:
    """What training may take.

    Attributes:
      text: as it was written.
      value: in `unit`.
      unit: "gflops", or "seconds".
      of_chips: whether the seconds are those of all chips together.
    """

    text: str
    value: float
    unit: Unit
    of_chips: bool


def parse(text: str) -> TrainBudget:
    """A budget from its text. Raises `UserError` that shows the forms."""
    plain = re.sub(r"(?<=[\d. ])(gpu|tpu|chip)s?[\s-]+(?=[a-z]+\s*$)", "", text.lower())
    found = budgets.read(plain, _SPELLINGS)
    if found is None or (plain != text.lower() and found.unit != "seconds"):
        raise UserError(f"--train-budget={text!r} is no budget of training; write one as {FORMS}: "
                        "docs/advise.md")
    return TrainBudget(text.strip(), found.value, found.unit, plain != text.lower())


@dataclasses.dataclass(frozen=True)
class Rate:
    """How many FLOPs of training a second does.

    Attributes:
      gflops: in a second.
      low, high: the least and most of several measured ones.
      words: what it is of.
    """

    gflops: float
    low: float
    high: float
    words: str


def of_curves(
    curves: Mapping[str, Sequence[tuple[int, str, float]]], gflops: Mapping[str, float],
    batch_size: int, start: int = 0,
) -> Rate | None:
    """The rate that a study trained at, by the seconds in steps that its runs keep, from the first
    that is kept on (a run that goes on from another's step has none of the steps before): the
    median of its sizes. None where none does.

    Args:
      curves: size -> the rows of its `curves.csv`.
      gflops: of a call of each.
      batch_size: pictures of a step.
      start: the step that runs began at, which counts where they keep seconds of one step alone.
    """
    found = {}
    for m, rows in curves.items():
        kept = [(step, value) for step, name, value in rows if name == PRODUCTIVE]
        if len({step for step, _ in kept}) < 2:
            kept.append((start, 0.0))
        (begun, before), (step, seconds) = min(kept), max(kept)
        if step > begun and seconds > before:
            found[m] = BACKWARD * gflops[m] * (step - begun) * batch_size / (seconds - before)
    if not found:
        return None
    low, high = min(found.values()), max(found.values())
    return Rate(
        float(np.median(list(found.values()))), low, high,
        f"the median of {len(found)} sizes that trained here, on all their devices together "
        f"({per_second(low)} to {per_second(high)}), in steps alone: reading, validation and "
        "checkpoints come on top",
    )


def of_chip(device: str, utilisation: float | None) -> Rate:
    """The rate of a chip of `parallel.chips` in bfloat16, by a share of its peak.

    Raises:
      UserError: for one that is not in the table.
    """
    chip = chips.by_name(device.strip().lower()) or chips.by_kind(device)
    if chip is None:
        raise UserError(
            f"--device={device}: a budget of training knows the peaks of "
            f"{labels.listing([c.name for c in chips.CHIPS])}; without --device hours are those of "
            "what trained the study")
    share = UTILISATION if utilisation is None else utilisation
    gflops = chip.bf16_flops * share / 1e9
    of = "" if utilisation is not None else (
        ", as 866m came to on one H200; small networks come to less: --utilisation=0.2")
    return Rate(gflops, gflops, gflops,
                f"one {chip.name} at {share:.3g} of its peak in bfloat16{of}")


def per_second(gflops: float) -> str:
    """A rate in words: `8.45 GFLOP/s`, `346 TFLOP/s`."""
    for least, unit in ((1e6, "P"), (1e3, "T")):
        if gflops >= 0.9995 * least:
            return f"{labels.number(gflops / least)} {unit}FLOP/s"
    return f"{labels.number(gflops)} GFLOP/s"
