"""`ldm-scaling figure`: figures from records alone, by name; with `--page` the page too."""

from __future__ import annotations

import argparse
import dataclasses
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.study import (
    baselines,
    cascades,
    curves,
    labels,
    places,
    repeated,
    report,
    reported,
    students,
)
from ldm_scaling.study.arguments import Parser, add_blocks
from ldm_scaling.study.figures import beside, catalogue, downstream, scaling
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.places import Places
from ldm_scaling.study.records import TEXT_TO_IMAGE, Record
from ldm_scaling.study.workdir import Workdir

_USAGE = """
  ldm-scaling figure fig8 tab1 --workdir=DIR             these figures
  ldm-scaling figure --records=DIR [--to=DIR]            all that the records allow
  ldm-scaling figure --workdir=DIR,DIR --to=DIR --page   of several workdirs, and a page of all
  ldm-scaling figure --list                              what there is"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling figure", _USAGE, allow_abbrev=False,
        description="Draws the paper's figures from a folder of records: PNG, SVG, PDF, and the "
        "numbers as CSV. No config, network or data is needed. What each shows: docs/figures.md.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="e.g. fig8, tab1; all if not given")
    add("--workdir", action="append", metavar="DIR", help="of a study: its records, strips of "
        "images, losses and baselines; several with commas, or given again")
    add("--records", action="append", metavar="PLACE", help="records alone, in a folder, a workdir "
        "or files; several likewise")
    add("--to", metavar="DIR", help="where the files go; figures/ in the workdir or beside the "
        "records if not given")
    add("--page", action="store_true", help="writes report.html there too, with the verdicts on "
        "all these records")
    add("--metric", metavar="NAME", help="the main measure; the one that chose the guidance, of "
        f"{', '.join(labels.measures())}")
    add_blocks(add, "their mean")
    add("--list", action="store_true", help="prints the figures and what each needs")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`; prints the files, then a line for each figure that
    lacks records."""
    given = _parser().parse_args(list(arguments))
    if given.list:
        print(listing())
        return
    if bool(given.records) == bool(given.workdir):
        raise UserError("ldm-scaling figure needs --workdir=DIR or --records=DIR, one of them; see "
                        " ldm-scaling figure --help")
    flag = "--workdir" if given.workdir else "--records"
    there = places.read(given.workdir or given.records, flag)
    with there.telling():
        _run(given, there)


def _run(given: argparse.Namespace, there: Places) -> None:
    catalogue.chosen(given.names)  # The workdirs' plugins may have more.
    to = _to(given, there)
    found, uneven = reported.comparable(there.records)
    there = dataclasses.replace(there, records=found)
    metric, settings = _metric(given, there), there.settings
    select_block, asked = there.blocks(given.select_block, given.report_blocks)
    shown = curves.one_setting(found, settings)
    # Who names blocks wants the main study's; else nothing that one block allows is to be missed.
    report_blocks = reported.whole(
        _main(shown) if given.report_blocks else shown, metric, select_block, asked)
    source = Source(
        found, metric, select_block, report_blocks, settings=settings, spacing=there.spacing)
    strips, lost = [home / "strips" for home in there.homes] if given.workdir else [], []
    if given.workdir:
        networks = repeated.networks(found, curves.models(found))
        read = [beside.losses(Workdir(home), networks) for home in there.homes]
        lost = [line for _, lines in read for line in lines]
        source = dataclasses.replace(
            source, images=beside.strips(strips, source),
            # Of a member that several trained, the first's.
            loss_curves={name: rows for own, _ in reversed(read) for name, rows in own.items()},
            baselines=[b for home in there.homes for b in baselines.of_records(home, found)],
        )
    laws = any(e.name.startswith("law_") for e in catalogue.chosen(given.names))
    without_law = scaling.left_out(source) if laws else []
    _require_writable(to)
    written = catalogue.write(to, source, given.names)
    for name in written.names:
        print(os.fspath(to / f"{name}.png"))
    for line in written.skipped:
        print(f"skipped: {line}")
    if lacking := reported.left_out(asked, report_blocks):
        print(lacking)
    for of in (curves.other_settings, downstream.other_lessons):
        for line in of(found, settings):
            print(line)
    for line in (*uneven, *without_law):
        print(line)
    if given.page:
        lost += without_law
        print(os.fspath(_page(to, source, strips, written.names, uneven, lost)))


def _to(given: argparse.Namespace, there: Places) -> epath.Path:
    """Where the files go."""
    if given.to:
        return epath.Path(given.to).expanduser()
    if len(there.folders) > 1:
        raise UserError("the records are in several places: say where the files go by --to=DIR")
    return there.folders[0].parent / "figures"


def _require_writable(to: epath.Path) -> None:
    """Raises `UserError` for a folder that cannot be written, before anything is drawn."""
    why = ""
    try:
        to.mkdir(parents=True, exist_ok=True)
        if not os.access(to, os.W_OK):
            why = "it cannot be written"
    except OSError as e:
        why = e.strerror or str(e)
    if why:
        raise UserError(f"cannot write into {os.fspath(to)}: {why}; name another place by --to=DIR")


def _page(
    to: epath.Path, source: Source, strips: Sequence[epath.Path], drawn: Sequence[str],
    uneven: Sequence[str], lost: Sequence[str],
) -> epath.Path:
    """Writes the page of the source's records beside its figures, with the sentences on what is not
    among them and what is lost; it has no config to tell of."""
    found = curves.one_setting(source.records, source.settings)
    main = curves.longest(_main(found))  # A page is of networks of one length of training.
    kept = {r.identity.key for r in main}
    blocks = source.select_block, source.report_blocks
    further = [
        *baselines.findings(source.baselines, found),
        *students.sentences(found, source.metric, *blocks, source.spacing),
        *cascades.sentences(found, source.metric, *blocks),
        *uneven,
    ]
    context = report.Context(
        metric=source.metric, select_block=blocks[0], report_blocks=blocks[1],
        captions=source.captions, limits=lost,
    )
    others = [r for r in found if r.identity.key not in kept]
    return report.write(to, main, to, context, strips, others, further, drawn)


def _main(found: Sequence[Record]) -> Sequence[Record]:
    """The records of the main study, where there are some: other tasks may have fewer blocks."""
    return curves.longest([r for r in found if r.task == TEXT_TO_IMAGE]) or found


def _metric(given: argparse.Namespace, there: Places) -> str:
    where = ", ".join(map(os.fspath, there.folders))
    held = curves.measures(there.records)
    if not held:
        raise UserError(f"no record in {where} holds a measure of {', '.join(labels.measures())}: "
                        "give another folder, or the workdir whose plugins know the measure")
    if given.metric and labels.measure(given.metric).name not in held:
        raise UserError(f"--metric={given.metric}: no record in {where} holds it; they hold "
                        f"{', '.join(held)}")
    return given.metric or there.metric or reported.leading(there.records)


def listing() -> str:
    """The figures and what each needs, as text."""
    wide = max(len(e.name) for e in catalogue.FIGURES)
    out = []
    for e in catalogue.FIGURES:
        out.append(f"{e.name:<{wide}}  {e.heading}")
        out += textwrap.wrap(f"needs {e.needs}", 98, initial_indent=" " * (wide + 2),
                             subsequent_indent=" " * (wide + 2))
    out.append("All are of networks that have records: ldm-scaling sweep  writes them.")
    return "\n".join(out)
