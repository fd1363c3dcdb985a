"""Budgets as people write them: "3 cost", "20ms", "1 gflops"."""

from __future__ import annotations

import dataclasses
import decimal
import math
import re
from collections.abc import Mapping

from ldm_scaling.errors import UserError
from ldm_scaling.study import labels
from ldm_scaling.study.costing import Unit

FORMS = '"3 cost", "20ms", "2 s", "1 gflops" or "40 tflops"'
WHAT = ('a budget is of drawing one picture, that of training is --train-budget="300 h" (both '
        "together: --pictures): docs/advise.md")

_PREFIXES = {
    "": 1e-9, "m": 1e-3, "mega": 1e-3, "g": 1.0, "giga": 1.0, "t": 1e3, "tera": 1e3, "p": 1e6,
    "peta": 1e6, "e": 1e9, "exa": 1e9, "z": 1e12, "zetta": 1e12,
}
SPELLINGS: dict[str, tuple[Unit, float]] = {
    "us": ("seconds", 1e-6), "ms": ("seconds", 1e-3), "s": ("seconds", 1.0),
    "sec": ("seconds", 1.0), "second": ("seconds", 1.0), "seconds": ("seconds", 1.0),
    "min": ("seconds", 60.0), "cost": ("cost", 1.0),
    **{f"{prefix}flop{plural}": ("gflops", scale) for prefix, scale in _PREFIXES.items()
       for plural in ("", "s")},
}
"""Spelling -> the unit and how many of it."""
_NAMES: dict[Unit, str] = {"seconds": "s", "gflops": "GFLOPs", "cost": "cost", "calls": "calls"}


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
    found = read(text, SPELLINGS)
    if found is None:
        raise UserError(f"--budget={text!r} is no budget; write one as {FORMS}; {WHAT}")
    return found


def read(text: str, spellings: Mapping[str, tuple[Unit, float]]) -> Budget | None:
    """A number and a unit of these; None where it is none, or not above 0."""
    value, name = parted(text)
    unit, scale = spellings.get(name, ("cost", math.nan))
    # What overflows, or is too small to be told from 0, is none too.
    return Budget(value * scale, unit) if 0 < value * scale < math.inf else None


def parted(text: str) -> tuple[float, str]:
    """A number, NaN where it is none, and the word after it."""
    found = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([a-z]+)\s*", text.lower())
    try:
        return (float(found[1]), found[2]) if found else (math.nan, "")
    except ValueError:
        return math.nan, ""


def enough(value: float, digits: int = 5) -> float:
    """The least number of so many digits that pays for `value` (within a billionth): who reads it
    can type it."""
    up = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return float(up.create_decimal(value * (1 - 1e-9)))


def rounded_up(value: float, below: float = math.inf) -> str:
    """A cost that can be typed as the budget that just pays for it: three digits or more, rounded
    up.

    Args:
      value: a cost.
      below: what it must not pay for, the next dearer cost: digits are added until it does not.
    """
    if not value > 0:
        return labels.number(value)

    def place(v: float) -> int:
        return math.floor(math.log10(v))

    digits = max(3, 1 + place(value))
    apart = below > value * (1 + 1e-8)  # What rounding alone parts no digit does.
    while apart and enough(value, digits) * (1 + 2e-9) >= below:
        digits += 1
    up = enough(value, digits)
    return f"{up:.{max(0, digits - 1 - place(up))}f}"


def amount(value: float, unit: Unit, digits: int | None = None) -> str:
    """So much of a unit: `0.400 s`, `3.00 cost`, `1000 GFLOPs`; with as many digits as are asked
    for where two amounts are held against each other, else with all up to nine."""
    text = labels.number(value)
    if digits is not None or float(text) != value or value >= 1e9:
        text = f"{value:.{digits or 9}g}"
    return f"{text} {_NAMES[unit]}"


def spent(value: float, unit: Unit, budget: float = math.inf) -> str:
    """What something costs, `rounded_up` unless that is above the budget."""
    text = rounded_up(value)
    return f"{text if float(text) <= budget else f'{value:.9g}'} {_NAMES[unit]}"
