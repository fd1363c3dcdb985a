"""`ldm-scaling rates`: which learning rate is best at which width."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study.arguments import Parser, above_0

_USAGE = """
  ldm-scaling rates --config=configs/demo_width.py --workdir=runs/demo_width
  ldm-scaling rates --workdir=DIR --rates=1e-3,2e-3,4e-3,8e-3,16e-3 --seeds=3"""
# Without --rates: so many times train.learning_rate.
_TIMES = tuple(2.0**k for k in range(-2, 3))


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(piece) for piece in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} are no rates; write  --rates=1e-3,2e-3,4e-3")
    return rates


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling rates", _USAGE, allow_abbrev=False,
        description="Trains each member for train.steps at several learning rates, in the standard "
        "parametrisation and with width transfer (config.train.width_transfer=mup), and says "
        "whether the best rate moves with width. What is trained is kept and not trained again: "
        "docs/width_transfer.md.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:argument]", help="of a study with width transfer; the workdir "
        "knows the one that was last used in it")
    add("--workdir", metavar="DIR", help="where all is kept")
    add("--rates", type=_rates, metavar="R,R", help="the learning rates; "
        f"{_TIMES[0]:g} to {_TIMES[-1]:g} times train.learning_rate, doubled each time, if not "
        "given")
    add("--seeds", type=above_0, default=1, metavar="N", help="runs at each rate, whose losses are "
        "averaged (1)")
    return parser


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command, see `commands.OWN`; prints the verdict, then the picture's file."""
    given, common = _parser().parse_with_common(arguments, parse)
    if not common.workdir:
        raise UserError("rates needs --workdir=DIR; see  ldm-scaling rates --help")
    hosts.begin()
    from ldm_scaling.study import rates, study_checks
    from ldm_scaling.study.figures import rates as figure
    from ldm_scaling.study.plot_style import style
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(common.workdir)
    study = workdir.study(common.config)
    several = given.rates or [study.train.learning_rate * times for times in _TIMES]
    planned = rates.of(study, several, given.seeds)
    materials = study_checks.check(study, workdir, measured=False)
    study_checks.captions(study)
    with workdir.held(materials.study):
        rates.train(materials, planned)
    shown = figure.lines(rates.results(materials, planned))
    with style():
        drawn = figure.draw(shown)
    folder = workdir / rates.FOLDER
    words = figure.verdict(shown)
    drawn.write(folder, "best_rate", words)
    print(words)
    print(os.fspath(folder / "best_rate.png"))
