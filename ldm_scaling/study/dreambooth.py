"""DreamBooth of a study's members: what each is taught of each subject, and what it draws then.

    WORKDIR/finetuned/dreambooth_HASH/MEMBER/
      class/KIND/00000.png             pictures of the class that the pretrained member drew
      subjects/SUBJECT/checkpoints/    its run, with events/ and curves.csv
      subjects/SUBJECT/lora.safetensors    of a run with adapters, in diffusers' layout
      before_HASH/SUBJECT/07_2.png     for prompt 7, by the pretrained member
      after_HASH/SUBJECT/07_2.png      by the taught one, for `evaluate --protocol=dreambench`
      scores_HASH.json                 of each subject, with intervals
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_scaling import files, pictures
from ldm_scaling.config import DreamBooth
from ldm_scaling.data import image_folder
from ldm_scaling.data import subjects as subjects_lib
from ldm_scaling.data.composed import subject as composed
from ldm_scaling.data.dreambench import caption
from ldm_scaling.data.loading import loader
from ldm_scaling.data.subjects import Lesson, Subject
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError, first_line
from ldm_scaling.models import (
    backbone,
    clip_text,
    identifier,
    lora,
    sd_folder,
    text_encoder,
    unet,
)
from ldm_scaling.models.text_network import TextNetwork
from ldm_scaling.parallel import hosts, placing, processes
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import encoders, runs, versions
from ldm_scaling.study.materials import Materials
from ldm_scaling.tasks import dreambooth as task_lib
from ldm_scaling.tasks.drawing import Drawer, denoiser, sampling_key
from ldm_scaling.training import checkpoint, loop, step
from ldm_scaling.training.task import Task

log = logging.getLogger(__name__)

_MARKER = "subject.json"
_ENCODED = 8  # pictures at a time
# Numbers of the class's samples, out of the way of those that are scored.
_CLASS_SAMPLES = 1_000_000


def load(path: epath.Path) -> np.ndarray:
    """A picture that a member drew, uint8 (H, W, 3). Raises `UserError` for a damaged one."""
    try:
        return pictures.load_png(path)
    except image_folder.BROKEN as e:
        raise UserError(
            f"the picture {path} is damaged ({image_folder.why_broken(e)}): delete it, and the "
            "same command draws it again"
        ) from e


@dataclasses.dataclass(frozen=True, eq=False)
class Taught:
    """A study's members under DreamBooth. As `Materials`, parts are made when first asked for, and
    all processes must ask together; `own` are a process's own.

    Attributes:
      materials: of the study.
    """

    materials: Materials

    @functools.cached_property
    def own(self) -> Taught:
        """The same on this process's devices; kept, for what draws compiles once."""
        own = self.materials.own
        return self if own is self.materials else Taught(own)

    @property
    def config(self) -> DreamBooth:
        """What the members are taught, and how."""
        return self.materials.study.dreambooth

    @functools.cached_property
    def subjects(self) -> list[Subject]:
        """What they are taught. Raises `UserError` for a folder or settings that do not fit."""
        c = self.config
        if not c.subjects:
            raise UserError(
                "config: dreambooth.subjects='': give the folder of the subjects' pictures, "
                "--config.dreambooth.subjects=DIR, see docs/dreambooth.md"
            )
        folder, kinds = c.subjects, c.classes
        if composed.is_spec(folder):
            place = self.materials.workdir / "data" / "subjects"
            with processes.lead_first("subject"):
                folder, kind = composed.write(folder, self.materials.study.data.side, place)
            kinds = kinds or (kind,)
        return subjects_lib.read(folder, kinds, c.prompts, c.only)

    def check(self) -> list[str]:
        """Finds contradictions before anything is computed; returns doubts, in words.

        Raises:
          UserError: naming what does not fit.
        """
        c, m = self.config, self.materials
        study, run = m.study, c.train
        for key, value in (study.further | {"average": study.average}).items():
            if value:
                raise UserError(
                    f"config: {key}={value!r} and dreambooth.subjects={c.subjects!r}: leave out "
                    "one of the two"
                )
        _ = self.subjects
        runs.check("dreambooth.train", run, m.mesh, ())
        sample, schedule = c.sample, schedule_lib.get(study.diffusion.schedule)
        solvers.make(
            sample.sampler, schedule, sample.steps, study.diffusion.prediction, sample.spacing
        )
        _ = self.text
        if study.weights:
            encoders.check_encodes(study.weights)
        for member in study.members:
            shapes = {"unet": backbone.param_shapes(m.spec(member))}
            if self.text is not None:
                shapes["text"] = self.text.params
            if c.lora_rank:
                shapes = jax.eval_shape(
                    lambda shapes=shapes: task_lib.begin(
                        shapes, c.lora_rank, jax.random.key(0), c.lora_targets
                    )
                )
            runs.check_factors("dreambooth.train", run, [shapes])
        doubts = [d for d in (self._word().doubt,) if d]
        for doubt in doubts:
            log.warning("%s", doubt)
        return doubts

    # Names.

    @functools.cached_property
    def root(self) -> epath.Path:
        """Folder of all members under these settings."""
        return self.materials.workdir / self.config.folder

    def run_folder(self, member: str, subject: Subject) -> epath.Path:
        """Of a member's run on a subject."""
        return self.root / member / "subjects" / subject.name

    @functools.cached_property
    def drawn_hash(self) -> str:
        """Of what is drawn for all subjects, and how."""
        return self._hash_of({s.prompts for s in self.subjects}, self.config.classes)

    def _hash_of(self, prompts: Collection[tuple[str, ...]], classes: Collection[str]) -> str:
        sample = {k: v for k, v in dataclasses.asdict(self.config.sample).items()
                  if k != "num_images"}
        decides = [sample, self.config.images_per_prompt, sorted(prompts)]
        if classes:  # Those that a folder says stay as they are.
            decides.append(sorted(classes))
        decides += versions.own_rows(
            self.materials.study.diffusion, self.config.sample.table)
        return files.sha256_of(decides)

    @functools.cached_property
    def _prompts(self) -> Collection[tuple[str, ...]]:
        return subjects_lib.prompts(self.config.subjects, self.config.prompts)

    def drawn_folder(self, member: str, subject: Subject, taught: bool) -> epath.Path:
        """Of what a member draws for a subject's prompts, before or after it is taught, whichever
        others are taught. Those whose class their folder says, DreamBench's, lie together."""
        when = "after" if taught else "before"
        own = self._hash_of(self._prompts, [subject.kind] if self.config.classes else ())
        return self.root / member / f"{when}_{own[:8]}"

    def captions(self, subject: Subject, word: bool) -> list[str]:
        """A subject's prompts, with the identifier or without."""
        given = self.config.identifier if word else ""
        return [caption(prompt, given, subject.kind) for prompt in subject.prompts]

    # Networks.

    @functools.cached_property
    def _text_encoder(self) -> Any:
        study = self.materials.study
        if study.weights:
            return sd_folder.read(study.weights).text_encoder()
        return self.materials.text_states._encoder

    def _word(self) -> identifier.Identifier:
        encoder, word = self._text_encoder, self.config.identifier
        if isinstance(encoder, text_encoder.TextEncoder):
            spec = text_encoder.BertSpec()
            return identifier.read(encoder.tokenize, word, spec.vocabulary, text_encoder.UNKNOWN)
        if isinstance(encoder, clip_text.ClipText):
            return identifier.read(encoder.tokenize, word, encoder.spec.vocabulary)
        return identifier.Identifier(word, (), "")  # A T5 spells what it does not know.

    @functools.cached_property
    def text(self) -> TextNetwork | None:
        """The text encoder where it is taught along, else None."""
        if not self.config.train_text_encoder:
            return None
        return encoders.text_states(self._text_encoder, "the text encoder").network

    @functools.cached_property
    def _encoder(self) -> encoders.LatentEncoder:
        m = self.materials
        if m.study.weights:
            return encoders.latent_encoder_from(m.study.weights, self.config.train.compute_dtype)
        return m.networks.autoencoder()

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self._encoder.encode)

    def pretrained(self, member: str) -> dict[str, Any]:
        """The networks that are taught, as they were, on the mesh."""
        networks = {"unet": self.materials.member_params(member)}
        if self.text is not None:
            networks["text"] = placing.replicate(self.materials.mesh, self.text.params)
        return networks

    @functools.cache  # noqa: B019
    def drawer(self, member: str) -> Drawer:
        """What draws with a member's network, whatever it was taught."""
        m, config = self.materials, self.config
        return m.drawer_of(m.spec(member), config.train, config.sample.num_images)

    # Drawing.

    def _reading(
        self, member: str, networks: dict[str, Any], texts: list[str]
    ) -> tuple[Drawer, np.ndarray]:
        """What draws with these networks, and their states of texts."""
        drawer = self.drawer(member)
        if self.text is None:
            return drawer, self.materials.states(texts)
        # Fetched: of several processes each reads by itself, whatever the shards.
        ctx_PLD = self.text.states(placing.fetch(networks["text"]), ["", *texts])
        return drawer.without(ctx_PLD[0]), ctx_PLD[1:]

    def _draw(
        self, member: str, networks: dict[str, Any], texts: list[str], names: list[epath.Path],
        numbers: list[int], what: str,
    ) -> None:
        """Draws one picture for each text and sample number into its file, those that are missing;
        in this process alone."""
        wanted = [i for i, path in enumerate(names) if not path.exists()]
        if not wanted:
            return
        sample, distinct = self.config.sample, sorted(set(texts))
        drawer, ctx_PLD = self._reading(member, networks, distinct)
        table = drawer.table(sample.sampler, sample.steps, sample.spacing)
        key, size = sampling_key(self.materials.study.seed), drawer.batch_size
        with files.progress(len(names), what, "picture", len(names) - len(wanted)) as bar:
            # Part by part, so that a killed run loses one of them.
            for start in range(0, len(wanted), size):
                some = wanted[start : start + size]
                places = [distinct.index(texts[i]) for i in some]
                one = Configuration(
                    table, sample.guidance, np.array([numbers[i] for i in some], np.int32),
                    np.array(places),
                )
                (images,) = drawer.pictures(networks["unet"], [one], ctx_PLD, key)
                for i, image_HWC in zip(some, images):
                    pictures.save_png(names[i], image_HWC)
                bar.update(len(some))

    def class_pictures(self, member: str, subject: Subject) -> list[epath.Path]:
        """Pictures of a subject's class that the pretrained member drew; the lead draws those that
        are missing. Subjects of one class share them."""
        text = caption(self.config.caption, "", subject.kind)
        folder = self.root / member / "class" / subject.kind.replace(" ", "_")
        count = self.config.class_images
        names = [folder / f"{i:05d}.png" for i in range(count)]
        with processes.lead_first("class pictures"):
            if not all(path.exists() for path in names):
                own = self.own
                own._draw(
                    member, own.pretrained(member), [text] * count, names,
                    [_CLASS_SAMPLES + i for i in range(count)], f"{member}, “{text}”",
                )
        return names

    def drawn(self, member: str, subject: Subject, taught: bool) -> list[epath.Path]:
        """Pictures of a subject's prompts, each prompt's one after the other; the lead draws those
        that are missing. The same noise for each member, before and after."""
        folder, each = self.drawn_folder(member, subject, taught), self.config.images_per_prompt
        places = list(itertools.product(range(len(subject.prompts)), range(each)))
        names = [folder / subject.name / f"{p:02d}_{k}.png" for p, k in places]
        texts = self.captions(subject, word=True)
        if taught:
            self._check_pictures(member, subject)
        if processes.from_lead("drawn", lambda: all(path.exists() for path in names)):
            return names
        networks = self.taught(member, subject) if taught else None
        if processes.several():  # From all devices to those of the lead.
            networks = placing.fetch(networks)
        with processes.lead_first("drawn pictures"):
            if not all(path.exists() for path in names):
                own = self.own
                if networks is None:
                    networks = own.pretrained(member)
                elif processes.several():
                    networks = placing.replicate(own.materials.mesh, networks)
                when = "taught" if taught else "before"
                own._draw(
                    member, networks, [texts[p] for p, _ in places], names,
                    [p * each + k for p, k in places], f"{member}, {subject.name}, {when}",
                )
        return names

    # Teaching.

    def _latents(self, images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        """Posteriors of pictures, `mean` and `logvar` (N, h, w, C)."""
        mesh = self.materials.own.mesh
        params = self._encoder.half(mesh)
        out = []
        size = mesh_lib.rounded(min(_ENCODED, len(images_NHWC)), mesh)
        for start in range(0, len(images_NHWC), size):
            some = images_NHWC[start : start + size]
            x = pictures.from_uint8(some[np.arange(size) % len(some)])
            found = placing.fetch(self._encode(params, placing.put_batch(mesh, x)))
            out.append((found.mean[: len(some)], found.logvar[: len(some)]))
        mean, logvar = map(np.concatenate, zip(*out))
        return {"mean": mean, "logvar": logvar}

    def _captioned(self, images_NHWC: np.ndarray, text: str) -> dict[str, np.ndarray]:
        """Arrays of pictures under one caption, as `tasks.dreambooth.loss_fn` takes them."""
        count, arrays = len(images_NHWC), self._latents(images_NHWC)
        if self.text is None:
            states = {"context": self.materials.states([text])}
        else:
            states = dict(zip(("ids", "mask"), self.text.tokenize([text])))
        return arrays | {name: np.repeat(a, count, axis=0) for name, a in states.items()}

    def lesson(self, member: str, subject: Subject) -> Lesson:
        """What a member is taught of a subject."""
        c, side = self.config, self.materials.study.data.side
        own = self._captioned(
            subject.pictures(side), caption(c.caption, c.identifier, subject.kind)
        )
        others = None
        if c.prior_weight:
            drawn = [load(path) for path in self.class_pictures(member, subject)]
            others = self._captioned(np.stack(drawn), caption(c.caption, "", subject.kind))
        return Lesson(own, others, c.train.batch_size, task_lib.CLASS, self._mark(subject))

    @staticmethod
    def _mark(subject: Subject) -> str:
        return files.sha256_of([subject.kind, subject.images.hashes])

    def task(self, member: str, subject: Subject) -> Task:
        """What a member's run on a subject trains."""
        c, m, run = self.config, self.materials, self.config.train
        spec = m.spec(member)
        denoise = denoiser(spec, m.mesh, run.compute_dtype, run.remat, run.attention)
        return task_lib.make(
            f"{member}, {subject.name}", spec, run, m.study.diffusion, m.frozen, denoise,
            self.pretrained(member), c.prior_weight, c.lora_rank, c.lora_targets, self.text,
            m.study.seed, functools.partial(self._show, member, subject),
        )

    def _show(
        self, member: str, subject: Subject, networks: dict[str, Any], number: int
    ) -> dict[str, np.ndarray]:
        """The first prompts, for a run's events."""
        sample = self.config.sample
        texts = self.captions(subject, word=True)[: sample.num_images]
        drawer, ctx_PLD = self._reading(member, networks, texts)
        table = drawer.table(sample.sampler, sample.steps, sample.spacing)
        index = np.arange(len(texts))
        one = Configuration(table, sample.guidance, index, index)
        key = sampling_key(self.materials.study.seed)
        (images,) = drawer.pictures(networks["unet"], [one], ctx_PLD, key)
        return {"samples": pictures.tile(images)}

    def _check_pictures(self, member: str, subject: Subject) -> None:
        """Raises `UserError` where a member was taught a subject by other pictures."""
        folder = self.run_folder(member, subject)
        marker, drawn = folder / _MARKER, self.root / member / "after_*" / subject.name
        try:
            other = marker.exists() and json.loads(marker.read_text())["hash"]
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(
                f"{marker}, which tells the pictures that {member} was taught {subject.name} by, "
                f"is damaged ({first_line(e)}): delete it where {subject.images.root} still holds "
                f"them, else remove {folder} and {drawn}"
            ) from e
        if other and other != self._mark(subject):
            raise UserError(
                f"{member} was taught {subject.name} by other pictures, or as another class, than "
                f"{subject.images.root} holds now: restore them, or remove {folder} and {drawn}"
            )

    def teach(self, member: str, subject: Subject) -> Task:
        """Trains a member on a subject, unless that is done; returns the task.

        Raises:
          UserError: where the subject's pictures are others than those it was taught by.
        """
        m, run, folder = self.materials, self.config.train, self.run_folder(member, subject)
        self._check_pictures(member, subject)
        task = self.task(member, subject)
        spec = m.spec(member)
        if not runs.done(folder, run, spec):
            lesson = self.lesson(member, subject)
            if hosts.is_lead():
                about = {"hash": self._mark(subject), "kind": subject.kind,
                         "pictures": list(subject.images.names)}
                files.write_json(folder / _MARKER, about)
            make_loader = functools.partial(
                loader.train_loader, lesson, run.batch_size, seed=m.study.seed,
                process_index=jax.process_index(), process_count=jax.process_count(),
            )
            loop.fit(task, run, make_loader, folder, m.mesh, m.study.seed,
                     about=runs.about(m.study, spec))
        return task

    def taught(self, member: str, subject: Subject) -> dict[str, Any]:
        """The networks of a member that was taught a subject; teaches it first if need be."""
        task, run = self.teach(member, subject), self.config.train
        folder = self.run_folder(member, subject)
        abstract = step.abstract_state(task.init, run, self.materials.mesh)
        average = checkpoint.average(
            folder / "checkpoints", run.steps, abstract, runs.network(self.materials.spec(member))
        )
        if self.config.lora_rank:
            adapters = placing.fetch(average)  # By all: a process may lack a shard.
            if hosts.is_lead():
                spec = self.materials.spec(member)
                levels = len(spec.channel_mults) if isinstance(spec, unet.UNetSpec) else None
                lora.save(folder / "lora.safetensors", adapters, levels)
        return task_lib.whole(average, task.frozen)
