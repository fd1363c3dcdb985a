"""Members that are distilled: their students' runs, networks, and how they are measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Diffusion, Distill, Sample, Train
from ldm_scaling.config.distill import Stage
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, cost, sd_folder
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import encoders, labels, runs, sheet, sweep
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.caches import Caches
from ldm_scaling.study.materials import VALIDATION_EXAMPLES, Materials
from ldm_scaling.study.networks import model_hash
from ldm_scaling.study.scorer import Scorer
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks.distillation import student
from ldm_scaling.tasks.drawing import Drawer, sampling_key
from ldm_scaling.training.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Distilled:
    """A study's members, distilled as its config says. As `Materials`, parts are made when first
    asked for, and all processes must ask together; with `materials.own` they are a process's own.

    Attributes:
      materials: of the study.
      name: of the part of the config that says how, `consistency` or `halving`.
    """

    materials: Materials
    name: str

    @property
    def config(self) -> Distill:
        """How."""
        return getattr(self.materials.study, self.name)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All students of a member, first to last."""
        return self.config.stages(self.materials.study.diffusion.prediction)

    @property
    def runs(self) -> dict[str, Train]:
        """The config's runs that are used, by their keys."""
        return self.config.runs(self.materials.study.diffusion.prediction)

    @property
    def measured(self) -> tuple[Stage, ...]:
        """The stages that are measured: every halving, or the last."""
        return tuple(s for s in self.stages if s.steps) or self.stages[-1:]

    @property
    def tables(self) -> list[tuple[str, int, str]]:
        """(sampler, steps, spacing) of all that is drawn."""
        first = self.materials.study.members[0]
        grids = [self.subject(first, stage).sweep for stage in self.measured]
        samples = [self.sample(stage).table for stage in self.stages]
        return [*samples, *(t for grid in grids for t in subject_lib.tables(grid))]

    def sample(self, stage: Stage) -> Sample:
        """How a stage's student is drawn: of halving in its own steps; one that imitates as its
        teacher is."""
        own = self.config.sample
        if stage.kind == "halving":
            return dataclasses.replace(own, steps=stage.steps, spacing=self.config.sweep.spacing)
        if stage.kind == "imitation":
            return dataclasses.replace(self.materials.study.sample, guidance=own.guidance)
        return own

    def check(self) -> None:
        """Raises `UserError` for settings that do not fit, before anything is made."""
        for member in self.materials.study.members:
            if self.materials.spec(member).guidance_dim:
                raise UserError(
                    f"config: {self.name}.method={self.config.method!r}: {member} is told its "
                    "guidance rate, as after distillation: only other networks are teachers here"
                )
        nothing = np.zeros((1, 1), np.float32)
        for stage in self.stages:
            # Losses check their settings when they are made; none calls a network.
            student.loss_fn(
                stage, self.config, self.materials.study.diffusion, _uncalled, _uncalled,
                self._teacher_predicts(stage), _uncalled, {"context": nothing},
            )
            runs.check_factors(f"{self.name}.{stage.run}", stage.train, (
                backbone.param_shapes(self.spec(member, stage))
                for member in self.materials.study.members
            ))

    def check_drawn(self, stage: Stage, samplers: Sequence[str], rates: Sequence[float]) -> None:
        """Raises `UserError` for guidance rates that a student is not told, and for samplers and
        options of theirs that it is not drawn by."""
        low, high = self.config.rates
        if stage.told and not all(low <= w <= high for w in rates):
            raise UserError(
                f"--guidance={','.join(f'{w:g}' for w in rates)}: students of "
                f"{self.config.method} are told rates from {low:g} to {high:g}"
            )
        for name in samplers:
            if why := self.config.refuses(name, imitates=stage.kind == "imitation"):
                raise UserError(f"--sampler={name}: {why}")

    # Networks.

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """The students'."""
        diffusion = self.materials.study.diffusion
        return dataclasses.replace(
            diffusion, prediction=student.prediction_of(self.config, diffusion)
        )

    def _teacher_predicts(self, stage: Stage) -> str:
        first = stage == self.stages[0]
        return (self.materials.study.diffusion if first else self.diffusion).prediction

    def _before(self, stage: Stage) -> Stage | None:
        place = self.stages.index(stage)
        return self.stages[place - 1] if place else None

    def spec(self, member: str, stage: Stage | None) -> backbone.Spec:
        """A student's network; without a stage the member's own."""
        spec = self.materials.spec(member)
        if stage is None or not stage.told:
            return spec
        return dataclasses.replace(spec, guidance_dim=self.config.guidance_dim)

    @property
    def setting(self) -> str:
        """See `Distill.setting`."""
        return self.config.setting

    def folder(self, member: str, stage: Stage) -> epath.Path:
        """Of a student's run; its name tells the settings, so that several lie side by side. To all
        else that decides it the workdir is bound."""
        return self.materials.workdir / "distilled" / self.setting / member / stage.name

    def subject(self, member: str, stage: Stage) -> Subject:
        """A student as it is measured."""
        study = self.materials.study
        sweep_ = self.config.sweep.judged_as(study.sweep)
        if stage.steps:
            steps = tuple(sorted({*sweep_.steps, stage.steps}))
            sweep_ = dataclasses.replace(sweep_, steps=steps)
        return Subject(
            member, files.sha256_of([model_hash(study, member), self.config.hash, stage.name]),
            stage.trained, sweep_, self.diffusion, study.seed, self.config.task, stage.told,
            stage.steps, self.setting,
        )

    def params(self, member: str, stage: Stage | None) -> Any:
        """A student's parameters, averaged; without a stage the member's own. Raises `UserError`
        where it is not trained."""
        if stage is not None:
            runs.require(self.folder(member, stage), stage.train, f"member {member}",
                         f"distilled ({self.config.method}, {stage.name})")
        return self._trained(member, stage)

    def _trained(self, member: str, stage: Stage | None) -> Any:
        """The same of a stage that is known to be done: a shared folder may lag for a moment."""
        if stage is None:
            return self.materials.member_params(member)
        folder, run = self.folder(member, stage), stage.train
        return runs.average(
            self.spec(member, stage), folder, run, self.materials.mesh, run.steps
        )

    @functools.cache  # noqa: B019  One object a run.
    def drawer(self, member: str, told: bool) -> Drawer:
        """What draws pictures with a member's students; compiled once for all that are alike."""
        stage = next(s for s in self.stages if s.told == told)
        return self.materials.drawer_of(
            self.spec(member, stage), self.config.train, self.config.sweep.batch_size,
            diffusion=self.diffusion,
        )

    # Training.

    @functools.cached_property
    def caches(self) -> Caches:
        """What students are trained on: what members were. Of a published network, which was
        trained elsewhere, latents and states by its own encoders."""
        m = self.materials
        if not m.study.weights:
            return m.caches
        own = sd_folder.read(m.study.weights).text_encoder()
        return dataclasses.replace(
            m.caches, text=lambda: encoders.text_states(own, m.study.members[0]),
            # Among other studies' caches names tell what made them.
            folder=m.caches.folder if m.caches.shared else m.workdir / "distilled" / "caches",
        )

    @functools.cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """A fixed part of the validation split, as a step takes it."""
        index = self.materials.some("validation", VALIDATION_EXAMPLES)
        latents = self.caches.posteriors("validation").batch(index)
        return {
            "mean": latents["mean"], "logvar": latents["logvar"],
            "context": self.caches.first_states("validation").batch(index)["context"],
            "index": index.astype(np.int32),
        }

    def task(self, member: str, stage: Stage) -> Task:
        """What a student's run trains."""
        m, before = self.materials, self._before(stage)
        return student.make(
            f"{member}, {self.config.method}, {stage.name}", stage, self.config,
            m.study.diffusion, self.spec(member, stage), self.spec(member, before),
            self._teacher_predicts(stage), lambda: self._trained(member, before), m.frozen,
            self.drawer(member, stage.told), self.sample(stage), self.validation,
        )

    def train(self) -> None:
        """Every student that is missing, one member after the other."""
        m = self.materials
        for member in m.study.members:
            for stage in self.stages:
                runs.fit(m.study, m.mesh, self.folder(member, stage), stage.train,
                         self.spec(member, stage), functools.partial(self.task, member, stage),
                         lambda: self.caches.training())

    # Measuring.

    @property
    def scorer(self) -> Scorer:
        """The members' own: students are held against the same pictures."""
        return self.materials.scorer

    @property
    def has_reference(self) -> bool:
        """See `Materials.has_reference`."""
        return self.materials.has_reference

    def subjects(self) -> list[Subject]:
        """All that is measured, the smallest member first, the longest trained last."""
        return [
            self.subject(member, stage)
            for member in self.materials.study.members for stage in self.measured
        ]

    def _stage(self, subject: Subject) -> Stage:
        return next(s for s in self.measured if s.trained == subject.train_step)

    def network(self, subject: Subject) -> backbone.Spec:
        """What draws what is measured."""
        return self.spec(subject.member, self._stage(subject))

    def bench(self, subject: Subject, reference_cost: cost.Cost) -> sweep.Bench:
        """What one of these is measured with."""
        m, stage, spec = self.materials, self._stage(subject), self.network(subject)
        return sweep.Bench(
            spec=spec, drawer=self.drawer(subject.member, stage.told),
            params=self.params(subject.member, stage), cost=m.cost(spec),
            reference_cost=reference_cost, scorer=self.scorer, prompts=m.swept_prompts,
            directory=m.workdir / "records", strips=m.workdir / "strips",
        )

    # Looking.

    def sheet(self, members: Sequence[str]) -> np.ndarray:
        """A labelled grid, uint8 (H, W, 3): of each member what it draws in few steps and in many,
        and what its last student draws in few, for the same captions from the same noise."""
        m, teacher = self.materials, self.materials.study.sample
        sample = self.sample(self.stages[-1])
        block = m.prompts(m.study.sweep.report_block)
        count = min(sample.num_images, len(block.index_N))
        index_N, places_N = block.index_N[:count], np.arange(count)
        last, rows = self.stages[-1], []

        def drawn(drawer: Drawer, params: Any, *settings: Any) -> list[np.ndarray]:
            shown = [
                Configuration(drawer.table(s.sampler, steps, s.spacing), s.guidance, index_N,
                              places_N)
                for s, steps in settings
            ]
            return drawer.pictures(
                params, shown, block.context_NLD[:count], sampling_key(m.study.seed)
            )

        for member in members:
            many_few = drawn(
                m.drawer(member), m.member_params(member), (teacher, teacher.steps),
                (teacher, sample.steps),
            )
            few = drawn(
                self.drawer(member, last.told), self.params(member, last), (sample, sample.steps)
            )
            many, less = map(labels.steps, (teacher.steps, sample.steps))
            names = [f"{member}, {many}", f"{member}, {less}", f"its student, {less}"]
            for name, images in zip(names, (*many_few, *few), strict=True):
                rows.append(sheet.Row([image[None] for image in images], (name,),
                                      apart=name is names[0] and bool(rows)))
        about = (
            f"members: {labels.sampler(teacher.sampler)}, guidance {teacher.guidance:g} · students "
            f"({self.config.method}): {labels.sampler(sample.sampler)}, guidance "
            f"{sample.guidance:g}"
        )
        title = f"{labels.task(self.config.task)}: {count} captions"
        return np.asarray(sheet.draw(sheet.Sheet(title, about, rows)))


def _uncalled(*args: Any) -> Any:
    raise AssertionError("a loss that is only made calls nothing")
