"""Memory that drawing may take: which options a device holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ldm_scaling.errors import UserError
from ldm_scaling.study import budgets, labels
from ldm_scaling.study.costing import Price
from ldm_scaling.study.options import Options

_BYTES = {"mb": 1e6, "mib": 2.0**20, "gb": 1e9, "gib": 2.0**30}


def parse(text: str) -> float:
    """Bytes, from `8 GB` or `8 GiB`. Raises `UserError` that shows the forms."""
    value, name = budgets.parted(text)
    if not 0 < (found := value * _BYTES.get(name, math.nan)) < math.inf:
        raise UserError(
            f'--memory={text!r} is no memory; write it as "8 GB" (1e9 bytes) or "8 GiB"')
    return found


def fitting(
    options: Options, prices: Mapping[str, Price], batch: int, memory: float, least: bool
) -> Options:
    """The options whose programs the memory of a device holds.

    Args:
      options: in seconds of that device.
      prices: member -> what was measured there.
      batch: pictures drawn at a time.
      memory: in bytes.
      least: whether what was measured is a lower bound, as on a CPU.

    Raises:
      UserError: where it holds none.
    """
    smaller_first = sorted({p.model for p in options.points}, key=lambda m: prices[m].gflops)
    needs = {model: prices[model].needs(batch) for model in smaller_first}
    over = {model: need for model, need in needs.items() if need[0] > memory}
    if len(over) == len(needs):
        least, what = min(over.values(), key=lambda need: need[0])
        raise UserError(f"--memory: the least that drawing takes is {_gb(least)}, of {what} at "
                        f"batch size {batch}")
    notes = []
    if over:
        each = labels.listing([f"{model} ({_gb(n)}, {what})" for model, (n, what) in over.items()])
        notes.append(f"Left out, for the largest of their programs needs more than {_gb(memory)} "
                     f"at batch size {batch}: {each}.")
    said = "By the memory that was measured of each program at this batch size, what lies beside " \
        "it not counted" + ("; a CPU's is a lower bound." if least else ".")
    return dataclasses.replace(
        options, points=tuple(p for p in options.points if p.model not in over),
        notes=(*notes, *options.notes, said), untimed=" ".join(filter(None, [
            options.untimed, *notes])), doubt=" ".join(filter(None, [*notes, options.doubt])))


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
