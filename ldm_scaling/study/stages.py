"""The stages of a study, in order; each does only what is missing."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from ldm_scaling.config import Study, Train
from ldm_scaling.data.composed import openmoji
from ldm_scaling.data.loading import loader
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, efficientnet, text_encoder
from ldm_scaling.parallel import hosts, processes
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.study import gallery, publish, resolve, sweep
from ldm_scaling.study import request as request_lib
from ldm_scaling.study.materials import SPLITS, Materials
from ldm_scaling.study.progress import Progress
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.drawing import Drawer
from ldm_scaling.training import checkpoint, loop

log = logging.getLogger(__name__)


def check(study: Study, workdir: Workdir, measured: bool = True) -> Materials:
    """Finds a config's contradictions before anything is computed or written. The study of what is
    returned is the config with what its inputs decide, see `resolve.resolved`.

    Args:
      study: the config.
      workdir: where it will work.
      measured: whether the study's own data and the networks that score it are used.
    Raises:
      UserError: naming what does not fit, or a package that is missing.
    """
    study = resolve.resolved(study, workdir)
    materials = Materials(study, workdir)
    for member in (*study.members, study.reference):
        materials.spec(member)
    runs = {} if study.weights else {"train": study.train}
    if not (study.weights or study.autoencoder.weights):
        runs["autoencoder.train"] = study.autoencoder.train
    for name, run in runs.items():
        mesh_lib.check_batch(materials.mesh, run.batch_size, f"config: {name}.batch_size")
    # Of each process.
    mesh_lib.check_batch(materials.own.mesh, study.sweep.batch_size, "config: sweep.batch_size")
    for name, run in runs.items():
        if run.batch_size % jax.process_count():
            raise UserError(
                f"config: {name}.batch_size={run.batch_size} cannot be shared equally by "
                f"{jax.process_count()} processes: use a multiple of them"
            )
    schedule = schedule_lib.get(study.diffusion.schedule)
    names = [solvers.canonical(name) for name in study.sweep.samplers]
    if len(set(names)) < len(names):
        raise UserError(f"config: sweep.samplers={study.sweep.samplers} names one of them twice")
    tables = [(n, s, study.sweep.spacing) for n in study.sweep.samplers for s in study.sweep.steps
              if s <= sweep.most_steps(study, n)]
    tables += [(study.sample.sampler, study.sample.steps, study.sample.spacing)]
    for name, steps, spacing in tables:
        solvers.make(name, schedule, steps, study.diffusion.prediction, spacing)
    if measured:
        if study.data.composed:
            openmoji.load()
        elif study.data.hash:  # Shards: their counts are known.
            _ = materials.datasets
        text_encoder.load(study.data.text_length)
        efficientnet.load(study.sweep.feature_side)
    return materials


def prepare(materials: Materials) -> None:
    """Pictures and text states. Of several processes the lead makes the pictures, and each its
    share of the states."""
    materials.caches.make_states(SPLITS)


def _prepare_together(materials: Materials) -> None:
    """Text states that are missing, while all processes are here: later one may ask alone."""
    if processes.several():
        prepare(materials)


def cache_latents(materials: Materials) -> list[str]:
    """Latents and text states of all splits, by the frozen encoders; returns the folders.

    Raises:
      UserError: where the autoencoder is neither trained nor given.
    """
    materials.own.networks.autoencoder()
    return materials.caches.make(SPLITS)


def _loader(materials: Materials, source, train):
    data = materials.study.data
    return functools.partial(
        loader.train_loader, source, train.batch_size, seed=materials.study.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
        workers=data.workers, max_corrupt=data.max_corrupt,
    )


def train(materials: Materials) -> list[str]:
    """The autoencoder, its latents, then every member. Returns what there is to tell."""
    study = materials.study
    if study.weights:
        return [f"nothing to train: {study.members[0]} is the published model in {study.weights}"]
    prepare(materials)
    train_autoencoder(materials)
    cache_latents(materials)
    for member in study.members:
        train_member(materials, member)
    return []


def train_autoencoder(materials: Materials) -> None:
    """The first stage, unless it is trained or given."""
    study, folder = materials.study, materials.workdir / "autoencoder"
    run = study.autoencoder.train
    if study.autoencoder.weights or _trained(folder, run):
        return
    task = autoencoder_task.make(study.autoencoder, materials.shown())
    source = materials.training_images()
    loop.fit(task, run, _loader(materials, source, run), folder, materials.mesh, study.seed,
             about=dataclasses.asdict(study))


def _trained(folder: epath.Path, run: Train) -> bool:
    """Whether a run is done; all processes hear the same, whenever they ask."""
    return processes.from_lead(
        "trained", lambda: checkpoint.latest(folder / "checkpoints") == run.steps
    )


def train_member(materials: Materials, member: str) -> None:
    """A member, from the caches, unless it is trained."""
    study, folder, run = materials.study, materials.workdir.member(member), materials.study.train
    if _trained(folder, run):
        return
    task = text_to_image.make(
        member, materials.spec(member), run, study.diffusion, study.sample, materials.frozen,
        materials.drawer(member), materials.validation,
    )
    source = materials.caches.training()
    loop.fit(task, run, _loader(materials, source, run), folder, materials.mesh, study.seed,
             about=dataclasses.asdict(study))


def sample(
    materials: Materials, prompts: Sequence[str] = (),
    drawer: Callable[[str], Drawer] | None = None, **values: Any,
) -> list[str]:
    """A labelled grid of what members draw; returns the files.

    A file that is there already, of the same settings, is not drawn again.

    Args:
      materials: of the study.
      prompts: captions; without any `sample.num_images` validation captions, each with the noise
        of its own number unless seeds are given.
      drawer: see `gallery.draw`.
      **values: sampler, steps, guidance, seeds, spacing, member, see `request.of`.
    Raises:
      UserError: as `gallery.sample`.
    """
    study = materials.study
    wanted = request_lib.of(study, prompts or ("",), **values)
    gallery.require_trained(materials, wanted.member)
    stem, context_PLD = wanted.name, None
    if not prompts:
        block = materials.prompts(study.sweep.report_block)
        n = min(study.sample.num_images, len(block.index_N))
        own = [(seed,) for seed in block.index_N[:n].tolist()]
        seeds = own if values.get("seeds") is None else wanted.seeds * n
        wanted = dataclasses.replace(wanted, prompt=block.captions[:n], seeds=tuple(seeds))
        stem, context_PLD = f"validation_{wanted.name}", block.context_NLD[:n]
    path = materials.workdir / "samples" / f"{stem}.png"
    if not processes.from_lead("drawn", path.exists):
        if context_PLD is None:
            context_PLD = gallery.text_states(materials, wanted.prompt)
        drawn = gallery.draw(materials, wanted, context_PLD, drawer)
        if hosts.is_lead():
            drawn.save(path)
    return [str(path)]


def run_sweep(materials: Materials) -> None:
    """Every record that is missing. Several processes share out each member's configurations, and
    measure them each on its own devices."""
    _prepare_together(materials)
    study, workdir, own = materials.study, materials.workdir, materials.own
    own.require_trained()
    scorer = own.scorer
    for block in (study.sweep.select_block, *study.sweep.report_blocks):
        own.prompts(block)  # While all processes are here.
    reference_cost = cost.of(own.spec(study.reference))
    costs = {m: cost.of(own.spec(m)) for m in study.members}
    directory = workdir / "records"

    def outstanding() -> list[Any]:
        done = {m: sweep.existing(study, m, scorer.hash, directory) for m in study.members}
        planned = {m: sweep.planned(study, m) for m in study.members}
        total = sum(sweep.work(study, costs[m], i) for m in planned for i in planned[m])
        before = sum(sweep.work(study, costs[m], r.identity) for m in done for r in done[m])
        return [[m for m in done if len(done[m]) < len(planned[m])], max(total, before), before]

    members, total, before = processes.from_lead("outstanding", outstanding)
    share = before + (total - before) / jax.process_count()
    with Progress(share, before) as progress:
        for m in members:
            progress.show(m)
            bench = sweep.Bench(
                spec=own.spec(m), drawer=own.drawer(m), params=own.member_params(m),
                cost=costs[m], reference_cost=reference_cost, scorer=scorer, prompts=own.prompts,
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
    """Plots and the page, from this config's records alone; returns the page's path. The lead
    writes them."""
    require_records(materials)
    _prepare_together(materials)
    own = materials.own

    def write() -> str:
        found = []
        for member in own.study.members:
            found += sweep.existing(
                own.study, member, own.scorer.hash, own.workdir / "records"
            )
        if not found:
            raise UserError(
                f"no record in {own.workdir / 'records'} is of this config's sweep: run  "
                "ldm-scaling sweep  with the same --config and --workdir first"
            )
        return publish.write(own, found)

    return processes.from_lead("report", write)


def study_all(materials: Materials) -> str:
    """All stages, in order."""
    prepare(materials)
    train(materials)
    sample(materials, drawer=materials.drawer)
    run_sweep(materials)
    return run_report(materials)
