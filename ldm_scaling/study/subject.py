"""What a sweep measures: a network, the grid that it is measured on, and the records of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

from etils import epath

from ldm_scaling.config import Diffusion, Study, Sweep, repeats
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models.cost import Cost
from ldm_scaling.sampling import solvers
from ldm_scaling.study import curves, raced, records, versions
from ldm_scaling.study.networks import model_hash
from ldm_scaling.study.records import Identity, Record


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, and the grid that it is measured on; make one with `of_member`, `subjects` of
    `early`, or `subject` of `finetuned`, `distilled` or `cascaded`.

    Attributes:
      member: its name.
      hash: of all that decides its parameters.
      train_step: of its checkpoint, see `records.Record.task`.
      sweep: the grid.
      diffusion: the noise and what it predicts.
      seed: of the study: noise is drawn by it.
      task: see `records.TASKS`.
      told, student_steps, setting, first: see `records.Record`.
      run: of the member's training runs, from 0.
      first_run: of a further run the first, at whose chosen guidance it is measured.
    """

    member: str
    hash: str
    train_step: int
    sweep: Sweep
    diffusion: Diffusion
    seed: int
    task: str = records.TEXT_TO_IMAGE
    told: bool = False
    student_steps: int = 0
    setting: str = ""
    first: records.First | None = None
    run: int = 0
    first_run: Subject | None = None

    @property
    def network(self) -> str:
        """Name of the training run that its parameters are of."""
        return repeats.name(self.member, self.run)

    @property
    def model(self) -> str:
        """Its name in records."""
        return f"{self.first.model}+{self.member}" if self.first else self.member

    @property
    def selects(self) -> bool:
        """Whether anything is chosen on the selection block: guidance, or with text the steps that
        are best within a budget. Others are measured on the blocks that report alone."""
        return self.task in records.CHOSEN or len(self.sweep.guidance) > 1


def of_member(study: Study, network: str) -> Subject:
    """A text-to-image member of a study, at the end of its training; any of its runs, see
    `Study.trained`."""
    member, run = study.run_of(network) if network in study.trained else (network, 0)
    return Subject(
        member, model_hash(study, network), 0 if study.weights else study.train.steps, study.sweep,
        study.diffusion, study.seed, run=run, first_run=of_member(study, member) if run else None,
    )


def most_steps(sweep: Sweep, sampler: str) -> float:
    """The most steps that a sampler is run with: its own limit, or else that of its kind, which
    is its name without options."""
    limits = {solvers.canonical(name): most for name, most in sweep.max_steps.items()}
    name, _ = solvers.parse(sampler)
    return limits.get(solvers.canonical(sampler), limits.get(name, math.inf))


def tables(sweep: Sweep) -> list[tuple[str, int, str]]:
    """(sampler, steps, spacing) of all that a grid draws with."""
    return [
        (name, steps, sweep.spacing) for name in sweep.samplers for steps in sweep.steps
        if steps <= most_steps(sweep, name)
    ]


def _identities(
    subject: Subject, block: int, reference_hash: str, guidance: Callable
) -> list[Identity]:
    first = subject.first
    firsts = [(first.sampler, first.steps, first.spacing)] if first else []
    return [
        Identity(
            model=subject.model,
            model_hash=subject.hash,
            train_step=subject.train_step,
            sampler=solvers.canonical(name),
            steps=steps,
            spacing=solvers.spacing_of(name, spacing),
            guidance=w,
            seed_block=block,
            num_images=subject.sweep.num_images,
            reference_hash=reference_hash,
            version=version,
            first=first.spelling if first else "",
        )
        for name, steps, spacing in tables(subject.sweep)
        for version in [versions.of(subject.diffusion, *firsts, (name, steps, spacing))]
        for w in guidance(name, steps)
    ]


def selection(subject: Subject, reference_hash: str) -> list[Identity]:
    """The records that guidance is chosen on: the full grid on the selection block. None where
    nothing is chosen, and of a further training run."""
    if not subject.selects or subject.first_run:
        return []
    sweep = subject.sweep
    return _identities(subject, sweep.select_block, reference_hash, lambda *_: sweep.guidance)


def reporting(
    subject: Subject, reference_hash: str, chosen: list[Record]
) -> list[Identity]:
    """The records that are reported: the chosen guidance of each cell on every report block. Of a
    further training run `chosen` are the first's, and their rates are measured on the block that
    chose them too, unless they raced there: that block says which cells are best, and a race has
    fewer pictures."""
    if not subject.selects:
        return _reported(subject, reference_hash, lambda *_: subject.sweep.guidance)
    best = curves.best_guidance(chosen, subject.sweep.choose_by, subject.sweep.select_block)
    return _reported(
        subject, reference_hash,
        lambda name, steps: (best[subject.model, solvers.canonical(name), steps],),
    )


def _reported(subject: Subject, reference_hash: str, guidance: Callable) -> list[Identity]:
    again = subject.first_run is not None and not races(subject)
    chose = (subject.sweep.select_block,) if again else ()
    return [
        i for block in (*chose, *subject.sweep.report_blocks)
        for i in _identities(subject, block, reference_hash, guidance)
    ]


def calls(diffusion: Diffusion, identity: Identity) -> tuple[int, int]:
    """Network calls per picture, and how many of them guidance makes pairs."""
    return _calls(
        identity.sampler, diffusion.schedule, identity.steps, diffusion.prediction, identity.spacing
    )


@functools.cache
def _calls(
    sampler: str, schedule: str, steps: int, prediction: str, spacing: str
) -> tuple[int, int]:
    table = solvers.make(sampler, schedule_lib.get(schedule), steps, prediction, spacing)
    return table.calls, table.guided_calls


def work(subject: Subject, cost: Cost, identity: Identity) -> float:
    """GFLOPs of a record: every picture's calls, two evaluations each where guided, and one more
    for decoding and scoring. What time left is reckoned by. What a cascade's first stage draws
    serves a whole grid, and each of its tables has a share."""
    first = subject.first
    rate = first.upper_guidance if first else identity.guidance
    pairs = rate != 1 and not subject.told
    every, guided = calls(subject.diffusion, identity)
    evaluations = every + (guided if pairs else 0)
    before = 0.0
    if first:
        paired = first.calls if first.guided_calls is None else first.guided_calls
        drawn = first.calls + (paired if identity.guidance != 1 else 0)
        before = drawn * first.gflops / len(tables(subject.sweep))
    return ((evaluations + 1) * cost.gflops + before) * identity.num_images


def races(subject: Subject) -> bool:
    """Whether its guidance rates race."""
    return subject.selects and subject.sweep.strategy == "racing"


def planned(subject: Subject) -> list[Identity]:
    """What a network gets, over all blocks; which rates will be reported, or go on in a race, is a
    guess."""
    guess = (max(subject.sweep.guidance),)
    first = selection(subject, "")
    return (raced.planned(subject.sweep, first) if first and races(subject) else first) + _reported(
        subject, "", lambda *_: guess
    )


def _there(
    subject: Subject, identities: Iterable[Identity], directory: epath.Path
) -> list[Record]:
    paths = [records.path_of(directory, i.key) for i in identities]
    found = [records.read(p) for p in paths if p.exists()]
    # Of fine-tuning those of earlier versions do not tell theirs.
    return [dataclasses.replace(r, setting=subject.setting) for r in found]


def chosen(
    subject: Subject, reference_hash: str, directory: epath.Path
) -> tuple[list[Record], bool]:
    """The records of this config that are there on the selection block, of a race each rate's last,
    of a further training run the first's; and whether they are all."""
    subject = subject.first_run or subject
    first = selection(subject, reference_hash)
    if races(subject):
        return raced.last_rounds(subject.sweep, first, directory, subject.sweep.choose_by)
    found = _there(subject, first, directory)
    return found, len(found) == len(first)


def existing(
    subject: Subject, reference_hash: str, directory: epath.Path
) -> list[Record]:
    """The records of this config that are there, of all blocks; of a race each rate's last."""
    first, whole = chosen(subject, reference_hash, directory)
    own = [] if subject.first_run else first
    if not whole:
        return own
    return own + _there(subject, reporting(subject, reference_hash, first), directory)


def recount(
    found: Iterable[Record], subject: Subject, size: Cost, reference: Cost, directory: epath.Path
) -> int:
    """Writes those of a network's records anew whose costs an earlier version counted on captions
    as long as the network takes them, whatever `data.text_length`.

    Args:
      found: records of the folder, of whatever networks.
      subject: the network.
      size: its cost on captions of the study's length.
      reference: that of the network whose cost is 1.
      directory: of the records.
    Returns:
      how many were written.
    """
    other = [
        r for r in found
        if (r.identity.model, r.identity.model_hash) == (subject.model, subject.hash)
        and (r.first and r.first.spelling) == (subject.first and subject.first.spelling)
        and not (math.isclose(r.gflops, size.gflops, rel_tol=1e-3) and (
            not r.first or math.isclose(r.first.gflops, subject.first.gflops, rel_tol=1e-3)))
    ]
    for r in other:
        records.write(directory, dataclasses.replace(
            r, gflops=size.gflops, norm_cost=size.gflops / reference.gflops, first=subject.first))
    return len(other)
