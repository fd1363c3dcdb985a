"""The command `ldm-scaling` with shallow networks, for tests of what lies around them: the small
members have one level and attention in the middle alone, which is traced, compiled and saved in
half of the time. `python tests/shallow.py ARGUMENTS` is the command; `members` makes them so for
tests that look at its workdirs; `quick_fonts` embeds fonts in PDFs as outlines, which takes a third
of the time that subsets of them take."""

from __future__ import annotations

import dataclasses
import pathlib
from contextlib import AbstractContextManager
from unittest import mock

from ldm_scaling.models import zoo
from ldm_scaling.study import plot_style

FONT_TYPE = plot_style.STYLE["pdf.fonttype"]
PATH = str(pathlib.Path(__file__).resolve())


def members() -> AbstractContextManager:
    """Within it the small members are shallow."""
    one_level = {"channel_mults": (1,), "attention_levels": (False,), "heads": 2}
    return mock.patch.dict(zoo.MEMBERS, {
        m.name: dataclasses.replace(m, spec=dataclasses.replace(m.spec, **one_level))
        for m in (*zoo.SMALL, *zoo.SMALL_16)
    })


def quick_fonts() -> AbstractContextManager:
    """Within it PDFs hold fonts of type 3."""
    return mock.patch.dict(plot_style.STYLE, {"pdf.fonttype": 3})


if __name__ == "__main__":
    from ldm_scaling.cli import entry

    with members(), quick_fonts():
        entry()
