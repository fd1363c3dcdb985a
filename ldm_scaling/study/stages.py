"""The stages of a study, in order; each does only what is missing."""

from __future__ import annotations

import functools
import logging
import re

import jax
import numpy as np

from ldm_scaling import files, pictures
from ldm_scaling.config import Study
from ldm_scaling.data import loader, openmoji
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, efficientnet, text_encoder, zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.solvers import SOLVERS
from ldm_scaling.study import publish, sweep
from ldm_scaling.study.materials import SPLITS, Materials
from ldm_scaling.study.progress import Progress
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.drawing import sampling_key
from ldm_scaling.training import checkpoint, loop

log = logging.getLogger(__name__)


def check(study: Study, workdir: Workdir) -> Materials:
    """Finds a config's contradictions before anything is computed or written.

    Raises:
      UserError: naming what does not fit, or a package that is missing.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this runs on one host, with all its devices; here are {jax.process_count()} processes"
        )
    materials = Materials(study, workdir)
    for member in (*study.members, study.reference):
        materials.spec(member)
    autoencoder_task.spec_of(study.autoencoder)
    for name, size in (
        ("autoencoder.train.batch_size", study.autoencoder.train.batch_size),
        ("train.batch_size", study.train.batch_size),
        ("sweep.batch_size", study.sweep.batch_size),
    ):
        mesh_lib.check_batch(materials.mesh, size, f"config: {name}")
    schedule = schedule_lib.get(study.diffusion.schedule)
    tables = [(n, s, study.sweep.spacing) for n in study.sweep.samplers for s in study.sweep.steps]
    tables += [(n, 1, study.sweep.spacing) for n in study.sweep.max_steps if n not in SOLVERS]
    tables += [(study.sample.sampler, study.sample.steps, study.sample.spacing)]
    for name, steps, spacing in tables:
        if steps <= study.sweep.max_steps.get(name, steps):
            solvers.make(name, schedule, steps, study.diffusion.prediction, spacing)
    openmoji.load()
    text_encoder.load(study.data.text_length)
    efficientnet.load(study.sweep.feature_side)
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
    """A grid of every member, same captions and noise; returns the files.

    A file that is there already, of the same captions and settings, is not drawn again.

    Args:
      materials: of the study.
      prompts: captions, repeated up to `sample.num_images`; default validation captions.
    Raises:
      UserError: when a member is not trained.
    """
    study, config = materials.study, materials.study.sample
    materials.require_trained()
    if prompts:
        count = max(config.num_images, len(prompts))
        prompts = (prompts * -(-count // len(prompts)))[:count]
        context_NLD = materials.text_encoder.states(prompts)[0]
        index_N = np.arange(count)
        words = re.sub(r"\W+", "-", prompts[0]).strip("-").lower()[:40] or "empty"
        stem = f"{words}_{files.sha256_of(prompts)[:6]}"
    else:
        block = materials.prompts(study.sweep.report_block)
        n = min(config.num_images, len(block.index_N))
        context_NLD, index_N, stem = block.context_NLD[:n], block.index_N[:n], "validation"
    how = f"{config.sampler}_{config.steps}steps_{config.spacing}_w{config.guidance:g}"
    written = []
    for member in study.members:
        path = materials.workdir / "samples" / f"{stem}_{how}_{member}.png"
        if not path.exists():
            params, drawer = materials.member_params(member), materials.drawer(member)
            table = drawer.table(config.sampler, config.steps, config.spacing)
            drawn = Configuration(table, config.guidance, index_N, np.arange(len(index_N)))
            key = sampling_key(study.seed)
            (images,) = drawer.pictures(params, [drawn], context_NLD, key)
            pictures.save_png(path, pictures.tile(images))
        written.append(str(path))
    return written


def run_sweep(materials: Materials) -> None:
    """Every record that is missing."""
    study, workdir = materials.study, materials.workdir
    materials.require_trained()
    scorer = materials.scorer
    reference_cost = cost.of(zoo.get(study.reference).spec)
    directory = workdir / "records"
    done = {m: sweep.existing(study, m, scorer.hash, directory) for m in study.members}
    costs = {m: cost.of(zoo.get(m).spec) for m in study.members}
    total = before = 0.0
    for m in study.members:
        total += sum(sweep.work(study, costs[m], i) for i in sweep.planned(study, m))
        before += sum(sweep.work(study, costs[m], r.identity) for r in done[m])
    with Progress(max(total, before), before) as progress:
        for m in study.members:
            if len(done[m]) == len(sweep.planned(study, m)):
                continue
            progress.show(m)
            bench = sweep.Bench(
                drawer=materials.drawer(m), params=materials.member_params(m), cost=costs[m],
                reference_cost=reference_cost, scorer=scorer, prompts=materials.prompts,
                directory=directory, strips=workdir / "strips",
            )
            sweep.run_member(study, m, bench, progress)


def require_records(materials: Materials) -> None:
    """Raises `UserError` when there is nothing to report."""
    directory = materials.workdir / "records"
    if not directory.exists() or not any(directory.glob("*.json")):
        raise UserError(
            f"there are no records in {directory}: run  ldm-scaling sweep  with the same --config "
            "and --workdir first"
        )


def run_report(materials: Materials) -> str:
    """Plots and the page, from this config's records alone; returns the page's path."""
    require_records(materials)
    found = []
    for member in materials.study.members:
        found += sweep.existing(
            materials.study, member, materials.scorer.hash, materials.workdir / "records"
        )
    if not found:
        raise UserError(
            f"no record in {materials.workdir / 'records'} is of this config's sweep: run  "
            "ldm-scaling sweep  with the same --config and --workdir first"
        )
    return publish.write(materials, found)


def study_all(materials: Materials) -> str:
    """All stages, in order."""
    prepare(materials)
    train(materials)
    sample(materials)
    run_sweep(materials)
    return run_report(materials)
