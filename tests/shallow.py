"""The command `ldm-scaling` with shallow networks, for tests of what lies around them: the small
members have one level and attention in the middle alone, which is traced, compiled and saved in
half of the time. `python tests/shallow.py ARGUMENTS` is the command; `members` makes them so for
tests that look at its workdirs."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import pytest

from ldm_scaling.models import zoo

PATH = str(pathlib.Path(__file__).resolve())


@contextlib.contextmanager
def members() -> Iterator[None]:
    """Within it the small members are shallow."""
    with pytest.MonkeyPatch.context() as patch:
        for member in (*zoo.SMALL, *zoo.SMALL_16):
            spec = dataclasses.replace(
                member.spec, channel_mults=(1,), attention_levels=(False,), heads=2)
            patch.setitem(zoo.MEMBERS, member.name, dataclasses.replace(member, spec=spec))
        yield


if __name__ == "__main__":
    from ldm_scaling.cli import entry

    with members():
        entry()
