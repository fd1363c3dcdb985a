"""Cascades of a study: their networks' data and runs, and how they are measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from ldm_scaling import files, pictures
from ldm_scaling.config import Cascade, Study, Train
from ldm_scaling.config.cascade import TASK
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, cost, zoo
from ldm_scaling.sampling import sampler as sampler_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import fitting, labels, runs, sheet, small, sweep, versions
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.materials import SHOWN_EXAMPLES, Materials
from ldm_scaling.study.networks import grown, model_hash
from ldm_scaling.study.records import First
from ldm_scaling.study.scorer import Scorer
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks import cascade as cascade_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.cascade_drawing import CascadeDrawer
from ldm_scaling.tasks.drawing import Drawer, Frozen, sampling_key
from ldm_scaling.training.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Cascaded:
    """A study's cascades, as its config says. As `Materials`, parts are made when first asked for,
    and all processes must ask together; with `materials.own` they are a process's own.

    Attributes:
      materials: of the study.
    """

    materials: Materials
    name: ClassVar[str] = TASK  # Of its part of the config.

    @property
    def config(self) -> Cascade:
        """What they are."""
        return self.materials.study.cascade

    @property
    def runs(self) -> dict[str, Train]:
        """The config's runs that are used, by their keys."""
        return {"cascade.base_train": self.config.base_train, "cascade.train": self.config.train}

    @property
    def tables(self) -> list[tuple[str, int, str]]:
        """(sampler, steps, spacing) of all that is drawn."""
        c = self.config
        first = [(c.first_sampler, steps, c.first_spacing) for steps in c.first_steps]
        return [*first, c.sample.table, *subject_lib.tables(c.sweep)]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every cascade's networks: the base one, and the member."""
        return [(base, upper) for upper in self.materials.study.upper for base in self.config.base]

    @property
    def members(self) -> tuple[str, ...]:
        """The cascades' names."""
        return tuple(f"{base}+{upper}" for base, upper in self.pairs)

    @property
    def setting(self) -> str:
        """See `Cascade.setting`."""
        return self.config.setting

    @property
    def drawn_with(self) -> str:
        """The setting, and how the first stage draws along the way: of pictures' names."""
        c = self.config
        name = solvers.canonical(c.first_sampler)
        table = (name, c.first_steps[-1], solvers.spacing_of(name, c.first_spacing))
        how = [*table, *versions.own_rows(self.materials.study.diffusion, table)]
        return f"{TASK}_{files.sha256_of([self.setting, how])[:8]}"

    def check(self) -> None:
        """Raises `UserError` for networks that do not fit, before anything is made."""
        for base in self.config.base:
            self.base_spec(base)
            fitting.noise(base, f"cascade.base={base!r}", self.materials.study.diffusion)
        for key, run, specs in (
            ("base_train", self.config.base_train, map(self.base_spec, self.config.base)),
            ("train", self.config.train, map(self.upper_spec, self.materials.study.upper)),
        ):
            runs.check_factors(f"cascade.{key}", run, map(backbone.param_shapes, specs))

    # Networks.

    @functools.cached_property
    def small_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the small pictures' latents."""
        height, width, deep = self.materials.latent_shape
        if height % self.config.factor:
            raise UserError(
                f"config: cascade.factor={self.config.factor} does not divide latents of side "
                f"{height}, which data.side={self.materials.study.data.side} and this autoencoder "
                "make"
            )
        return height // self.config.factor, width // self.config.factor, deep

    def base_spec(self, base: str) -> backbone.Spec:
        """A base network. Raises `UserError` when it does not take the small latents."""
        spec = zoo.get(base).spec
        if spec.latent_shape != self.small_shape:
            raise UserError(
                f"config: cascade.base: {base} takes latents of {spec.latent_shape}, pictures "
                f"{self.config.factor} times smaller than data.side="
                f"{self.materials.study.data.side} have {self.small_shape}: choose another, or "
                "another cascade.factor"
            )
        fitting.tokens(spec, f"cascade.base: {base}", self.materials.study.data.text_length)
        fitting.heads(spec, f"cascade.base: {base}", self.materials.study.mesh)
        return spec

    def upper_spec(self, member: str) -> backbone.Spec:
        """A member's network, grown by what it sees of the small picture."""
        deep = self.materials.latent_shape[2]
        return self.materials.spec(member).grown(cascade_task.channels(self.config, deep))

    def _folder(self, kind: str, hash: str, name: str) -> epath.Path:
        """Of a run; it tells the settings, so that several lie side by side. To all else that
        decides it the workdir is bound."""
        return self.materials.workdir / "cascades" / f"{kind}_{hash[:8]}" / name

    def base_folder(self, base: str) -> epath.Path:
        """Of a base network's run."""
        return self._folder("base", self.config.base_hash, base)

    def upper_folder(self, member: str) -> epath.Path:
        """Of a second stage's run."""
        return self._folder("upper", self.config.upper_hash, member)

    def base_params(self, base: str) -> Any:
        """A base network's parameters, averaged. Raises `UserError` where it is not trained."""
        return self._params(self.base_spec(base), self.base_folder(base), self.config.base_train,
                            f"base network {base}")

    def upper_params(self, member: str) -> Any:
        """The same of a second stage."""
        return self._params(self.upper_spec(member), self.upper_folder(member), self.config.train,
                            f"second stage {member}")

    def _params(self, spec: backbone.Spec, folder: epath.Path, run: Train, what: str) -> Any:
        runs.require(folder, run, f"the {what} of the cascade")
        return runs.average(spec, folder, run, self.materials.mesh, run.steps)

    @functools.cached_property
    def small_frozen(self) -> Frozen:
        """What is the same under every base network: the study's own, of smaller latents."""
        return dataclasses.replace(self.materials.frozen, latent_shape=self.small_shape)

    @functools.cache  # noqa: B019  One object a run.
    def base_drawer(self, base: str) -> Drawer:
        """What draws small pictures."""
        return self._drawer(self.base_spec(base), self.small_frozen, self.config.base_train)

    @functools.cache  # noqa: B019
    def upper_drawer(self, member: str) -> Drawer:
        """What draws large pictures of small ones."""
        return self._drawer(self.upper_spec(member), self.materials.frozen, self.config.train)

    def _drawer(self, spec: backbone.Spec, frozen: Frozen, run: Train) -> Drawer:
        return self.materials.drawer_of(spec, run, self.config.sweep.batch_size, frozen)

    @functools.cache  # noqa: B019
    def drawer(self, base: str, member: str) -> CascadeDrawer:
        """What draws pictures with a cascade; `after` says in how many steps the first stage."""
        return CascadeDrawer(self.base_drawer(base), self.upper_drawer(member), self.config)

    # Training.

    @functools.cached_property
    def caches(self) -> small.SmallCaches:
        """Latents of the small pictures beside the study's own."""
        return small.caches_of(self.materials.caches, self.config.factor)

    @functools.cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """A fixed part of the validation split: `index`, `context`, and of large and small pictures
        `mean` and `low_mean`."""
        large = self.materials.validation
        low = self.caches.posteriors("validation").batch(large["index"])
        return large | {"low_mean": low["mean"]}

    def base_task(self, base: str) -> Task:
        """What a base network's run trains: text to small images."""
        found = self.validation
        held_out = {name: found[name] for name in ("context", "index")}
        return text_to_image.make(
            f"{base}, small pictures", self.base_spec(base), self.config.base_train,
            self.materials.study.diffusion, self.materials.study.sample, self.small_frozen,
            self.base_drawer(base), held_out | {"mean": found["low_mean"]},
        )

    def upper_task(self, member: str) -> Task:
        """What a second stage's run trains."""
        m, spec, found = self.materials, self.upper_spec(member), dict(self.validation)
        # At the level that is drawn with a run that goes on would mix two losses: it may change.
        found["seen"] = self._seen(found, self.config.augment / 2)
        del found["low_mean"]

        channels = spec.in_channels - m.spec(member).in_channels
        start = functools.partial(grown, m, member, channels)
        return cascade_task.make(
            f"{member}, second stage", spec, self.config, m.study.diffusion, m.frozen, m.mesh,
            start if self.config.start == "member" else None, found, self._show(member),
        )

    def _seen(self, found: dict[str, np.ndarray], level: float) -> np.ndarray:
        """What second stages see of real small pictures, with fixed noise of a level."""
        low_BhwC = self.materials.frozen.latent_scale * found["low_mean"].astype(np.float32)
        level_B = np.full(len(low_BhwC), level, np.float32)
        noise_BhwC = sampler_lib.normal(jax.random.key(0), found["index"], 0, self.small_shape)
        low_BhwC = np.asarray(cascade_task.noised(low_BhwC, noise_BhwC, level_B))
        return cascade_task.seen(low_BhwC, level_B, self.config)

    def _show(self, member: str) -> Callable:
        """Large pictures of real small ones, for the first captions."""
        sample, drawer = self.config.sample, self.upper_drawer(member)
        table = drawer.table(sample.sampler, sample.steps, sample.spacing)
        n = min(sample.num_images, SHOWN_EXAMPLES, len(self.validation["index"]))
        found = {name: some[:n] for name, some in self.validation.items()}
        seen_PHWC = self._seen(found, self.config.level)

        def show(params: Any, step: int) -> dict[str, np.ndarray]:
            shown = Configuration(table, 1.0, found["index"], np.arange(n))
            (drawn,) = drawer.pictures(
                params, [shown], found["context"], jax.random.key(0), condition_PHWC=seen_PHWC
            )
            return {"samples": pictures.tile(drawn)}

        return show

    def train(self) -> None:
        """Every base network and second stage that is missing."""
        m, config = self.materials, self.config
        for base in config.base:
            runs.fit(m.study, m.mesh, self.base_folder(base), config.base_train,
                     self.base_spec(base), functools.partial(self.base_task, base),
                     self.caches.training)
        for member in m.study.upper:
            runs.fit(m.study, m.mesh, self.upper_folder(member), config.train,
                     self.upper_spec(member), functools.partial(self.upper_task, member),
                     self.caches.both)

    # Measuring.

    @property
    def scorer(self) -> Scorer:
        """The members' own: both are held against the same pictures."""
        return self.materials.scorer

    @property
    def has_reference(self) -> bool:
        """See `Materials.has_reference`."""
        return self.materials.has_reference

    def first(self, base: str, steps: int) -> First:
        """A first stage in so many steps, as records have it."""
        c, study = self.config, self.materials.study
        name = solvers.canonical(c.first_sampler)
        spacing = solvers.spacing_of(name, c.first_spacing)
        gflops = self.materials.cost(self.base_spec(base)).gflops
        table = solvers.make(
            name, schedule_lib.get(study.diffusion.schedule), steps, study.diffusion.prediction,
            spacing,
        )
        return First(
            base, name, steps, spacing, c.upper_guidance, c.level, gflops,
            gflops / self._reference_cost, table.calls, table.guided_calls,
        )

    @functools.cached_property
    def _reference_cost(self) -> float:
        m = self.materials
        return m.cost(m.spec(m.study.reference)).gflops

    def subject(self, base: str, member: str, steps: int) -> Subject:
        """A cascade whose first stage takes so many steps, as it is measured."""
        study = self.materials.study
        spec = zoo.get(base).spec
        own = [self.setting, base, spec, model_hash(study, member), *backbone.recipe(spec)]
        return Subject(
            member, files.sha256_of(own), self.config.train.steps,
            self.config.sweep.judged_as(study.sweep), study.diffusion, study.seed, TASK,
            setting=self.setting, first=self.first(base, steps),
        )

    def subjects(self) -> list[Subject]:
        """All that is measured."""
        return [self.subject(*pair, n) for pair in self.pairs for n in self.config.first_steps]

    def network(self, subject: Subject) -> backbone.Spec:
        """Of the second stage; `Subject.first` has the first one's cost."""
        return self.upper_spec(subject.member)

    def bench(self, subject: Subject, reference_cost: cost.Cost) -> sweep.Bench:
        """What one of these is measured with."""
        m, base, member = self.materials, subject.first.model, subject.member
        spec = self.network(subject)
        own = m.cost(spec)
        both = own.params + m.cost(self.base_spec(base)).params
        return sweep.Bench(
            spec=spec, drawer=self.drawer(base, member).after(subject.first.steps),
            params=self.params(base, member), cost=dataclasses.replace(own, params=both),
            reference_cost=reference_cost, scorer=self.scorer, prompts=m.swept_prompts,
            directory=m.workdir / "records", strips=m.workdir / "strips",
        )

    def params(self, base: str, member: str) -> tuple[Any, Any]:
        """Both networks' parameters."""
        return self.base_params(base), self.upper_params(member)

    # Looking.

    def as_study(self) -> Study:
        """The study as what asks for pictures sees it: its members are the cascades."""
        return dataclasses.replace(
            self.materials.study, members=self.members, sample=self.config.sample, cascade=Cascade()
        )

    def of_name(self, name: str) -> tuple[str, str]:
        """The networks of a cascade."""
        return self.pairs[self.members.index(name)]

    def sheet(self, members: Sequence[str]) -> np.ndarray:
        """A labelled grid, uint8 (H, W, 3): of each cascade the small pictures, the large ones that
        it makes of them, and what the member alone draws, for the same captions."""
        m, sample, steps = self.materials, self.config.sample, self.config.first_steps[-1]
        block = m.prompts(m.study.sweep.report_block)
        count = min(sample.num_images, len(block.index_N))
        index_N, places_N = block.index_N[:count], np.arange(count)
        context_PLD, key = block.context_NLD[:count], sampling_key(m.study.seed)
        rows = []
        for base, member in self.pairs:
            drawer = self.drawer(base, member).after(steps)
            table = drawer.table(sample.sampler, sample.steps, sample.spacing)
            shown = [Configuration(table, sample.guidance, index_N, places_N)]
            params = self.params(base, member)
            low = drawer.small(params[0], shown[0], context_PLD, key)
            decoded = self.base_drawer(base).decode(low, lambda j: "a small picture")
            f = self.config.factor
            drawn = {
                f"{base}, {labels.steps(steps)}": decoded.repeat(f, 1).repeat(f, 2),
                f"then {member}, {labels.steps(sample.steps)}": drawer.pictures(
                    params, shown, context_PLD, key)[0],
            }
            if base == self.config.base[-1]:
                drawn[f"{member} alone, {labels.steps(sample.steps)}"] = m.drawer(member).pictures(
                    m.member_params(member), shown, context_PLD, key)[0]
            for name, images in drawn.items():
                rows.append(sheet.Row([image[None] for image in images], (name,),
                                      apart=name is next(iter(drawn)) and bool(rows)))
        about = f"{labels.sampler(sample.sampler)}, guidance {sample.guidance:g}"
        title = f"{labels.task(TASK)}s: {count} captions"
        return np.asarray(sheet.draw(sheet.Sheet(title, about, rows)))
