"""Members that are trained further for an image-conditioned task: their data, runs and networks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_scaling import files, pictures
from ldm_scaling.config import FineTune, Train
from ldm_scaling.data.conditions import table
from ldm_scaling.data.conditions.source import ConditionedSource
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.models import backbone, cost, efficientnet, lpips
from ldm_scaling.parallel import hosts, placing, processes
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import baselines, datasets, labels, published_scorer, runs, sheet, sweep
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.baselines import Baselines
from ldm_scaling.study.materials import (
    LAYER,
    REFERENCE,
    SHOWN_EXAMPLES,
    VALIDATION_EXAMPLES,
    Materials,
    batches,
)
from ldm_scaling.study.networks import grown, tuned_hash
from ldm_scaling.study.paired_scorer import PairedScorer
from ldm_scaling.study.published_scorer import WithPublished
from ldm_scaling.study.subject import Subject
from ldm_scaling.study.sweep import Prompts, block_indices
from ldm_scaling.tasks import conditioned
from ldm_scaling.tasks.drawing import Drawer, sampling_key
from ldm_scaling.training import checkpoint
from ldm_scaling.training.task import Task

_BATCH = 64
PERCEPTUAL = "alex_shift_tolerant"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Some validation pictures with what networks see of them.

    Attributes:
      index_N: their numbers.
      mean_NHWC: latents, before scaling.
      seen_NHWC: see `conditioned.latents_of`.
      image_NHWC: the pictures, uint8.
      given_NHWC: the conditions at the pictures' size, uint8.
      mask_NHW1: 1 where a picture is not seen; None of tasks without masks.
    """

    index_N: np.ndarray
    mean_NHWC: np.ndarray
    seen_NHWC: np.ndarray
    image_NHWC: np.ndarray
    given_NHWC: np.ndarray
    mask_NHW1: np.ndarray | None = None

    def finished(self, images_JHWC: np.ndarray, places_J: np.ndarray) -> np.ndarray:
        """Drawn pictures as `restore` writes them: what was seen stays, pixel for pixel."""
        if self.mask_NHW1 is None:
            return images_JHWC
        return np.where(self.mask_NHW1[places_J] == 1, images_JHWC, self.given_NHWC[places_J])


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuned:
    """A study's members, fine-tuned as its config says. As `Materials`, parts are made when first
    asked for, and all processes must ask together; `FineTuned(materials.own)` are a process's own.

    Attributes:
      materials: of the study.
    """

    materials: Materials
    name: ClassVar[str] = "finetune"  # Of its part of the config.

    @property
    def config(self) -> FineTune:
        """What the members are fine-tuned for."""
        return self.materials.study.finetune

    @property
    def runs(self) -> dict[str, Train]:
        """The config's runs that are used, by their keys."""
        return {"finetune.train": self.config.train}

    @property
    def tables(self) -> list[tuple[str, int, str]]:
        """(sampler, steps, spacing) of all that is drawn."""
        return [self.config.sample.table, *subject_lib.tables(self.config.sweep)]

    # Networks.

    @functools.cached_property
    def condition(self) -> table.Condition:
        """The task's condition. Raises `UserError` for a task that is none."""
        return table.named(self.config.task)

    def check(self) -> None:
        """Raises `UserError` for settings that do not fit the data, before anything is made."""
        study, side = self.materials.study, self.materials.study.data.side
        self.condition.check((side, side))
        source_side = self.config.source_side
        if source_side:
            self.condition.check((source_side, source_side))
            if study.data.composed:
                raise UserError(
                    f"config: finetune.source_side={source_side}: composed pictures are drawn at "
                    f"data.side={side}, 0 takes them as they are"
                )
            if source_side < side:
                raise UserError(
                    f"config: finetune.source_side={source_side} is below data.side={side}: "
                    "examples are cut out of larger images"
                )
        if study.data.max_aspect != 1:
            raise UserError(
                f"config: data.max_aspect={study.data.max_aspect:g}: fine-tuning takes square "
                "pictures, 1"
            )
        shapes = (backbone.param_shapes(self.spec(member)) for member in study.members)
        runs.check_factors("finetune.train", self.config.train, shapes)

    def spec(self, member: str) -> backbone.Spec:
        """A member's network, grown by the condition."""
        channels = self.materials.latent_shape[2] + self.condition.masked
        return self.materials.spec(member).grown(channels)

    def folder(self, member: str) -> epath.Path:
        """Of a member's run; its name tells the settings, so that several lie side by side. To all
        else that decides it the workdir is bound."""
        return self.materials.workdir / "finetuned" / self.config.setting / member

    def subject(self, member: str, steps: int) -> Subject:
        """A member after so many steps of fine-tuning, as it is measured: see `FineTune.measured`.
        """
        study = self.materials.study
        return Subject(
            member, tuned_hash(study, member, self.config), steps, self.config.measured(steps),
            study.diffusion, study.seed, self.config.task, setting=self.config.setting,
        )

    def params(self, member: str, steps: int) -> Any:
        """A member's parameters after so many steps, averaged. Raises `UserError` where it has not
        been trained so far."""
        folder = self.folder(member) / "checkpoints"
        if steps not in checkpoint.steps_of(folder):
            raise UserError(
                f"member {member} is not fine-tuned for {self.config.task}: {folder} holds no step "
                f"{steps}; run  ldm-scaling train  with the same --config and --workdir"
            )
        return runs.average(
            self.spec(member), self.folder(member), self.config.run, self.materials.mesh, steps
        )

    @functools.cache  # noqa: B019  One object a run.
    def drawer(self, member: str) -> Drawer:
        """What draws pictures with a member's network."""
        config = self.config
        return self.materials.drawer_of(self.spec(member), config.train, config.sweep.batch_size)

    # Data.

    @functools.cache  # noqa: B019
    def source(self, split: str) -> Source | Mixture:
        """A split's pictures with their conditions; of the training split as a loader takes it."""
        data, config = self.materials.study.data, self.config
        side, crop = config.source_side or None, data.side if config.source_side else None
        flip = data.flip and split == "train"
        several = [
            ConditionedSource(
                dataset.images(split, ("image",), flip, side), self.condition, crop,
                self.materials.study.seed, number,
            )
            for number, dataset in enumerate(self.materials.datasets)
        ]
        if split == "train":
            return datasets.mixed(several, data.weights)
        return datasets.Joined(several)

    @functools.cached_property
    def _encoder_params(self) -> Any:
        return self.materials.networks.autoencoder().half(self.materials.mesh)

    @functools.cached_property
    def _encode(self) -> Any:
        encode = self.materials.networks.autoencoder().encode
        scale = self.materials.frozen.latent_scale

        @jax.jit
        def run(params, batch):
            x_BHWC = batch["image"].astype(jnp.float32) / 127.5 - 1.0
            given = {name: batch[name] for name in conditioned.FIELDS if name in batch}
            size = x_BHWC.shape[1:3]
            seen_BHWC = conditioned.latents_of(encode, params, scale, given, size)
            shown_BHWC = given["condition"].astype(jnp.float32) / 127.5 - 1.0
            return {
                "mean": encode(params, x_BHWC).mean, "seen": seen_BHWC.astype(jnp.float32),
                "given": conditioned.enlarged(shown_BHWC, size),
            }

        return run

    def examples(self, index_N: np.ndarray) -> Examples:
        """Validation pictures by their numbers, with conditions that are the same for all."""
        mesh, source = self.materials.mesh, self.source("validation")
        size, out = mesh_lib.rounded(_BATCH, mesh), []
        with files.progress(len(index_N), f"{self.config.task}, conditions", "picture") as bar:
            for start in range(0, len(index_N), size):
                some = index_N[start : start + size]
                batch = source.batch(some)
                batch = {n: batch[n] for n in ("image", *conditioned.FIELDS) if n in batch}
                full = {n: a[np.arange(size) % len(some)] for n, a in batch.items()}
                made = placing.fetch(
                    self._encode(self._encoder_params, placing.put_batch(mesh, full))
                )
                made = {name: values[: len(some)] for name, values in made.items()}
                out.append(
                    (made["mean"], made["seen"], batch["image"], pictures.to_uint8(made["given"]),
                     *([batch["condition_mask"]] if "condition_mask" in batch else []))
                )
                bar.update(len(some))
        return Examples(np.asarray(index_N, np.int32), *map(np.concatenate, zip(*out)))

    @functools.cache  # noqa: B019
    def block(self, number: int) -> Examples:
        """A seed block's pictures."""
        m = self.materials
        return self.examples(block_indices(
            number, self.config.sweep.num_images, m.count("validation"), m.study.data.seed
        ))

    def prompts(self, number: int) -> Prompts:
        """A seed block as a sweep takes it: under the empty caption."""
        found, null_LD = self.block(number), self.materials.frozen.null_ctx_LD
        count = len(found.index_N)
        return Prompts(
            index_N=found.index_N,
            context_NLD=np.broadcast_to(null_LD, (count, *null_LD.shape)),
            embeddings_NE=np.zeros((count, 0), np.float32),
            captions=("",) * count,
            condition_NHWC=found.seen_NHWC,
            real=lambda places: found.image_NHWC[places], finished=found.finished,
        )

    # Training.

    @functools.cached_property
    def _held_out(self) -> Examples:
        """The fixed part of the validation split that validation losses are computed on."""
        return self.examples(self.materials.some("validation", VALIDATION_EXAMPLES))

    def task(self, member: str) -> Task:
        """What a member's run trains."""
        m = self.materials
        examples = self._held_out
        shown = np.concatenate([examples.given_NHWC, examples.image_NHWC], axis=2)
        channels = self.spec(member).in_channels - m.spec(member).in_channels

        return conditioned.make(
            f"{member}, {self.config.task}", self.spec(member), self.config, m.study.diffusion,
            m.networks.autoencoder().encode, self._encoder_params, self.drawer(member),
            functools.partial(grown, m, member, channels),
            {"mean": examples.mean_NHWC, "seen": examples.seen_NHWC, "index": examples.index_N,
             "shown": shown[:SHOWN_EXAMPLES]},
        )

    def trained(self, member: str) -> bool:
        """Whether a member has all its checkpoints; all processes hear the same. Raises `UserError`
        where they are of another network."""
        folder, network = self.folder(member) / "checkpoints", runs.network(self.spec(member))

        def found() -> bool:
            have = checkpoint.steps_of(folder)
            for step in have[-1:]:
                checkpoint.check_network(folder, step, network)
            return set(self.config.steps) <= set(have)

        return processes.from_lead("fine-tuned", found)

    def passed(self, member: str) -> list[int]:
        """Steps to be measured that a member's run has left behind without a checkpoint; all
        processes hear the same."""
        folder = self.folder(member) / "checkpoints"

        def found() -> list[int]:
            have = checkpoint.steps_of(folder)
            return [s for s in self.config.steps if s not in have and s < max(have, default=0)]

        return processes.from_lead("passed", found)

    # Measuring.

    @functools.cached_property
    def scorer(self) -> PairedScorer | WithPublished:
        """Scores restored pictures; the lead makes the reference's statistics."""
        own, names = self._own_scorer(), self.config.sweep.metrics
        if not names:
            return own
        with processes.lead_first("published reference of restored pictures"):
            return WithPublished(own, published_scorer.load(
                names, self._published_folder, self._real))

    @property
    def has_reference(self) -> bool:
        """See `Materials.has_reference`."""
        return self._reference_path.exists() and published_scorer.kept(
            self.config.sweep.metrics, self._published_folder)

    @property
    def _published_folder(self) -> epath.Path:
        return self.materials.workdir / REFERENCE / f"{self.config.task}{self._cut}"

    @property
    def _reference_path(self) -> epath.Path:
        extractor = self._network.layer_hash(LAYER)
        return self._published_folder.parent / (
            f"{self.config.task}{self._cut}_{extractor[:8]}.npz")

    @functools.cached_property
    def _network(self) -> efficientnet.FeatureNetwork:
        config, m = self.config.sweep, self.materials
        same = config.feature_side == m.study.sweep.feature_side
        return m.feature_network if same else efficientnet.load(config.feature_side)

    @property
    def _cut(self) -> str:
        """What names of references say of pictures that are parts of larger ones."""
        return f"_of_{self.config.source_side}" if self.config.source_side else ""

    def _real(self) -> Iterator[np.ndarray]:
        """All validation pictures, cut as the drawn ones are."""
        # Without a cut they are the study's own, which need no conditions made.
        images = self.source("validation") if self.config.source_side else (
            self.materials.source("validation", "image"))
        return batches(images, "features of real pictures", size=_BATCH)

    def _own_scorer(self) -> PairedScorer:
        config, m, network = self.config.sweep, self.materials, self._network
        perceptual = lpips.load(PERCEPTUAL)
        extractor = network.layer_hash(LAYER)

        def trunk_and_logits(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = network.features(images)
            return found[LAYER], network.logits(found["head"])

        path = self._reference_path
        with processes.lead_first("reference of restored pictures"):
            if not path.exists():
                found = np.concatenate([trunk_and_logits(some)[0] for some in self._real()])
                moments.save(path, moments.Moments.of(found), extractor)
        return PairedScorer(
            trunk_and_logits, perceptual.distance,
            ReferenceStats(moments.load(path, extractor), extractor),
            network.layer_hash("head"), perceptual.hash(), config.replicates,
            pasted=self.condition.masked, collections=len(m.datasets),
        )

    def baselines(self) -> Baselines:
        """The conditions themselves, and the real pictures out of the autoencoder, scored on the
        first block that reports; kept in the workdir."""
        block, m = self.config.sweep.report_block, self.materials
        found, scorer = self.block(block), self.scorer
        decoded = self.drawer(m.study.members[0]).decode(
            found.mean_NHWC * m.frozen.latent_scale, lambda j: f"validation picture {j}"
        )
        decoded = found.finished(decoded, np.arange(len(decoded)))
        none_NE = np.zeros((len(found.index_N), 0), np.float32)
        scored = {
            name: scorer.score(scorer.features(images, found.image_NHWC), none_NE, block)
            for name, images in (
                (baselines.GIVEN, found.given_NHWC), (baselines.AUTOENCODER, decoded)
            )
        }
        return Baselines(
            self.config.task, scorer.hash, block, len(found.index_N),
            {name: metrics for name, (metrics, *_) in scored.items()},
            {name: intervals for name, (_, intervals, _) in scored.items()},
        )

    def keep_baselines(self) -> None:
        """Measures them where they are missing; the lead does."""
        sweep_ = self.config.sweep
        path = baselines.path_of(
            self.materials.workdir.path, self.config.task, self.scorer.hash, sweep_.report_block,
            sweep_.num_images,
        )
        with processes.lead_first("baselines"):
            if not path.exists() and hosts.is_lead():
                baselines.write(path, self.baselines())

    def subjects(self) -> list[Subject]:
        """All that is measured, the smallest member first, after ever more steps."""
        members = self.materials.study.members
        return [self.subject(m, steps) for m in members for steps in self.config.steps]

    def network(self, subject: Subject) -> backbone.Spec:
        """What draws what is measured."""
        return self.spec(subject.member)

    def bench(self, subject: Subject, reference_cost: cost.Cost) -> sweep.Bench:
        """What one of these is measured with."""
        m, spec = self.materials, self.network(subject)
        return sweep.Bench(
            spec=spec, drawer=self.drawer(subject.member),
            params=self.params(subject.member, subject.train_step), cost=m.cost(spec),
            reference_cost=reference_cost, scorer=self.scorer, prompts=self.prompts,
            directory=m.workdir / "records", strips=m.workdir / "strips",
        )

    # Looking.

    def sheet(self, members: Sequence[str]) -> np.ndarray:
        """A labelled grid, uint8 (H, W, 3): what is given, what each member makes of it after its
        last step, and the real picture (the paper's Fig. 5)."""
        sample, m = self.config.sample, self.materials
        count = min(sample.num_images, m.count("validation"))
        found = self.examples(m.some("validation", count))
        null_LD = m.frozen.null_ctx_LD
        columns = {"given": found.given_NHWC}
        for member in members:
            drawer = self.drawer(member)
            table_ = drawer.table(sample.sampler, sample.steps, sample.spacing)
            (drawn,) = drawer.pictures(
                self.params(member, self.config.steps[-1]),
                [Configuration(table_, sample.guidance, found.index_N, np.arange(count))],
                np.broadcast_to(null_LD, (count, *null_LD.shape)), sampling_key(m.study.seed),
                condition_PHWC=found.seen_NHWC,
            )
            columns[member] = found.finished(drawn, np.arange(count))
        columns["real"] = found.image_NHWC
        rows = [
            sheet.Row([images[i][None] for images in columns.values()],
                      heads=() if i else tuple(columns))
            for i in range(count)
        ]
        about = (
            f"{labels.sampler(sample.sampler)} · {labels.steps(sample.steps)} · "
            f"{labels.steps(self.config.steps[-1])} of fine-tuning"
        )
        return np.asarray(sheet.draw(sheet.Sheet(labels.task(self.config.task), about, rows)))
