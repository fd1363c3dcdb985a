"""Which seed blocks choose and are reported: a workdir's own, of those the ones that are whole; and
which settings, measure and records."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from ldm_scaling import __version__
from ldm_scaling.config import DreamBooth, FineTune, Study
from ldm_scaling.config.measuring import FRECHET, RESTORED
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.sampling import solvers
from ldm_scaling.study import curves, labels, scores
from ldm_scaling.study.records import (
    FROM_TEXT,
    NAME,
    RESTORING,
    TASKS,
    TEXT_TO_IMAGE,
    Identity,
    Record,
    raced_reference,
)
from ldm_scaling.study.workdir import MARKER, Workdir

SELECT, REPORT = 0, (1,)
"""The seed blocks of a study that names none."""
LAST_SCORED = "last_scored.txt"
"""In the folder of members that DreamBooth taught: `Identity.reference_hash` of what was scored
last."""


def home_of(place: epath.PathLike) -> epath.Path:
    """The folder that is the workdir, if any is, of a workdir, its `records/` or a record there."""
    path = epath.Path(place).expanduser()
    if NAME.fullmatch(path.name):
        path = path.parent
    return path.parent if path.name == "records" else path


def of_workdir(
    home: epath.PathLike, select: int | None = None, report: Sequence[int] | None = None
) -> tuple[int, list[int]]:
    """The seed blocks that choose and are reported: those given, else those that the workdir's
    config names, else `SELECT` and `REPORT`.

    Args:
      home: a workdir, or a folder that is none.
      select, report: what was asked for, if anything was.

    Raises:
      UserError: where one is not given and the workdir's config cannot be read.
    """
    own: tuple[int, Sequence[int]] = SELECT, REPORT
    workdir = Workdir(home)
    if (select is None or report is None) and (workdir / MARKER).exists():
        try:
            sweep = workdir.last_config().sweep
        except UserError as e:
            raise UserError(f"{e}, or --select-block=N and --report-blocks=N,M here") from e
        own = sweep.select_block, sweep.report_blocks
    return (
        own[0] if select is None else select,
        list(dict.fromkeys(own[1] if report is None else report)),
    )


def metric_of(home: epath.PathLike, records: Sequence[Record]) -> str | None:
    """The measure that a workdir's last config chooses these records' guidance by: its
    fine-tuning's own where they are of that alone. None of a folder that is no workdir or whose
    config cannot be read."""
    study = config_of(home)
    if study is None:
        return None
    tuned = study.finetune.pretrained or {r.task for r in records} == {study.finetune.task}
    return (study.finetune if tuned else study).sweep.choose_by


def main_metric(home: epath.PathLike, records: Sequence[Record]) -> str | None:
    """The measure that figures and advice of a workdir lead by: the one that its config chooses by,
    where records hold it, else that of `leading`."""
    own = metric_of(home, records)
    return own if any(own in r.metrics for r in records) else leading(records)


def settings_of(home: epath.PathLike) -> tuple[str, ...]:
    """Of what a workdir's last config makes of members, see `curves.one_setting`: its cascades,
    distillations, fine-tuning and DreamBooth, and of that the hash in `LAST_SCORED`; none of a
    folder that is no workdir or whose config cannot be read."""
    study = config_of(home)
    if study is None:
        return ()
    cascades = (study.cascade.setting,) if study.cascade.base else ()
    further = (*study.distillations, *_trained_further(study).values())
    scored = Workdir(home) / study.dreambooth.folder / LAST_SCORED
    last = scored.read_text().split() if scored.exists() else ()
    return (*cascades, *(made.setting for made in further), *last)


def _trained_further(study: Study) -> dict[str, FineTune | DreamBooth]:
    """What a config fine-tunes or teaches, by the task of its records."""
    out: dict[str, FineTune | DreamBooth] = {}
    if study.finetune.task:
        out[study.finetune.task] = study.finetune
    if study.dreambooth.subjects:
        out["dreambooth"] = study.dreambooth
    return out


def with_settings(home: epath.PathLike, records: Sequence[Record]) -> list[Record]:
    """A workdir's records, those of fine-tuning and DreamBooth with their setting where they were
    measured before records told it: that of records of the same network which tell it, or of its
    last config's, where it is of that."""
    settings = {(r.task, r.identity.model_hash): r.setting for r in records if r.setting}
    untold = {
        (r.task, r.identity.model) for r in records
        if not r.setting and (r.task, r.identity.model_hash) not in settings
    }
    study = config_of(home) if {task for task, _ in untold} - {TEXT_TO_IMAGE} else None
    if study is not None and (made := _trained_further(study)):
        from ldm_scaling.study import networks  # Heavy, and seldom needed.

        for task, model in untold:  # The last command may have been of some members.
            if task in made and (model in study.members or model in zoo.MEMBERS):
                key = task, networks.tuned_hash(study, model, made[task])
                settings[key] = made[task].setting
    return [
        r if r.setting or (r.task, r.identity.model_hash) not in settings else
        dataclasses.replace(r, setting=settings[r.task, r.identity.model_hash])
        for r in records
    ]


def spacing_of(home: epath.PathLike) -> str:
    """The timestep spacing that a workdir's last config measures teachers with, DDIM's own where it
    names none; empty where it distils nothing, and of a folder that is no workdir or whose config
    cannot be read."""
    study = config_of(home)
    if study is None or not study.distillations:
        return ""
    return solvers.spacing_of("ddim", study.sweep.spacing)


def last_measured(
    home: epath.PathLike, records: Sequence[Record]
) -> tuple[list[Record], list[str]]:
    """A workdir's records without those of cells that were measured again in another way: with
    another average of the parameters, number of pictures, other measures, or by another version.

    Of each task of which that holds for a cell the records of one way are kept, the one that its
    last config asks for or that comes nearest to it; where several come as near, the one whose
    records tell their setting as they lie there, which those of earlier versions do not. Where
    several do, of other tasks, and of a folder that is no workdir or whose config cannot be read,
    all are.

    Args:
      home: a workdir, or a folder that is none.
      records: that lie there.

    Returns:
      The records, as `with_settings` has them, and a sentence for each task of which some are left
      out.
    """
    early = {r.identity for r in records if not r.setting}
    records = with_settings(home, records)
    study = config_of(home)
    if study is None:
        return list(records), []
    records, told = _of_one_average(home, study, records)
    kept: list[Record] = []
    named = {*scores.SCORES} - {FRECHET, *RESTORED}  # `sweep.metrics` are of these.
    for task in dict.fromkeys(r.task for r in records):
        sweep = (study.finetune if task == study.finetune.task else study).sweep
        own = _by_way([r for r in records if r.task == task], sweep.num_images)
        cells = [{_cell(r) for r in some} for some in own.values()]
        if sum(map(len, cells)) == len(set().union(*cells)):
            kept += itertools.chain(*own.values())
            continue

        near = {}
        for way, some in own.items():
            held = {name for r in some for name in r.metrics}
            near[way] = (held & named == {*sweep.metrics}, way.num_images == sweep.num_images,
                         way.version == __version__, any(r.identity not in early for r in some))
        most = max(near.values())
        best, *others = (way for way in own if near[way] == most)
        if others:
            kept += itertools.chain(*own.values())  # Which is meant nobody can tell.
            continue
        kept += own[best]
        less = sum(map(len, own.values())) - len(own[best])
        alike = [way for way in own if near[way][:-1] == most[:-1]]
        setting = ", that tell their setting" if alike[1:] else ""
        told.append(
            f"{os.fspath(home)}: {labels.task(task)}: cells were measured in {len(own)} ways; "
            f"taken are the {len(own[best]):,} records that fit the last config best, of "
            f"{best.num_images:,} pictures and version {best.version}{setting}, and {less:,} are "
            "left out"
        )
    return kept, told


def _of_one_average(
    home: epath.PathLike, study: Study, records: Sequence[Record]
) -> tuple[list[Record], list[str]]:
    """The records without all but one average of each member, see `config.Study.average`: the last
    config's, or where a member has none of that its `ema`, or what it has most of; and sentences on
    what is left out and on who is of another average than the config's."""
    counts: dict[str, collections.Counter[str]] = {}
    for r in records:
        if r.task == TEXT_TO_IMAGE:
            counts.setdefault(r.identity.model, collections.Counter())[_first_run(r)] += 1
    several = {model for model, own in counts.items() if len(own) > 1}
    if study.weights or not (several or study.train.averages):
        return list(records), []
    from ldm_scaling.study.networks import model_hash

    plain = dataclasses.replace(study, average="")
    kept_of: dict[str, str] = {}
    groups: dict[str, list[str]] = {}  # By which average is taken.
    for model, own in sorted(counts.items()):
        if model not in zoo.MEMBERS:
            continue
        wanted, ema = model_hash(study, model), model_hash(plain, model)
        if wanted in own:
            kept_of[model], which = wanted, "last"
        elif not study.train.averages:  # They differ in something else.
            continue
        elif ema in own:
            kept_of[model], which = ema, "their ema"
        else:
            kept_of[model], which = max(own, key=lambda hash, own=own: (own[hash], hash)), (
                "another average" if model not in several else
                "the average that they have most records of")
        if which != "last" or model in several:
            groups.setdefault(which, []).append(model)
    kept = [r for r in records if r.task != TEXT_TO_IMAGE or kept_of.get(
        r.identity.model, _first_run(r)) == _first_run(r)]
    used = f"average={study.average}" if study.average else "their ema"
    told = []
    for which, models in groups.items():
        less = sum(counts[m].total() - counts[m][kept_of[m]] for m in models)
        out = f", and {less:,} are left out" if less else ""
        told.append(f"{os.fspath(home)}: {labels.listing(models, 'and')}: " + (
            "measured with several averages of their parameters; taken are the records of the last "
            f"config's, {used}{out}" if which == "last" else
            f"no records of the last config's average, {used}; taken are those of {which}{out}"))
    return kept, told


def _first_run(r: Record) -> str:
    """Hash of the network, or of the first that was trained so."""
    return r.repeats or r.identity.model_hash


class _Way(NamedTuple):
    """How a cell was measured: against which statistics and by which measures, with how many
    pictures (of a race those that it foretells for; 0 where no record says), by which version."""

    reference_hash: str
    num_images: int
    version: str


def _by_way(records: Sequence[Record], num_images: int) -> dict[_Way, list[Record]]:
    whole = [r.identity for r in records if not r.round]
    raced = {
        raced_reference(dataclasses.replace(i, num_images=n)): (i.reference_hash, n)
        for i in whole for n in {i.num_images, num_images}
    }
    out: dict[_Way, list[Record]] = {}
    for r in records:
        i = r.identity
        way = raced.get(i.reference_hash, (i.reference_hash, 0)) if r.round else (
            i.reference_hash, i.num_images)
        out.setdefault(_Way(*way, i.version.partition("+")[0]), []).append(r)
    return out


def _cell(r: Record, **same: float) -> tuple:
    """What `curves.arms` has once, whatever its `same`."""
    i = dataclasses.replace(
        r.identity, model_hash="", num_images=0, reference_hash="", version="", **same)
    return i, r.setting, r.student_steps


def comparable(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records of which those that are drawn beside each other are `of_one_number`: of all
    networks that draw from text together, of those that restore pictures by fine-tuning. What
    DreamBooth taught is scored without a distance, and stays."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r.task in (*FROM_TEXT, *RESTORING):
            group = ("", "") if r.task in FROM_TEXT else (r.task, r.setting)
            groups.setdefault(group, []).append(r)
    out: set[Identity] = set()
    told = []
    for own in groups.values():
        kept, said = of_one_number(own)
        out |= {r.identity for r in own} - {r.identity for r in kept}
        told += said
    return [r for r in records if r.identity not in out], told


def of_one_number(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records without those of cells that were measured on another number of pictures than the
    rest: with fewer a distance is larger.

    A seed block keeps the number that most cells of all blocks have, of equally many the larger;
    where there are several tasks the first of `records.TASKS` decides, which is the members'.
    Rounds of a race count by what they foretell for, and stay where nothing tells it. So does a
    cell that has the number at some rates and not at others, for `curves.arms` to refuse.

    Args:
      records: that are compared.

    Returns:
      The records, and a sentence for each task, number and seed block of which some are left out.
    """
    numbers = {
        r.identity: way.num_images for way, some in _by_way(records, 0).items() for r in some}
    cell_of = {r.identity: (r.task, *_cell(r, guidance=0.0)) for r in records}
    cells: dict[int, dict[int, set[tuple]]] = {}
    for i, n in numbers.items():
        if n:
            cells.setdefault(i.seed_block, {}).setdefault(n, set()).add(cell_of[i])
    first = min((r.task for r in records), key=TASKS.index, default="")
    total = collections.Counter[int]()
    for own in cells.values():
        total.update({n: sum(task == first for task, *_ in some) for n, some in own.items()})
    out: set[tuple] = set()
    told = []
    for block, own in sorted(cells.items()):
        kept = max(own, key=lambda n: (total[n], n))
        for n, task in itertools.product(sorted(own.keys() - {kept}), TASKS):
            less = {cell for cell in own[n] - own[kept] if cell[0] == task}
            if not less:
                continue
            out |= less
            of = labels.listing(sorted({i.model for _, i, *_ in less}))
            told.append(
                f"{'' if task == TEXT_TO_IMAGE else f'{labels.task(task)}: '}{len(less)} "
                f"{'cell' if len(less) == 1 else 'cells'} of {of} "
                f"{'was' if len(less) == 1 else 'were'} measured on {n:,} pictures of seed block "
                f"{block} and not {kept:,}, which does not compare, and left out."
            )
    return [r for r in records if not (numbers[r.identity] and cell_of[r.identity] in out)], told


def config_of(home: epath.PathLike) -> Study | None:
    """A workdir's last config; None of a folder that is no workdir or whose config cannot be read.
    """
    workdir = Workdir(home)
    if not (workdir / MARKER).exists():
        return None
    try:
        return workdir.last_config()
    except UserError:
        return None


def leading(records: Sequence[Record]) -> str | None:
    """The measure that chose the guidance of most cells: the one at whose best rates, on the block
    that holds most rates, the others report. The table's first where several do, or none was
    chosen; None where there is none."""
    have = curves.measures(records)
    if len(have) < 2:
        return have[0] if have else None
    held: dict[int, set[tuple]] = {}
    for r in records:
        i = r.identity
        held.setdefault(i.seed_block, set()).add((i.model, i.sampler, i.steps, i.guidance))
    select = max(held, key=lambda block: (len(held[block]), -block))
    told = set().union(*(cells for block, cells in held.items() if block != select))

    def count(name: str) -> int:
        return sum((*cell, rate) in told
                   for cell, rate in curves.best_guidance(records, name, select).items())

    return max(have, key=count)


def whole(
    records: Sequence[Record], metric: str, select: int, blocks: Sequence[int]
) -> list[int]:
    """Of the seed blocks that are to be reported those that hold every cell that any of them holds,
    at whatever guidance; where none does, the one that holds most.

    A block that was added later says nothing until it is measured, and takes nothing away.

    Args:
      records: of one study.
      metric: only records with this measure count.
      select: the seed block that chooses. With it among `blocks` they stay what they are, for
        `statistics.blocks.pooled` to refuse.
      blocks: that are to be reported.
    """
    blocks = list(dict.fromkeys(blocks))
    if select in blocks:
        return blocks
    held: dict[int, set[tuple]] = {block: set() for block in blocks}
    for r in records:
        i = r.identity
        if i.seed_block in held and metric in r.metrics:
            cell = dataclasses.replace(i, seed_block=0, guidance=0.0)
            held[i.seed_block].add(dataclasses.astuple(cell))
    every = set().union(*held.values())
    return [b for b in blocks if held[b] == every] or [max(blocks, key=lambda b: len(held[b]))]


def left_out(asked: Sequence[int], kept: Sequence[int]) -> str:
    """A sentence on the blocks that were asked for and are not `whole`; empty where all are."""
    lacking = [str(b) for b in dict.fromkeys(asked) if b not in kept]
    if not lacking:
        return ""
    one = len(lacking) == 1
    return (
        f"Seed block{'' if one else 's'} {labels.listing(lacking)} {'is' if one else 'are'} not "
        "measured in every cell that is reported and left out so far: what is reported is of "
        f"{labels.listing([str(b) for b in kept])}."
    )
