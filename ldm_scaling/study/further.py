"""What a study does with members once they are trained: it fine-tunes or distils them, makes
cascades of them, or neither."""

from __future__ import annotations

import dataclasses
import functools

from ldm_scaling import files, pictures
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts, processes
from ldm_scaling.study import runs, versions
from ldm_scaling.study.cascaded import Cascaded
from ldm_scaling.study.distilled import Distilled
from ldm_scaling.study.finetuned import FineTuned
from ldm_scaling.study.materials import Materials
from ldm_scaling.training import loop

Further = FineTuned | Distilled | Cascaded


def of(materials: Materials) -> list[Further]:
    """What the config says; kept, for what draws with networks is compiled once for every stage."""
    return _kept(materials) if materials.study.further else []


@functools.lru_cache(maxsize=2)
def _kept(materials: Materials) -> list[Further]:
    study = materials.study
    fine_tuned = [FineTuned(materials)] if study.finetune.task else []
    cascaded = [Cascaded(materials)] if study.cascade.base else []
    return [*fine_tuned, *(Distilled(materials, d.NAME) for d in study.distillations), *cascaded]


def train(further: Further) -> None:
    """Every member's further runs that are missing."""
    further.materials.require_trained()
    if not isinstance(further, FineTuned):
        further.train()
        return
    for member in further.materials.study.members:
        _fine_tune(further, member)


def _fine_tune(fine_tuned: FineTuned, member: str) -> None:
    if fine_tuned.trained(member):
        return
    if passed := fine_tuned.passed(member):
        raise UserError(
            f"member {member} is fine-tuned for {fine_tuned.config.task} beyond step {passed[0]} "
            f"and no checkpoint was kept there: leave {passed[0]} out of finetune.budgets, or "
            f"delete the later steps in {fine_tuned.folder(member) / 'checkpoints'} to have them "
            "made anew"
        )
    materials, run = fine_tuned.materials, fine_tuned.config.run
    study = materials.study
    loop.fit(
        fine_tuned.task(member), run, runs.loader_of(study, fine_tuned.source("train"), run),
        fine_tuned.folder(member), materials.mesh, study.seed,
        about=runs.about(study, fine_tuned.spec(member)),
    )


def grid(further: Further) -> str:
    """A labelled grid of what the networks draw, see their `sheet`; returns the file, which is not
    drawn again."""
    materials = further.materials
    subjects = [(s.model, s.hash, s.train_step) for s in further.subjects()]
    drawn_with = files.sha256_of([
        subjects, dataclasses.asdict(further.config.sample),
        *([dataclasses.asdict(materials.study.sample)] if isinstance(further, Distilled) else []),
        *([further.drawn_with] if isinstance(further, Cascaded) else []),
        *versions.own_rows(materials.study.diffusion, further.config.sample.table),
    ])
    path = materials.workdir / "samples" / f"{further.config.task}_{drawn_with[:8]}.png"
    if not processes.from_lead("grid", path.exists):
        image_HWC = further.sheet(materials.study.members)
        if hosts.is_lead():
            pictures.save_png(path, image_HWC)
    return str(path)
