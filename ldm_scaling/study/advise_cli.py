"""`ldm-scaling advise`: its arguments, and the advice in words or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from rich import box
from rich.table import Table

from ldm_scaling import terminal
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import (
    advice,
    budgets,
    cost_files,
    labels,
    places,
    reported,
    table_1,
    train_advise_cli,
    train_budgets,
)
from ldm_scaling.study import memory as memory_lib
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.advice import Advice
from ldm_scaling.study.arguments import Parser, above_0, add_blocks, pieces
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.curves import Point
from ldm_scaling.study.options import Options
from ldm_scaling.study.places import Places
from ldm_scaling.study.pricing import Training
from ldm_scaling.study.records import Record
from ldm_scaling.study.workdir import Workdir

_USAGE = """
  ldm-scaling advise --records=runs/demo --budget="3 cost"
  ldm-scaling advise --records=runs/demo --budget="20ms" --device=h100
  ldm-scaling advise --records=runs/demo --budget="1 gflops" --pictures=1000000
  ldm-scaling advise --records=runs/demo --train-budget="300 h"     what to train
  ldm-scaling advise --records=runs/demo --train-budget="1e18 flops" --pictures=1000000 --calls=40
  ldm-scaling advise --budget="40 tflops"                 from the paper's Table 1"""


def _parser() -> Parser:
    parser = Parser(
        "ldm-scaling advise", _USAGE, allow_abbrev=False,
        description="Which size, sampler, steps and guidance to take for a budget of drawing one "
        "picture, what to expect, how sure that is, and the best for every smaller budget; or how "
        "large a network to train for a budget of training. docs/advise.md says how.",
    )
    add = parser.add_argument
    add("--records", "--workdir", action="append", metavar="PLACE", help="a folder of records, a "
        "workdir that has one, or records' files; with commas, or given again")
    add("--published", action="store_true", help="works from the paper's Table 1, as without "
        "--records")
    add("--budget", metavar="TEXT", help=f"what a picture may cost: {budgets.FORMS}; without it, "
        "the best of all, in cost")
    add("--train-budget", metavar="TEXT", help="the size to train instead, for what training may "
        f"take: {train_budgets.FORMS}; by the losses along a workdir's runs")
    add("--pictures", type=above_0, metavar="N", help="counts training too, spread over so many "
        "pictures: of a budget in flops, and of members of a workdir; with --train-budget, drawing "
        "so many is paid from it too")
    add("--calls", type=above_0, metavar="K", help="of the network, that each of these takes: 20 "
        "guided steps are 40; with --train-budget")
    add("--member", action="append", metavar="NAME,NAME", help="chooses among these networks alone")
    add("--sampler", action="append", metavar="NAME,NAME", help="among these samplers alone, with "
        "their options: ddim:eta=1,dpmpp_2m")
    add("--max-steps", type=above_0, metavar="N", help="among so many steps and fewer alone")
    add("--device", metavar="KIND", help="seconds are those of this device, such as h100, as "
        "ldm-scaling cost  measured them; without it the records' own")
    add("--utilisation", type=_share, metavar="SHARE", help="with --train-budget and --device: the "
        f"share of its peak that training comes to ({train_budgets.UTILISATION})")
    add("--costs", metavar="PLACE", help=f"where those lie, a folder or file ({cost_files.FOLDER})")
    add("--batch", type=above_0, metavar="N", help="pictures drawn at a time on the device (1)")
    add("--memory", metavar="TEXT", help="of the device, such as '8 GB': sizes that need more, as "
        "measured there, are left out")
    add("--metric", metavar="NAME", help="the measure; the one that chose the records' guidance")
    add("--task", metavar="NAME,NAME", help="of the records, where they are of several; those that "
        "draw from text are weighed together without it")
    add_blocks(add, "pooled")
    add("--format", choices=("text", "json"), default="text", help="how to print")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give one above 0, up to 1")
    return value


def run(arguments: Sequence[str], parse: Callable[[list[str]], Any]) -> None:
    """Runs the command; `plan_cli.run` has the arguments.

    Raises:
      UserError: for what the user can mend.
    """
    given = _parser().parse_args(list(arguments))
    if given.train_budget is not None:
        train_advise_cli.run(given)
        return
    if given.utilisation is not None:
        raise UserError("--utilisation goes with --train-budget, and --device")
    if given.calls is not None:
        raise UserError("--calls goes with --train-budget, and --pictures; a budget of drawing "
                        "weighs all steps that were measured")
    budget = budgets.parse(given.budget) if given.budget is not None else Budget(math.inf, "cost")
    chosen = options_lib.only(
        _options(given, budget), pieces("--member", given.member or ()),
        pieces("--sampler", given.sampler or ()), given.max_steps,
    )
    found = advice.advise(chosen, budget)
    if given.format == "json":
        print(json.dumps(plain(found), indent=1, allow_nan=False))
    else:
        print(text(found))


def _options(given: argparse.Namespace, budget: Budget) -> Options:
    if given.published and given.records:
        raise UserError("--published works from Table 1 and --records from your own: give one")
    if budget.unit != "seconds":
        for name in ("device", "costs", "batch"):
            if getattr(given, name) is not None:
                raise UserError(f'--{name} goes with a budget in seconds, such as --budget="400ms"')
    elif given.device is None and (given.costs is not None or given.batch is not None):
        raise UserError("--costs and --batch go with --device=KIND")
    memory = None if given.memory is None else memory_lib.parse(given.memory)
    if memory and given.device is None:
        raise UserError('--memory goes with --device=KIND, and a budget in seconds ("400ms")')
    measured = None
    if given.device is not None:
        place = given.costs or cost_files.FOLDER
        measured = cost_files.of_device(epath.Path(place).expanduser(), given.device)
    batch = given.batch or 1

    def fitting(options: Options) -> Options:
        return options if memory is None else memory_lib.fitting(
            options, prices, batch, memory, measured.platform == "cpu")

    if not given.records:
        for name in ("task", "pictures", "select_block", "report_blocks"):
            if getattr(given, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --records")
        names = {m.name for m in zoo.PAPER}
        prices = measured and measured.prices(names=names)
        return fitting(table_1.options(budget.unit, given.metric, prices=prices, batch=batch))
    found = places.read(given.records)
    found = dataclasses.replace(found, records=_of_task(found.records, given.task))
    names = {r.identity.model for r in found.records}
    prices = measured and measured.prices(_around(found, names), names)
    select_block, report_blocks = found.blocks(given.select_block, given.report_blocks)
    with found.telling():
        return fitting(options_lib.of_records(
            found.records, budget.unit, given.metric or found.metric, select_block=select_block,
            report_blocks=report_blocks, settings=found.settings, training=_training(given, found),
            prices=prices, batch=batch,
        ))


def _around(found: Places, names: set[str]) -> dict[str, set[cost_files.Around]] | None:
    """What is around each member of the workdirs, by their configs; None where one does not tell:
    it is no workdir, or has a published autoencoder that is not here."""
    from ldm_scaling.study import cost_cli

    out = defaultdict(set)
    for home in found.homes:
        study = reported.config_of(home)
        if study is None:
            return None
        try:
            for name in names & set(study.members):
                out[name].add(cost_cli.around(study, name).names)
        except UserError:
            return None
    return out or None


def _training(given: argparse.Namespace, found: Places) -> Training | None:
    """What `--pictures` counts, where it is given: by the batch size of the workdirs' configs."""
    if not given.pictures:
        return None
    studies = {home: Workdir(home).last_config() for home in found.homes}
    if further := [home for home, study in studies.items() if study.start.hash]:
        raise UserError(f"--pictures: members in {further[0]} began with those of another study, "
                        "whose training their records do not count")
    sizes = {study.train.batch_size for study in studies.values()}
    if len(sizes) > 1:
        raise UserError(f"--pictures: the places of --records were trained with batches of "
                        f"{labels.listing(sorted(map(str, sizes)))}: give one of them")
    return Training(sizes.pop(), given.pictures)


def _of_task(records: list[Record], asked: str | None) -> list[Record]:
    """The records of the tasks that were asked for; all of them where none was."""
    if asked is None:
        return records
    tasks = sorted({r.task for r in records})
    some = pieces("--task", [asked])
    for task in some:
        if task not in tasks:
            raise UserError(f"--task={task}: the records are of {', '.join(tasks)}")
    return [r for r in records if r.task in some]


# --- what is printed ----------------------------------------------------------------------------


def _row(p: Point, found: Advice) -> dict[str, Any]:
    trained = {"train_steps": p.train_step, "training_gflops": p.taught}
    return {
        "model": p.model, "task": p.task, "sampler": p.sampler, "steps": p.steps,
        "guidance": p.guidance, found.options.unit: p.cost, "value": p.value, "low": p.low,
        "high": p.high, "num_images": p.num_images,
    } | (trained if found.options.pictures else {})


def plain(found: Advice) -> dict[str, Any]:
    """The advice ready for JSON; what is not known is None."""
    options, duel, budget = found.options, found.duel, found.budget.value
    return {
        "budget": budget if math.isfinite(budget) else None, "unit": options.unit,
        "unit_label": options.unit_label,
        "reference": options.reference and dataclasses.asdict(options.reference),
        "measure": options.measure,
        "better": "lower" if options.sign > 0 else "higher",
        "source": "records" if options.metric else "published",
        "best": _row(found.best, found),
        "runner_up": found.runner_up and _row(found.runner_up, found),
        "probability_runner_up_is_better": found.other_is_better,
        "advantage": duel and duel.advantage,
        "advantage_interval": duel and [duel.low, duel.high],
        "front": [_row(p, found) for p in found.front], "notes": list(found.notes),
    }


def _how(p: Point, found: Advice) -> str:
    return (
        f"{labels.network(p.model, p.task)}, {labels.sampler(p.sampler)}, {p.steps} "
        f"step{'s' * (p.steps > 1)}, guidance {p.guidance:g}" + (
            f", trained {labels.steps(p.train_step)}" if found.options.pictures else "")
    )


def _reached(p: Point, found: Advice) -> str:
    ends = "" if p.low is None else f" {labels.interval(p.low, p.high)}"
    return f"{found.options.measure} {found.options.value(p.value)}{ends}"


def text(found: Advice) -> str:
    """The advice for a terminal; no line is longer than 100 characters."""
    options = found.options
    console = terminal.console()
    budget = found.budget.value

    def spent(p: Point) -> str:
        return budgets.spent(p.cost, options.unit, budget)

    limit = "Whatever it costs" if math.isinf(budget) else (
        f"For {budgets.amount(budget, found.budget.unit)}"
    )
    console.print(f"{limit}: {_how(found.best, found)}")
    console.print(f"  expect {_reached(found.best, found)} at {spent(found.best)}")
    if options.doubt:
        console.print(f"  {options.doubt}")
    if found.runner_up is not None:
        console.print(f"Runner-up: {_how(found.runner_up, found)}")
        console.print(
            f"  {_reached(found.runner_up, found)} at {spent(found.runner_up)}; {_sure(found)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in (options.unit, "size", "sampler", "steps", "guidance", options.measure, "95%"):
        table.add_column(head, justify="left" if head in ("size", "sampler", "95%") else "right",
                         overflow="fold")
    dearer = [p.cost for p in found.front[1:]] + [math.inf]
    trained = ("trained",) if options.pictures else ()
    for head in trained:
        table.add_column(head, justify="right")
    for p, below in zip(found.front, dearer, strict=True):
        table.add_row(
            budgets.rounded_up(p.cost, below), labels.network(p.model, p.task),
            labels.sampler(p.sampler), str(p.steps), f"{p.guidance:g}", options.value(p.value),
            "" if p.low is None else labels.interval(p.low, p.high),
            *(labels.steps(p.train_step) for _ in trained),
        )
    console.print("\nThe best for every budget up to this one:")
    console.print(table)
    console.print(f"In {options.unit_label}.")
    for note in found.notes:
        if note != options.doubt:
            console.print(note)
    return terminal.text(console)


def _sure(found: Advice) -> str:
    if found.duel is None:
        return "how probably it is better is not known (no replicates)"
    by, low, high = found.duel.advantage, found.duel.low, found.duel.high
    lead = f"leads by {labels.number(by)} {labels.interval(low, high)}" if by >= 0 else (
        f"is behind by {labels.number(-by)} {labels.interval(-high, -low)}"
    )
    return (
        f"better with probability {labels.probability(found.other_is_better)} (the first {lead})"
    )
