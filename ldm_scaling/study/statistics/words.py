"""What verdicts and findings say: how sure something is, what a size reached and how."""

from __future__ import annotations

from typing import Literal

from ldm_scaling.study import labels, winners

CONFIDENCE = 0.95
"""A claim is supported from this probability on, contradicted below its rest."""

Outcome = Literal["supported", "contradicted", "undecided"]


def judge(probability: float | None) -> Outcome:
    """The verdict on something that holds with a probability; None is not known."""
    if probability is None or 1 - CONFIDENCE < probability < CONFIDENCE:
        return "undecided"
    return "supported" if probability >= CONFIDENCE else "contradicted"


def judge_alone(
    share: float | None, alone: float | None
) -> tuple[Outcome, float | None]:
    """The verdict on what some size of several does, and its probability.

    Args:
      share: of replicates in which any of them does it: speaks against, where it is small. Of equal
        sizes one nearly always does.
      alone: that a single one does it, for as many as try: speaks for it.
    """
    if judge(share) == "contradicted":
        return "contradicted", share
    return "supported" if judge(alone) == "supported" else "undecided", alone


def sure(probability: float | None) -> str:
    """`probability 0.97`."""
    if probability is None:
        return "unknown probability without replicates"
    return f"probability {labels.probability(probability)}"


def reached(metric: str, contender: winners.Contender) -> str:
    """`FD 23.4 [22.9, 23.9]`."""
    point = contender.point
    ends = "" if point.low is None else f" {labels.interval(point.low, point.high)}"
    return f"{labels.measure(metric).short} {labels.number(point.value)}{ends}"


def how(contender: winners.Contender) -> str:
    """`10 steps at guidance 3`."""
    point = contender.point
    return f"{labels.steps(point.steps)} at guidance {point.guidance:g}"
