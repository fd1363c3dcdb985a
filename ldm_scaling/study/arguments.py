"""What the commands with flags of their own share: a parser with one-line errors, numbers, and
what is left for the config."""

from __future__ import annotations

import argparse
import decimal
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ldm_scaling.errors import UserError

# Flags of every command that works on a study.
COMMON = ("config", "workdir")


class Parser(argparse.ArgumentParser):
    """argparse's, whose `prog` is the whole command; raises `UserError` and never ends the process.
    """

    def error(self, message: str):
        raise UserError(f"{self.prog.split()[-1]}: {message}; see  {self.prog} --help")

    def parse_with_common(
        self, arguments: Sequence[str], parse: Callable[[list[str]], Any]
    ) -> tuple[argparse.Namespace, Any]:
        """The flags, and those of them that are `COMMON`, as `parse` reads these: a config with its
        overrides, a workdir.

        Args:
          arguments: of the command.
          parse: reads flags that belong to every command.
        Raises:
          UserError: for another argument that the parser does not know, or what `parse` refuses.
        """
        given, overrides = self.parse_with_config(list(arguments))
        values = {name: getattr(given, name) for name in COMMON}
        flags = [f"--{name}={value}" for name, value in values.items() if value]
        return given, parse([*flags, *overrides])

    def parse_with_config(
        self, arguments: list[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the `--config.KEY=VALUE`s among them, which a config reads itself.

        Raises:
          UserError: for another argument that the parser does not know.
        """
        given, overrides = self.parse_known_args(list(arguments))
        unknown = [one for one in overrides if not re.match(r"--?config\.", one)]
        if unknown:
            raise UserError(f"unknown argument {unknown[0]!r}; see  {self.prog} --help")
        return given, overrides


def pieces(flag: str, texts: Iterable[str]) -> list[str]:
    """What a flag lists with commas, given once or several times.

    A comma parts samplers except before `option=`: `ddim:eta=0.5,final=zero,heun` are two.

    Raises:
      UserError: where nothing stands before or after a comma.
    """
    texts = list(texts)
    comma = r",(?!\s*\w+=)" if flag == "--sampler" else ","
    out = [piece.strip() for text in texts for piece in re.split(comma, text)]
    if "" in out:
        raise UserError(f"{flag}={','.join(texts)}: a value is missing")
    return out


def whole(text: str) -> int:
    """A flag's whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def several(text: str) -> list[int]:
    """A flag's whole numbers with commas between."""
    return [whole(piece.strip()) for piece in text.split(",")]


def add_blocks(add: Callable[..., Any], together: str) -> None:
    """Adds the flags of the seed blocks that choose and are reported.

    Args:
      add: of the parser.
      together: what is taken of several reported blocks, in words.
    """
    from ldm_scaling.study import reported

    add("--select-block", type=whole, metavar="N", help="seed block that chooses the guidance; the "
        f"workdir's own, {reported.SELECT} without a workdir")
    add("--report-blocks", type=several, metavar="N,M", help="seed blocks that are reported, "
        f"{together}; the workdir's own, {reported.REPORT[0]} without a workdir")


def guidance_rate(text: str) -> float:
    """A flag's guidance rate, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no guidance rate; give 0 or more, 1 is none")
    return value


MOST = 10**18
"""The largest whole number of a flag."""


def above_0(text: str) -> int:
    """A flag's whole number, 1 to 1e18; also as `1e6` or `1_000_000`."""
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        value = decimal.Decimal("nan")
    if not value.is_finite() or not 1 <= value <= MOST or value % 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number above 0, up to 1e18: give 1 or more")
    return int(value)
