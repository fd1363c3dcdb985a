"""Budgets as people write them: "400ms", "3 cost", "1e12 flops"."""

from __future__ import annotations

import dataclasses
import decimal
import math
import re

from ldm_scaling.errors import UserError
from ldm_scaling.study import labels
from ldm_scaling.study.costing import Unit

FORMS = '"400ms", "2 s", "3 cost", "1e12 flops" or "500 gflops"'

# Spelling -> the unit and how many of it.
_SPELLINGS: dict[str, tuple[Unit, float]] = {
    "ms": ("seconds", 1e-3), "s": ("seconds", 1.0), "sec": ("seconds", 1.0),
    "second": ("seconds", 1.0), "seconds": ("seconds", 1.0), "cost": ("cost", 1.0),
    "flop": ("gflops", 1e-9), "flops": ("gflops", 1e-9), "gflops": ("gflops", 1.0),
    "tflops": ("gflops", 1e3),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that one picture may cost.

    Attributes:
      value: how much; infinite where there is no limit.
      unit: see `costing.sampling`.
    Raises:
      UserError: for a value that is not above 0.
    """

    value: float
    unit: Unit

    def __post_init__(self):
        if not self.value > 0:
            raise UserError(f"a budget of {self.value:g} {self.unit} must be above 0")


def parse(text: str) -> Budget:
    """A budget from its text. Raises `UserError` that shows the forms."""
    found = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([a-z]+)\s*", text.lower())
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    unit, scale = _SPELLINGS.get(found[2] if found else "", ("cost", math.nan))
    if not 0 < value * scale < math.inf:  # What overflows, or is too small to be told from 0, too.
        raise UserError(f"--budget={text!r} is no budget; write one as {FORMS}")
    return Budget(value * scale, unit)


def enough(value: float, digits: int = 5) -> float:
    """The least number of so many digits that pays for `value` (within a billionth): who reads it
    can type it."""
    up = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return float(up.create_decimal(value * (1 - 1e-9)))


def amount(value: float, unit: Unit, digits: int | None = None) -> str:
    """So much of a unit: `0.400 s`, `3.00 cost`, `1000 GFLOPs`; with as many digits as are asked
    for where two amounts are held against each other."""
    names = {"seconds": "s", "gflops": "GFLOPs", "cost": "cost", "calls": "calls"}
    text = labels.number(value) if digits is None else f"{value:.{digits}g}"
    return f"{text} {names[unit]}"
