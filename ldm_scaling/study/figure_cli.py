"""`ldm-scaling figure`: figures from records alone, by name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.study import baselines, curves, labels, records, reported
from ldm_scaling.study.arguments import Parser, several
from ldm_scaling.study.figures import beside, catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.records import Record
from ldm_scaling.study.workdir import Workdir

_USAGE = """
  ldm-scaling figure fig8 tab1 --workdir=DIR             these figures
  ldm-scaling figure --records=DIR [--to=DIR]            all that the records allow
  ldm-scaling figure --list                              what there is"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling figure", _USAGE, allow_abbrev=False,
        description="Draws the paper's figures from a folder of records: PNG, SVG, PDF, and the "
        "numbers as CSV. No config, network or data is needed. What each shows: docs/figures.md.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="e.g. fig8, tab1; all if not given")
    add("--workdir", metavar="DIR", help="of a study: its records, strips of images and losses")
    add("--records", metavar="DIR", help="a folder of records alone")
    add("--to", metavar="DIR", help="where the files go; figures/ in the workdir or beside the "
        "records if not given")
    add("--metric", metavar="NAME", help="the main measure; the one that chose the guidance, of "
        f"{', '.join(labels.MEASURES)}")
    add("--select-block", "--select_block", type=int, metavar="N",
        help="seed block that chooses the guidance; the workdir's own, "
        f"{reported.SELECT} without a workdir")
    add("--report-blocks", "--report-block", "--report_block", type=several,
        metavar="N,M", help="seed blocks that are reported, their mean; the workdir's own, "
        f"{reported.REPORT[0]} without a workdir")
    add("--list", action="store_true", help="prints the figures and what each needs")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command; prints the files, then a line for each figure that lacks records.

    Args:
      arguments: after `figure`.
      parse: reads the flags that are everyone's; those taken here are read here.
    Raises:
      UserError: for what the user can mend.
    """
    given = _parser().parse_args(list(arguments))
    if given.list:
        print(listing())
        return
    if bool(given.records) == bool(given.workdir):
        raise UserError("ldm-scaling figure needs --workdir=DIR or --records=DIR, one of them; see "
                        " ldm-scaling figure --help")
    catalogue.chosen(given.names)
    home = Workdir(given.workdir) if given.workdir else None
    folder = home / "records" if home else epath.Path(given.records).expanduser()
    found = records.read_all(folder)
    if not found:
        raise UserError(f"no records are in {folder}: give the folder that holds a sweep's .json "
                        "files, such as --records=runs/demo/records")
    metric = _metric(given, found, folder)
    select_block, asked = reported.of_workdir(
        reported.home_of(folder), given.select_block, given.report_blocks)
    # Who names blocks wants the main study's; else nothing that one block allows is to be missed.
    report_blocks = reported.whole(
        _main(found) if given.report_blocks else found, metric, select_block, asked)
    settings = reported.settings_of(reported.home_of(folder))
    source = Source(found, metric, select_block, report_blocks, settings=settings)
    if home:
        source = dataclasses.replace(
            source, loss_curves=beside.losses(home, curves.models(found)),
            images=beside.strips(home / "strips", source),
            baselines=baselines.of_records(home.path, found),
        )
    to = epath.Path(given.to).expanduser() if given.to else folder.parent / "figures"
    written = catalogue.write(to, source, given.names)
    for name in written.names:
        print(os.fspath(to / f"{name}.png"))
    for line in written.skipped:
        print(f"skipped: {line}")
    if lacking := reported.left_out(asked, report_blocks):
        print(lacking)
    for line in curves.other_settings(found, settings):
        print(line)


def _main(found: Sequence[Record]) -> Sequence[Record]:
    """The records of the main study, where there are some: other tasks may have fewer blocks."""
    return curves.longest([r for r in found if r.task == "text_to_image"]) or found


def _metric(given: argparse.Namespace, found: Sequence[Record], folder: epath.Path) -> str:
    held = curves.measures(found)
    if not held:
        raise UserError(f"no record in {folder} holds a measure of {', '.join(labels.MEASURES)}: "
                        "give another folder, or add the measure to study/labels.py")
    if given.metric and labels.measure(given.metric).name not in held:
        raise UserError(f"--metric={given.metric}: no record in {folder} holds it; they hold "
                        f"{', '.join(held)}")
    own = reported.metric_of(reported.home_of(folder))
    return given.metric or (own if own in held else reported.leading(found))


def listing() -> str:
    """The figures and what each needs, as text."""
    wide = max(len(e.name) for e in catalogue.FIGURES)
    out = []
    for e in catalogue.FIGURES:
        out.append(f"{e.name:<{wide}}  {e.heading}")
        out += textwrap.wrap(f"needs {e.needs}", 98, initial_indent=" " * (wide + 2),
                             subsequent_indent=" " * (wide + 2))
    return "\n".join(out)
