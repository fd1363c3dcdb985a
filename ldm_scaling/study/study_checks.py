"""What must hold of a config, with its inputs and its workdir, before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ldm_scaling.config import Study
from ldm_scaling.data.composed import openmoji
from ldm_scaling.data.conditions import pixels
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, backbone, lpips
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.study import early, fitting, labels, published_scorer, resolve, runs, sweep_checks
from ldm_scaling.study import further as further_lib
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.cascaded import Cascaded
from ldm_scaling.study.finetuned import PERCEPTUAL
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import held_out, text_to_image
from ldm_scaling.training import averages, step

log = logging.getLogger(__name__)


def check(
    study: Study, workdir: Workdir, measured: bool = True, trains: bool = True,
    pictures: bool = False, text: bool = False,
) -> Materials:
    """Finds a config's contradictions before anything is computed or written. The study of what is
    returned is the config with what its inputs decide, see `resolve.resolved`.

    Args:
      study: the config.
      workdir: where it will work.
      measured: whether the study's own data and the networks that score it are used.
      trains: whether its runs may begin or go on: what they have to split must do so here.
      pictures: whether its pictures and their captions are used, where nothing is measured.
      text: whether captions are encoded, where nothing is measured.
    Raises:
      UserError: naming what does not fit, or a package that is missing.
    """
    workdir.check_new(study)
    study = resolve.resolved(study, workdir)
    materials = Materials(study, workdir)
    for member in (*study.members, study.reference):
        materials.spec(member)
    for member in study.members:  # A reference that is none is neither trained nor drawn.
        fitting.heads(materials.spec(member), f"member {member}", study.mesh)
    for member in study.members if study.trains_members else ():
        _member(materials, member)
        if trains and measured:
            early.check_ahead(materials, member)
    if study.trains_members and not study.autoencoder.weights:
        _autoencoder(materials, trains)
    for further in further_lib.of(materials):
        further.check()
    if trains:
        _runs(materials)
    for member in study.members if study.trains_members else ():
        fitting.noise(member, f"members={member!r}", study.diffusion)
    fitting.samplers(study)
    drawn = _drawn(materials)
    _grids(materials, measured)
    _solvers(study, drawn)
    if measured:
        _early(study)
        _scorers(materials)
    if measured or pictures:
        _pictures(materials)
    if measured or pictures or (text and not (study.weights or study.data.text_weights)):
        _ = materials.own.text_encoder
    return materials


def _member(materials: Materials, member: str) -> None:
    """Its run's own settings, and the average that it is measured with."""
    study, spec = materials.study, materials.spec(member)
    text_to_image.transfer(spec, study.train)  # Raises where there is none.
    runs.check_factors("train", study.train, map(backbone.param_shapes, [spec]))
    if not backbone.gathers(spec):  # Raises for a parameter without a sharding rule.
        step.abstract_state(backbone.initializer(spec), study.train, materials.mesh)
    folder, length = materials.workdir.member(member), study.average_of(member)
    if length is not None and averages.kept(folder, study.train.steps):
        averages.recipe(folder, study.train.steps, length)  # Raises where it cannot be.


def _autoencoder(materials: Materials, trains: bool) -> None:
    """The first stage's run."""
    config = materials.study.autoencoder
    name, spec = "autoencoder.train", autoencoder_task.spec_of(config)
    if trains:
        runs.check(name, config.train, materials.mesh, autoencoder_task.RANKS)
    runs.check_factors(name, config.train, map(autoencoder.param_shapes, [spec]))


def _runs(materials: Materials) -> None:
    """What runs of networks that denoise have to split."""
    found = {"train": materials.study.train} if materials.study.trains_members else {}
    for further in further_lib.of(materials):
        found |= further.runs
    for name, run in found.items():
        runs.check(name, run, materials.mesh, held_out.RANKS)


def _drawn(materials: Materials) -> dict[str, list[tuple[str, int, str]]]:
    """Key of the config -> (sampler, steps, spacing) of all that is drawn as it says."""
    study = materials.study
    own = [] if study.finetune.pretrained else subject_lib.tables(study.sweep)
    further = {one.name: one.tables for one in further_lib.of(materials)}
    return {"sample.spacing": [study.sample.table], "sweep.spacing": own, **further}


def _grids(materials: Materials, measured: bool) -> None:
    """What each sweep names."""
    study = materials.study
    grids = {} if study.finetune.pretrained else {"sweep": study.sweep}
    for further in further_lib.of(materials):
        sweep, own = further.config.sweep, further.name == "finetune"
        grids[f"{further.name}.sweep"] = sweep if own else sweep.judged_as(study.sweep)
    for key, grid in grids.items():
        # Of each process.
        mesh_lib.check_batch(materials.own.mesh, grid.batch_size, f"config: {key}.batch_size")
        names = [solvers.canonical(name) for name in grid.samplers]
        if len(set(names)) < len(names):
            raise UserError(f"config: {key}.samplers={grid.samplers} names one of them twice")
        sweep_checks.check(key, grid, restored=key == "finetune.sweep")
        if measured and grid.metrics:
            published_scorer.require(grid.metrics)


def _solvers(study: Study, drawn: Mapping[str, Sequence[tuple[str, int, str]]]) -> None:
    """That samplers can be made, see `_drawn`; those that begin too late are told."""
    schedule = schedule_lib.get(study.diffusion.schedule)
    for key, tables in drawn.items():
        for name, steps, spacing in tables:
            try:
                table = solvers.make(name, schedule, steps, study.diffusion.prediction, spacing)
            except UserError as e:
                where = f"sampler {name}, {labels.steps(steps)}, {spacing or 'its own'} spacing"
                raise UserError(f"config: {key}: {where}: {e}") from e
            solvers.warn(table)


def _early(study: Study) -> None:
    """What is measured along training."""
    early.subjects(study)  # Raises where the end is not measured alike.
    if study.early.sampler and not early.steps(study):
        log.warning(
            "early.sampler=%r measures nothing: train.keep_steps=%s names no step below "
            "train.steps, or nothing is trained here", study.early.sampler, study.train.keep_steps,
        )


def _scorers(materials: Materials) -> None:
    """The networks that score: each raises where its package is missing."""
    study = materials.study
    if study.finetune.pretrained and (materials.pretrained.workdir / "records").exists():
        if names := materials.pretrained.study.sweep.metrics:  # Its records are shown.
            published_scorer.require(names)
    _ = materials.own.feature_network
    if study.finetune.task:
        lpips.load(PERCEPTUAL)


def _pictures(materials: Materials) -> None:
    """The study's pictures, and what makes conditions of them."""
    data = materials.study.data
    if data.composed:
        openmoji.load()
    elif data.hash:  # Shards: their counts are known.
        _ = materials.datasets
    else:
        materials.check_names()
    if materials.study.finetune.task:
        pixels.opencv()


def captions(study: Study) -> None:
    """Raises `UserError` where members would be trained from the captions of photographs, which
    have none."""
    photos = [source for source in study.data.sources if source.startswith("photos:")]
    if photos and study.trains_members and study.data.prepare.captions:
        raise UserError(
            f"config: data.source={study.data.source!r}: photographs have no captions, and members "
            "are trained from text here: give those of another study by "
            "--config.finetune.pretrained=WORKDIR, or say --config.data.prepare.captions=False"
        )


def width(materials: Materials) -> None:
    """Raises `UserError` for a network that the text states are too wide for; `check` leaves this
    to who needs the text encoder anyway."""
    width = materials.text_states.width
    for member in materials.study.members:
        fitting.width(materials.spec(member), f"member {member}", width)
    for further in further_lib.of(materials):
        if isinstance(further, Cascaded):
            for base in further.config.base:
                fitting.width(further.base_spec(base), f"cascade.base: {base}", width)
