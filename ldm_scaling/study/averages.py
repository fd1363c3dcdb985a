"""Members measured with averages of several lengths: which length is best at which size, see
`training.averages`. What is measured is kept, one record for each member, step and length."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Study, Sweep
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost
from ldm_scaling.study import labels, runs, sweep
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.networks import model_hash
from ldm_scaling.study.progress import Progress
from ldm_scaling.study.statistics import optimum
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks import text_to_image
from ldm_scaling.training import averages, checkpoint, profiles

log = logging.getLogger(__name__)

FOLDER = "averages"
LENGTHS = (0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)
"""Those that are measured where none are given, as far as the snapshots give them."""
LOSS = "loss"


@dataclasses.dataclass(frozen=True)
class Which:
    """One network.

    Attributes:
      member: its name.
      step: of training.
      length: of the average of its parameters; None is the run's own, `ema`.
    """

    member: str
    step: int
    length: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a network scored.

    Attributes:
      which: it.
      params: its parameters' number.
      length: relative standard deviation of what is averaged over, also of `ema`.
      residual: how far the profile of this length is met, see `profiles.Mix`.
      loss: of the parameters, on a fixed part of the validation split.
      distance: the metric that was asked for, on the block that chooses; None where none was.
    """

    which: Which
    params: int
    length: float
    residual: float
    loss: float
    distance: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """How pictures are drawn and by what they are measured.

    Attributes:
      sampler, steps, guidance: of all.
      metric: of `labels`, lower is better.
    """

    sampler: str
    steps: int
    guidance: float
    metric: str

    def __post_init__(self):
        if labels.measure(self.metric).better != "lower":
            raise UserError(f"--metric={self.metric}: of it more is better, and a best length is "
                            "found by a distance: name one, such as fd_effnetlite0")

    def grid(self, study: Study) -> Sweep:
        """The study's sweep, of this cell alone."""
        return dataclasses.replace(
            study.sweep, samplers=(self.sampler,), steps=(self.steps,), max_steps={},
            guidance=(self.guidance,), strategy="grid",
        )

    @property
    def words(self) -> str:
        return (f"{labels.sampler(self.sampler)}, {labels.steps(self.steps)}, guidance "
                f"{self.guidance:g}")


def of(
    materials: Materials, members: Sequence[str], lengths: Sequence[float], step: int
) -> list[Which]:
    """The networks that are to be measured, each member's `ema` first where it is there.

    Args:
      materials: of the study.
      members: of it, each taken once; all where none are named.
      lengths: that are asked for; without any those of `LENGTHS` that the snapshots give.
      step: of training; 0 is the last.
    Raises:
      UserError: for a study whose members are not trained, or without snapshots; a member that is
        none, a step without a snapshot, lengths that the snapshots do not give or that are fewer
        than a best one is told from.
    """
    study, out = materials.study, []
    others = {"weights": study.weights, "finetune.pretrained": study.finetune.pretrained}
    for key, value in (others | study.further).items():
        if value:
            raise UserError(f"averages measures members that a study trains: leave out "
                            f"config.{key}={value!r}")
    if not study.train.averages:
        raise UserError(
            "averages: the config tracks none: give the config that the members were trained with, "
            "or train with --config.train.averages='(0.05,0.1)'"
        )
    for member in dict.fromkeys(members or study.members):
        if member not in study.members:
            raise UserError(f"--member={member}: none of the config's: choose from "
                            f"{', '.join(study.members)}")
        folder, at = materials.workdir.member(member), step or study.train.steps
        if not step:
            runs.require(folder, study.train, f"member {member}")
        own = [Which(member, at, n) for n in lengths or _given(folder, at)]
        for which in own:
            averages.recipe(folder, at, which.length)  # Raises where it cannot be.
        if len({which.length for which in own}) < max(optimum.NOISE_FROM, len(own)):
            told = ", ".join(f"{which.length:g}" for which in own)
            raise UserError(f"lengths {told or 'none'} of {member}: give at least "
                            f"{optimum.NOISE_FROM}, each once, by --lengths")
        there = at in checkpoint.steps_of(folder / "checkpoints")
        out += ([Which(member, at, None)] if there else []) + own
    return out


def _given(folder: epath.Path, step: int) -> list[float]:
    averages.require(folder, step)
    out = []
    for length in LENGTHS:
        with contextlib.suppress(UserError):
            averages.recipe(folder, step, length)
            out.append(length)
    return out


def _study(study: Study, which: Which) -> Study:
    """The study whose records of this member are this network's."""
    average = "" if which.length is None else f"{which.length:g}"
    return dataclasses.replace(study, average=average)


def _subject(study: Study, which: Which, cell: Cell) -> Subject:
    subject = subject_lib.of_member(_study(study, which), which.member)
    return dataclasses.replace(subject, train_step=which.step, sweep=cell.grid(study))


def path_of(materials: Materials, which: Which) -> epath.Path:
    """Of a network's record: its name tells all that decides the network."""
    hash = model_hash(_study(materials.study, which), which.member)
    key = files.sha256_of([hash, which.step])
    return materials.workdir / FOLDER / f"{key}.json"


def read(path: epath.Path) -> Measured:
    """A record. Raises `UserError` for a file that is none."""
    try:
        body = json.loads(path.read_text())
        return Measured(Which(**body.pop("which")), **body)
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{path} is no record of an average ({e}): delete it, and run again") from e


def measure(
    materials: Materials, wanted: Sequence[Which], cell: Cell | None
) -> list[Measured]:
    """What is missing is measured; returns all. The loss is that of a run's validation; pictures
    are drawn and scored as a sweep's, on the block that chooses: what is reported of a length that
    was chosen here is of pictures that it was not chosen by."""
    found: list[Measured] = []
    task: tuple[str, Any] = "", None  # One at a time: what it compiled takes memory.
    with contextlib.ExitStack() as stack:
        progress = bar = None
        if cell is not None:
            progress = stack.enter_context(Progress(_work(materials, wanted, cell), 0.0))
        else:
            bar = stack.enter_context(files.progress(len(wanted), "averages", "average"))
        seconds: dict[str, dict] = {}
        for which in wanted:
            params = functools.cache(functools.partial(_params, materials, which))
            path = path_of(materials, which)
            if not path.exists():
                if which.member != task[0]:
                    task = which.member, _task(materials, which.member)
                body = dataclasses.asdict(_measured(materials, which, task[1], params()))
                log.info("%s", body)
                del body["distance"]  # It is among records of its own.
                files.write_json(path, body)
            one = read(path)
            if cell is not None:
                timed = seconds.setdefault(which.member, {})
                far = _distance(materials.own, which, cell, params, timed, progress)
                one = dataclasses.replace(one, distance=far)
            found.append(one)
            if bar is not None:
                bar.update()
    return found


def _work(materials: Materials, wanted: Sequence[Which], cell: Cell) -> float:
    """GFLOPs of all that is drawn."""
    own = materials.own
    subjects = [_subject(materials.study, which, cell) for which in wanted]
    return sum(
        subject_lib.work(s, own.cost(own.spec(s.member)), identity)
        for s in subjects for identity in subject_lib.selection(s, "")
    )


def _params(materials: Materials, which: Which) -> Any:
    m, member = materials, which.member
    return runs.average(
        m.spec(member), m.workdir.member(member), m.study.train, m.mesh, which.step, which.length
    )


def _task(materials: Materials, member: str) -> Any:
    m = materials
    return text_to_image.make(
        member, m.spec(member), m.study.train, m.study.diffusion, m.study.sample, m.frozen,
        m.drawer(member), m.validation,
    )


def _measured(materials: Materials, which: Which, task: Any, params: Any) -> Measured:
    run = materials.study.train
    if which.length is None:
        length = profiles.exponential(run.ema_decay, run.ema_ramp, which.step)
        residual = 0.0
    else:
        length = which.length
        residual = averages.recipe(
            materials.workdir.member(which.member), which.step, length).residual
    loss = float(task.validate(params, which.step)[LOSS])
    return Measured(which, cost.of(materials.spec(which.member)).params, length, residual, loss)


def _distance(
    own: Materials, which: Which, cell: Cell, params: Callable[[], Any], seconds: dict,
    progress: Progress,
) -> float:
    subject, spec = _subject(own.study, which, cell), own.spec(which.member)
    folder = own.workdir / FOLDER
    progress.show(f"{which.member} {which.length or 'ema'}")
    have = subject_lib.existing(subject, own.scorer.hash, folder / "records")
    bench = sweep.Bench(
        spec=spec, drawer=own.drawer(which.member), params=None if have else params(),
        cost=own.cost(spec), reference_cost=own.cost(own.spec(own.study.reference)),
        scorer=own.scorer, prompts=own.swept_prompts, directory=folder / "records",
        strips=folder / "strips", seconds=seconds,
    )
    (record,) = sweep.select(subject, bench, progress)
    return record.metrics[cell.metric]
