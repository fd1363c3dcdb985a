"""Tables and lines as text for a terminal."""

from __future__ import annotations

import io

from rich.console import Console


def console(width: int | None = 100) -> Console:
    """What tables and lines are printed to, before `text` gives them.

    Args:
      width: of the longest line, in letters; that of the terminal if None.
    """
    return Console(  # A notebook's console would show the text itself, and in colour.
        file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False,
        force_jupyter=False, force_terminal=False,
    )


def text(printed: Console) -> str:
    """What was printed to a `console`, in lines without blanks at their ends."""
    return "\n".join(line.rstrip() for line in printed.file.getvalue().splitlines()).strip()
