"""The stages of a study, in order; each does only what is missing."""

from __future__ import annotations

import functools
import logging

import jax
import numpy as np

from ldm_scaling import files, pictures
from ldm_scaling.config import Study
from ldm_scaling.data import loader
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, zoo
from ldm_scaling.sampling import solvers
from ldm_scaling.study import publish, sweep
from ldm_scaling.study.materials import SPLITS, Materials
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.training import checkpoint, loop

log = logging.getLogger(__name__)


def check(study: Study, workdir: Workdir) -> Materials:
    """Binds the workdir and finds a config's contradictions before anything is computed."""
    materials = Materials(study, workdir)
    for member in (*study.members, study.reference):
        materials.spec(member)
    autoencoder_task.spec_of(study.autoencoder)
    schedule = schedule_lib.get(study.diffusion.schedule)
    tables = [(n, s, study.sweep.spacing) for n in study.sweep.samplers for s in study.sweep.steps]
    tables += [(n, 1, study.sweep.spacing) for n in study.sweep.max_steps]
    tables += [(study.sample.sampler, study.sample.steps, study.sample.spacing)]
    for name, steps, spacing in tables:
        if steps <= study.sweep.max_steps.get(name, steps):
            solvers.make(name, schedule, steps, study.diffusion.prediction, spacing)
    materials.mesh  # noqa: B018  Its sizes must fit the devices.
    workdir.bind(study)
    return materials


def prepare(materials: Materials) -> None:
    """Pictures and text states."""
    for split in SPLITS:
        materials.text(split)


def _loader(source, train, seed: int):
    return functools.partial(
        loader.train_loader, source, train.batch_size, seed=seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )


def train(materials: Materials) -> None:
    """The autoencoder, its latents, then every member."""
    study, workdir = materials.study, materials.workdir
    prepare(materials)
    run = study.autoencoder.train
    if checkpoint.latest(workdir / "autoencoder" / "checkpoints") != run.steps:
        task = autoencoder_task.make(study.autoencoder, materials.shown())
        loop.fit(
            task, run, _loader(materials.source("train", "image"), run, study.seed),
            workdir / "autoencoder", materials.mesh, study.seed,
        )
    for split in SPLITS:
        materials.latents(split)
    run = study.train
    for member in study.members:
        if checkpoint.latest(workdir.member(member) / "checkpoints") == run.steps:
            continue
        spec = materials.spec(member)
        drawer = materials.drawer(member)
        task = text_to_image.make(
            member, spec, run, study.diffusion, study.sample, materials.frozen, drawer,
            materials.validation,
        )
        source = loader.zip_sources(materials.latents("train"), materials.text("train"))
        loop.fit(
            task, run, _loader(source, run, study.seed), workdir.member(member), materials.mesh,
            study.seed,
        )


def sample(materials: Materials, prompts: list[str] | None = None) -> list[str]:
    """A grid of every trained member, same captions and noise; returns the files written.

    Args:
      materials: of the study.
      prompts: captions; default the first validation captions.
    """
    study, config = materials.study, materials.study.sample
    materials.require_trained()
    if prompts:
        prompts = (prompts * -(-config.num_images // len(prompts)))[: config.num_images]
        context_NLD = materials.text_encoder.states(prompts)[0]
        index_N, stem = np.arange(len(prompts)), f"prompt_{files.sha256_of(prompts)}"
    else:
        block = materials.prompts(study.sweep.report_block)
        n = min(config.num_images, len(block.index_N))
        context_NLD, index_N, stem = block.context_NLD[:n], block.index_N[:n], "validation"
    written = []
    for member in study.members:
        params = materials.member_params(member)
        drawer = materials.drawer(member)
        table = drawer.table(config.sampler, config.steps, config.spacing)
        images = drawer.pictures(
            params, table, context_NLD, config.guidance, jax.random.key(study.seed), index_N
        )
        path = materials.workdir / "samples" / f"{stem}_{member}.png"
        pictures.save_png(path, pictures.tile(images))
        written.append(str(path))
    return written


def run_sweep(materials: Materials) -> None:
    """Every record that is missing."""
    study, workdir = materials.study, materials.workdir
    materials.require_trained()
    scorer = materials.scorer
    reference_cost = cost.of(zoo.get(study.reference).spec)
    total = sum(sweep.planned(study, m) for m in study.members) * study.sweep.num_images
    with files.progress(total, "sweep", "picture") as bar:
        for member in study.members:
            done = sweep.existing(study, member, scorer.hash, workdir / "records")
            if len(done) == sweep.planned(study, member):
                bar.update(len(done) * study.sweep.num_images)
                continue
            sweep.run_member(
                study, member, cost.of(zoo.get(member).spec), reference_cost,
                materials.member_params(member),
                materials.drawer(member), scorer, materials.prompts,
                workdir / "records", workdir / "strips", bar,
            )


def run_report(materials: Materials) -> str:
    """Plots and the page, from this config's records alone; returns the page's path."""
    found = []
    for member in materials.study.members:
        found += sweep.existing(
            materials.study, member, materials.scorer.hash, materials.workdir / "records"
        )
    if not found:
        raise UserError(
            f"there are no records in {materials.workdir / 'records'}: run  ldm-scaling sweep  "
            "with the same --config and --workdir first"
        )
    return publish.write(materials, found)


def study_all(materials: Materials) -> str:
    """All stages, in order."""
    prepare(materials)
    train(materials)
    sample(materials)
    run_sweep(materials)
    return run_report(materials)
