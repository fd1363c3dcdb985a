"""Tables and lines as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.table import Table


def console(width: int | None = 100) -> Console:
    """What tables and lines are printed to, before `text` gives them.

    Args:
      width: of the longest line, in letters; that of the terminal if None.
    """
    return Console(  # A notebook's console would show the text itself, and in colour.
        file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False,
        force_jupyter=False, force_terminal=False,
    )


def table(*headings: str, left: Collection[str] = (), edge: bool = False) -> Table:
    """A table without rows.

    Args:
      headings: of its columns, the first of which is flush left.
      left: headings of others that are; the rest is flush right, as numbers are.
      edge: whether a blank stands before the first column and behind the last.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=edge)
    for heading in headings:
        flush = "left" if heading == headings[0] or heading in left else "right"
        made.add_column(heading, justify=flush, overflow="fold")
    return made


def text(printed: Console) -> str:
    """What was printed to a `console`, in lines without blanks at their ends."""
    lines = [line.rstrip() for line in printed.file.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")
