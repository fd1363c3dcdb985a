"""Words of where curves are lowest, and of whether that moves from one network to another."""

from __future__ import annotations

import math
from collections.abc import Callable

from ldm_scaling.study import labels
from ldm_scaling.study.statistics import optimum
from ldm_scaling.study.statistics.optimum import Optimum


def words(best: Optimum, form: Callable[[float], str]) -> str:
    """The place and its 95% interval; of one beyond what was measured its bound alone."""
    if best.open:
        bound = _bound(best.low, best.high, form)
        return f"{form(best.rate)} [{bound}]" if best.known else bound
    return f"{form(best.rate)} [{form(best.low)}, {form(best.high)}]"


def place(best: Optimum, form: Callable[[float], str]) -> str:
    """As `words`, without the interval of a place that is known."""
    return form(best.rate) if best.known else words(best, form)


def moves(first: Optimum, last: Optimum, name: str) -> tuple[str, str]:
    """Whether the best place moves from the first network, of this name, to the last, and how far;
    nothing of both where that cannot be told, for a best is beyond what was measured."""
    low, high = optimum.ratio(last, first)
    moved = "falls" if high < 1 else "rises" if low > 1 else "is not seen to move"
    if first.known and last.known:
        of = labels.number(last.rate / first.rate)
        within = labels.interval(low, high) if low and high < math.inf else (
            f"[{_bound(low, high, labels.number)}]")
        return moved, f"{of} times that of {name} {within}"
    if low <= 1 <= high:
        return "", ""
    bound = f"at least {labels.number(low)}" if high == math.inf else (
        f"at most {labels.number(high)}")
    return moved, f"{bound} times that of {name}"


def shown(best: Optimum, low: float, high: float) -> tuple[float, float]:
    """The interval as far as was measured, from `low` to `high`."""
    return max(best.low, low), min(best.high, high)


def columns(best: Optimum, name: str) -> dict[str, float | None]:
    """The place and its interval as columns of numbers; None where it is open or not known."""
    return {
        name: best.rate if best.known else None,
        f"{name}_low": best.low or None,
        f"{name}_high": best.high if best.high < math.inf else None,
    }


def _bound(low: float, high: float, form: Callable[[float], str]) -> str:
    if low == 0 and high == math.inf:
        return "not told"
    return f"{form(high)} or below" if low == 0 else f"{form(low)} or above"
