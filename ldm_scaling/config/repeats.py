"""Names of a member's training runs, where it is trained several times, see `Study.repeats`."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<member>.+)_run(?P<run>[1-9][0-9]*)")


def name(member: str, run: int) -> str:
    """Of the network that a run of a member trains, by which its folder is called: the first's, run
    0, is the member's own, others' are such as `c8_run1`."""
    return f"{member}_run{run}" if run else member


def parse(network: str) -> tuple[str, int]:
    """The member and the number of its run, from 0, of such a name."""
    found = _NAME.fullmatch(network)
    return (found["member"], int(found["run"])) if found else (network, 0)
