"""`ldm-scaling averages`: which length of the average over training is best at which size."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from ldm_scaling.config.measuring import FRECHET
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study.arguments import Parser, above_0, guidance_rate, pieces

_USAGE = """
  ldm-scaling averages --workdir=DIR
  ldm-scaling averages --workdir=DIR --lengths=0.05,0.07,0.1,0.14,0.2 --member=c8,c16
  ldm-scaling averages --workdir=DIR --metric=fd_effnetlite0 --sampler=ddim --steps=20"""


def _lengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(f"{float(piece):g}") for piece in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no lengths; write  --lengths=0.05,0.07,0.1,0.14,0.2") from None


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling averages", _USAGE, allow_abbrev=False,
        description="Makes averages of several lengths of each trained member's parameters from "
        "the snapshots of train.averages, measures each, and says which length is best and whether "
        "that differs with size. What is measured is kept: docs/averages.md.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:argument]", help="that the members were trained with; the "
        "workdir knows the one that was last used in it")
    add("--workdir", metavar="DIR", help="of the trained members; where all is kept")
    add("--lengths", type=_lengths, default=(), metavar="S,S", help="relative standard deviations; "
        "0.03 to 0.25, as far as the snapshots give them, if not given")
    add("--member", action="append", metavar="NAME,NAME", help="networks; all of the config's if "
        "not given")
    add("--at", type=above_0, default=0, metavar="N", help="a training step that has a snapshot; "
        "the last if not given")
    add("--metric", metavar="NAME", help="a distance that is measured beside the loss, of pictures "
        "that are drawn for it: the sweep's own, or one of config.sweep.metrics")
    add("--sampler", metavar="NAME", help="of these pictures; the config's sample if not given, as "
        "are the next two. Each of the three asks for pictures")
    add("--steps", type=above_0, metavar="N")
    add("--guidance", type=guidance_rate, metavar="RATE", help="1 is none")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`; prints the verdict, then the picture's file."""
    given, common = _parser().parse_with_common(arguments, parse)
    if not common.workdir:
        raise UserError("averages needs --workdir=DIR; see  ldm-scaling averages --help")
    members = pieces("--member", given.member or ())
    hosts.begin()
    from ldm_scaling.study import averages, study_checks
    from ldm_scaling.study.figures import averages as figure
    from ldm_scaling.study.plot_style import style
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(common.workdir)
    # All lengths are asked for here.
    study = dataclasses.replace(workdir.study(common.config), average="")
    cell = _cell(given, study)
    materials = study_checks.check(study, workdir, measured=cell is not None, trains=False)
    wanted = averages.of(materials, members, given.lengths, given.at)
    # By its average go `figure` and `advise`, and no records of theirs are made here.
    with workdir.held(materials.study, keep_last=True):
        found = averages.measure(materials, wanted, cell)
    shown = figure.lines(found)
    with style():
        drawn = figure.draw(shown, cell)
    folder, name = workdir / averages.FOLDER, "best_length"
    some = [name for name in study.members if name in members]
    name += f"_of_{'_'.join(some)}" if some and len(some) < len(study.members) else ""
    name += f"_at_{given.at}" if given.at else ""
    words = figure.verdict(shown, cell)
    drawn.write(folder, name, words)
    print(words)
    print(os.fspath(folder / f"{name}.png"))


def _cell(given: argparse.Namespace, study: Any) -> Any:
    """How pictures are drawn, where any are asked for."""
    from ldm_scaling.study.averages import Cell

    asked = (given.metric, given.sampler, given.steps, given.guidance)
    if all(value is None for value in asked):
        return None
    sample, metric = study.sample, given.metric or study.sweep.choose_by
    if metric not in (FRECHET, *study.sweep.metrics):
        raise UserError(f"--metric={metric}: the sweep measures {FRECHET} and what "
                        "config.sweep.metrics names: choose of these, or name it there")
    return Cell(
        given.sampler or sample.sampler, given.steps or sample.steps,
        sample.guidance if given.guidance is None else given.guidance,
        metric,
    )
