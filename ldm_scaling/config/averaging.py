"""Lengths of averages by member, as `Study.average` spells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldm_scaling.config.check import require
from ldm_scaling.config.training import LENGTHS


def parse(text: str, members: Sequence[str]) -> dict[str, float]:
    """Member -> length; of all others under the empty name, where one is given.

    Args:
      text: `0.1`, `c8=0.12,c16=0.09`, or both.
      members: that may be named.
    Raises:
      UserError: for what is no length, or of no member.
    """
    low, high = LENGTHS
    out: dict[str, float] = {}
    for piece in filter(None, text.split(",")):
        name, _, number = (part.strip() for part in piece.rpartition("="))
        try:
            length = float(number)
        except ValueError:
            length = float("nan")
        require(low <= length <= high, "average", text, f"lengths are relative standard deviations "
                f"from {low:g} to {high:g}: write 0.1, or {members[0]}=0.1 of one member")
        require(not name or name in members, "average", text,
                f"{name} is none of members={tuple(members)}")
        require(name not in out, "average", text,
                f"{name or 'a length of all members'} is there twice")
        out[name] = float(f"{length:g}")
    return out


def spell(named: Mapping[str, float]) -> str:
    """In one way, such that `parse` gives the same."""
    return ",".join(f"{name}={length:g}" if name else f"{length:g}"
                    for name, length in sorted(named.items()))
