"""`ldm-scaling pairs`: crops of photographs with a condition of each, to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ldm_scaling.data import pair_making, sources
from ldm_scaling.data.conditions import table
from ldm_scaling.data.sources.photos import Photos
from ldm_scaling.errors import UserError
from ldm_scaling.study.arguments import Parser, above_0, whole

_USAGE = """
  ldm-scaling pairs --source=photos:DIV2K_valid_HR --to=DIR     3,000 of 512 pixels, as div2k-sr has
  ldm-scaling pairs --source=photos:DIR --to=DIR --count=200 --side=256 --condition=inpainting"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling pairs", _USAGE, allow_abbrev=False, add_help=True,
        description="Cuts random crops out of photographs and makes a condition of each, such as "
        "the small copies of super-resolution. What is there is not made again. See "
        "docs/super_resolution.md.",
    )
    add = parser.add_argument
    add("--source", metavar="photos:DIR", help="photographs in full resolution")
    add("--to", metavar="DIR", help="the folder to make, for  evaluate --protocol=div2k-sr --data")
    add("--count", type=above_0, default=3_000, metavar="N", help="how many; 3000 if not given")
    add("--side", type=above_0, default=512, metavar="N", help="of a crop; 512 if not given")
    add("--seed", type=whole, default=0, metavar="N", help="of crops and conditions")
    add("--condition", default="super_resolution", metavar="NAME",
        help=", ".join(table.CONDITIONS) + "; the first if not given")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`."""
    given, rest = _parser().parse_known_args(list(arguments))
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; see  ldm-scaling pairs --help")
    for name in ("source", "to"):
        if not getattr(given, name):
            raise UserError(f"pairs needs --{name}; see  ldm-scaling pairs --help")
    request = pair_making.Request(given.condition, given.count, given.side, given.seed)
    found = sources.collection(given.source)
    if not isinstance(found, Photos):
        raise UserError(f"--source={given.source}: pairs are made of photos:DIR")
    names = tuple(found.files())
    some = pair_making.photographs(names, found.root, given.side)
    to = pair_making.make(request, some, given.to)
    if some.skipped:
        print(
            f"{len(some.skipped)} of {len(names)} photographs are smaller than {given.side} pixels "
            f"and were left out: {', '.join(some.skipped[:3])}"
            f"{', ...' if some.skipped[3:] else ''}"
        )
    print(f"{to}: {given.count:,} pairs of {given.side} pixels, {given.condition}")
