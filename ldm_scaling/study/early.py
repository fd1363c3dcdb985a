"""Members along their training: which checkpoints are measured, see `config.Early`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import processes
from ldm_scaling.study import runs
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.subject import Subject
from ldm_scaling.training import averages, checkpoint


def steps(study: Study) -> list[int]:
    """Training steps before the end that members are measured after, rising."""
    if not (study.trains_members and study.early.sampler):
        return []
    return sorted({n for n in study.train.keep_steps if n < study.train.steps})


def subjects(study: Study) -> list[Subject]:
    """All that is measured, the smallest member first, after ever more steps.

    Raises:
      UserError: where the end of training is not measured so.
    """
    along, sampler, count = steps(study), study.early.sampler, study.early.steps
    if not along:
        return []
    end = study.sweep
    if (sampler, count, end.spacing) not in subject_lib.tables(end):
        raise UserError(
            f"config: early.sampler={sampler!r}, early.steps={count}: the end of training is not "
            f"measured so: choose of sweep.samplers={end.samplers} and sweep.steps={end.steps}, "
            f"within sweep.max_steps={end.max_steps}, or measure the end alone, "
            "--config.early.sampler="
        )
    sweep = dataclasses.replace(end, samplers=(sampler,), steps=(count,))
    return [
        dataclasses.replace(subject_lib.of_member(study, member), train_step=n, sweep=sweep)
        for member in study.members for n in along
    ]


def _kept(materials: Materials, member: str) -> list[int]:
    return checkpoint.steps_of(materials.workdir.member(member) / "checkpoints")


def _require_average(materials: Materials, member: str, step: int, length: float) -> None:
    """Raises `UserError` where the snapshots up to a step do not give an average of this length."""
    try:
        averages.recipe(materials.workdir.member(member), step, length)
    except UserError as e:
        raise UserError(
            f"member {member} is to be measured after {step} steps of training: {e}; or measure "
            "the end alone, --config.early.sampler="
        ) from e


def check_ahead(materials: Materials, member: str) -> None:
    """Raises `UserError` where a run that is to go on, its own or another study's, has left behind
    a step that it would be measured at."""
    if lost := _passed(materials, member):
        raise _not_kept(member, lost)


def require_ahead(materials: Materials, member: str) -> None:
    """As `check_ahead`, in all processes."""
    if lost := processes.from_lead("passed", lambda: _passed(materials, member)):
        raise _not_kept(member, lost)


def _passed(materials: Materials, member: str) -> list[int]:
    have, study = _kept(materials, member), materials.study
    if study.train.steps in have:  # It may have been measured.
        return []
    behind = max([*have, study.start.passed + 1])
    return [n for n in steps(study) if n not in have and n < behind]


def require_kept(materials: Materials, reference_hash: str) -> None:
    """Raises `UserError` where a checkpoint is gone that is to be measured still, or snapshots are
    that its average is made of; in all processes."""
    directory = materials.workdir / "records"

    def lost() -> list[Any]:
        for s in subjects(materials.study):
            found = subject_lib.existing(s, reference_hash, directory)
            missing = len(found) < len(subject_lib.planned(s))
            if not missing:
                continue
            if (length := materials.study.average_of(s.member)) is not None:
                _require_average(materials, s.member, s.train_step, length)
            elif s.train_step not in _kept(materials, s.member):
                return [s.member, s.train_step]
        return []

    if found := processes.from_lead("kept", lost):
        raise _not_kept(found[0], found[1:])


def _not_kept(member: str, lost: list[int]) -> UserError:
    return UserError(
        f"member {member} is to be measured after {lost[0]} steps of training, and no checkpoint "
        f"was kept there: leave {lost[0]} out of train.keep_steps, or measure the end alone, "
        "--config.early.sampler="
    )


def params(materials: Materials, subject: Subject) -> Any:
    """The averaged parameters of a member, along its training or at its end, see
    `config.Study.average`."""
    run, member = materials.study.train, subject.member
    if subject.train_step not in steps(materials.study):
        return materials.member_params(subject.network)
    return runs.average(
        materials.spec(member), materials.workdir.member(member), run, materials.mesh,
        subject.train_step, materials.study.average_of(member),
    )
