"""The help text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ldm_scaling.cli.commands import COMMANDS, OWN
from ldm_scaling.cli.flags import FLAGS

# Flags of most commands.
_COMMON = ("config", "workdir", "distributed")


def _table(rows: Iterable[tuple[str, str]], width: int = 29) -> list[str]:
    """Two columns of text, the right one broken so that lines stay under 100 characters."""
    out = []
    for left, right in rows:
        first, *rest = textwrap.wrap(right, 92 - width)
        out += [f"  {left:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in rest)]
    return out


def usage() -> str:
    """The help text."""
    flags = {
        name: _table([(written, text)]) for name, (_, written, text) in FLAGS.items()
    }
    of = {
        command: [
            line for name, (commands, *_) in FLAGS.items()
            if command in commands and name not in _COMMON for line in flags[name]
        ]
        for command in ("prepare", "sample", "convert", "zoo")
    }
    return "\n".join(
        [
            "ldm-scaling COMMAND --workdir=DIR [--config=FILE[:argument] [--config.KEY=VALUE ...]]",
            "",
            "A scaling study of latent diffusion models. The commands:",
            "",
            *_table(COMMANDS.items(), max(map(len, COMMANDS))),
            "",
            *flags["config"],
            *_table([("--config.KEY=VALUE", "changes a key of it, e.g. --config.train.steps=200")]),
            *flags["workdir"],
            *flags["distributed"],
            *_table([("--help", "this text"), ("--version", "the package's and that of jax")]),
            "",
            "prepare takes besides; with --to or --dry-run it needs no workdir:",
            "",
            *of["prepare"],
            "",
            "sample draws one labelled grid. Several values, with commas or in a flag given again,",
            "make its axes; what is not given is as the config's sample says:",
            "",
            *of["sample"],
            "",
            "zoo and convert need neither config nor workdir:",
            "",
            *of["zoo"],
            *of["convert"],
            "",
            *(f"{name} has flags of its own: ldm-scaling {name} --help" for name in OWN),
        ]
    )
