"""The stages of a study, in order; each does only what is missing."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ldm_scaling import files, pictures
from ldm_scaling.errors import MissingPackageError, UserError
from ldm_scaling.models import backbone, zoo
from ldm_scaling.models.cost import Cost
from ldm_scaling.parallel import processes
from ldm_scaling.study import (
    curves,
    dreambooth_scores,
    early,
    fitting,
    gallery,
    grids,
    publish,
    runs,
    starting,
    study_checks,
    sweep,
    weights,
)
from ldm_scaling.study import further as further_lib
from ldm_scaling.study import request as request_lib
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.dreambooth import Taught
from ldm_scaling.study.finetuned import FineTuned
from ldm_scaling.study.further import Further
from ldm_scaling.study.materials import REFERENCE, SPLITS, Materials
from ldm_scaling.study.progress import Progress
from ldm_scaling.study.records import TEXT_TO_IMAGE, Record, read_all
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.drawing import Drawer
from ldm_scaling.training import loop

log = logging.getLogger(__name__)


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


def train(materials: Materials) -> list[str]:
    """The autoencoder, its latents, then every member; then what is made of members further.
    Returns what there is to tell."""
    study, several = materials.study, further_lib.of(materials)
    if study.weights and not several:
        return [f"nothing to train: {study.members[0]} is the published model in {study.weights}"]
    study_checks.captions(study)
    if study.trains_members:
        study_checks.width(materials)
        prepare(materials)
        train_autoencoder(materials)
        cache_latents(materials)
        for member in study.trained:
            train_member(materials, member)
    for further in several:
        further_lib.train(further)
    return []


def train_autoencoder(materials: Materials) -> None:
    """The first stage, unless it is trained or given; that of members that another study has
    trained is taken with them."""
    study, folder = materials.study, materials.workdir / "autoencoder"
    run = study.autoencoder.train
    if study.autoencoder.weights or runs.done(folder, run):
        return
    if study.start.workdir:
        starting.take_autoencoder(materials)
        return
    task = autoencoder_task.make(study.autoencoder, materials.shown())
    source = materials.training_images()
    loop.fit(task, run, runs.loader_of(study, source, run), folder, materials.mesh, study.seed,
             about=dataclasses.asdict(study))


def train_member(materials: Materials, member: str) -> None:
    """A member, from the caches, unless it is trained; any of its runs, see `config.Study.trained`.
    """
    study, folder, run = materials.study, materials.workdir.member(member), materials.study.train
    study = dataclasses.replace(study, seed=study.seed_of(member))
    spec = materials.spec(member)
    if runs.done(folder, run, spec):
        return
    if member in study.members:
        early.require_ahead(materials, member)
    else:  # Checkpoints along training are measured of first runs alone.
        run = dataclasses.replace(run, keep_steps=())
    runs.tell_passes(member, study, run, [d.count("train") for d in materials.datasets])
    task = text_to_image.make(
        member, spec, run, study.diffusion, study.sample, materials.frozen,
        materials.drawer(study.run_of(member)[0]), materials.validation,
    )
    start, after = starting.beginning(materials, member, spec)
    source = materials.caches.training()
    loop.fit(dataclasses.replace(task, start=start), run, runs.loader_of(study, source, run),
             folder, materials.mesh, study.seed, about=runs.about(study, spec), after=after)


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
    if several := further_lib.of(materials):
        return grids.of_all(several, prompts, values)
    wanted = request_lib.of(materials.study, prompts or ("",), **values)
    fitting.undistilled(materials.study, wanted.member[0], wanted.sampler)
    gallery.require_trained(materials, wanted.member)
    lengths = [materials.study.average_of(member) for member in wanted.member]
    whose = f"averages-{files.sha256_of(lengths)[:8]}_" if any(lengths) else ""
    return [grids.grid(materials, wanted, prompts, values, whose, functools.partial(
        gallery.draw, materials, drawer=drawer), materials.study.sample.num_images)]


def run_sweep(materials: Materials) -> None:
    """Every record that is missing. Several processes share out each member's configurations, and
    measure them each on its own devices."""
    study, own = materials.study, materials.own
    reference_cost = own.cost(own.spec(study.reference))
    if not study.finetune.pretrained:  # Those are measured where they were trained.
        _prepare_together(materials)
        own.require_trained()
        blocks = (study.sweep.select_block, *study.sweep.report_blocks)
        for block in blocks:
            own.prompts(block)  # While all processes are here.
        early.require_kept(own, own.scorer.hash)
        seconds: dict[str, dict] = {member: {} for member in study.members}

        def bench(subject: Subject) -> sweep.Bench:
            m = subject.member
            return sweep.Bench(
                spec=own.spec(m), drawer=own.drawer(m), params=early.params(own, subject),
                cost=own.cost(own.spec(m)), reference_cost=reference_cost, scorer=own.scorer,
                prompts=own.swept_prompts, directory=own.workdir / "records",
                strips=own.workdir / "strips", seconds=seconds[m],
            )

        subjects = [subject_lib.of_member(study, n) for n in study.trained]
        _measure(
            own, [*subjects, *early.subjects(study)], own.scorer.hash, bench,
            lambda subject: own.spec(subject.member), reference_cost,
        )
    for further in further_lib.of(own):
        _measure(
            own, further.subjects(), further.scorer.hash,
            functools.partial(further.bench, reference_cost=reference_cost), further.network,
            reference_cost,
        )
        if isinstance(further, FineTuned):
            further.keep_baselines()


def _measure(
    own: Materials, subjects: Sequence[Subject], reference_hash: str,
    bench: Callable[[Subject], sweep.Bench], network: Callable[[Subject], backbone.Spec],
    reference_cost: Cost,
) -> None:
    """Every record of some networks that is missing."""
    directory = own.workdir / "records"

    def outstanding() -> list[Any]:
        short, total, before, recounted, there = [], 0.0, 0.0, 0, None
        for number, subject in enumerate(subjects):
            size = own.cost(own.spec(subject.member))
            first = [zoo.get(subject.first.model).spec] if subject.first else []
            lengths = {spec.context_length for spec in (own.spec(subject.member), *first)}
            if lengths != {own.networks.tokens}:
                there = read_all(directory) if there is None else there
                count = own.cost(network(subject))
                recounted += subject_lib.recount(there, subject, count, reference_cost, directory)
            done = [r.identity for r in subject_lib.existing(subject, reference_hash, directory)]
            planned = subject_lib.planned(subject)
            total += sum(subject_lib.work(subject, size, i) for i in planned)
            before += sum(subject_lib.work(subject, size, i) for i in done)
            short += [number] if len(done) < len(planned) else []
        if recounted:
            log.warning(
                "%s: the FLOPs of %d records were counted on captions of another length than "
                "data.text_length=%d, by an earlier version: counted anew, and written so",
                directory, recounted, own.networks.tokens)
        return [short, max(total, before), before]

    short, total, before = processes.from_lead("outstanding", outstanding)
    share = before + (total - before) / jax.process_count()
    with Progress(share, before) as progress:
        for number in short:
            subject = subjects[number]
            trained = f", {subject.train_step:,} steps of {subject.task}"
            end = subject.task == TEXT_TO_IMAGE and subject.train_step not in early.steps(own.study)
            progress.show((subject.network if end else subject.model) + ("" if end else trained))
            sweep.run(subject, bench(subject), progress)


def dreambooth(materials: Materials) -> list[str]:
    """Every member is taught every subject, draws its prompts before and after, and is scored;
    members that are not trained are trained first. Returns scores in words, and the grids."""
    taught, study = Taught(materials), materials.study
    told = taught.check()
    if not study.weights:
        train(materials)
    materials.require_trained()
    for member in study.members:
        for subject in taught.subjects:
            for after in (False, True):
                taught.drawn(member, subject, after)
    own = taught.own
    judged = dreambooth_scores.Scores(own, weights.folder(None))
    _ = judged.reference_hash  # Made while all processes are here.

    def score() -> list[str]:
        judged.remember()
        lines = [judged.words(member) for member in study.members]
        for subject in own.subjects:
            path = materials.workdir / "samples" / f"{judged.grid_name(subject)}.png"
            if not path.exists():
                pictures.save_png(path, dreambooth_scores.grid(own, study.members, subject))
            lines.append(str(path))
        return lines

    return told + processes.from_lead("scores", score)


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
    own = materials.own

    def write() -> str:
        found, others = _pretrained_records(own)
        others = others if found else []
        for further in further_lib.of(own):
            subjects = further.subjects()
            others += _records(own, subjects, _scored_by(own, subjects, further))
        if not (found or others):
            raise UserError(
                f"no record in {own.workdir / 'records'} is of this config's sweep: run  "
                "ldm-scaling sweep  with the same --config and --workdir first"
            )
        if not found:  # A page is about networks of one length of training; figures are of all.
            found = curves.longest(others)
            others = [r for r in others if r not in found]
        return publish.write(own, found, others)

    return processes.from_lead("report", write)


def _pretrained_records(own: Materials) -> tuple[list[Record], list[Record]]:
    """Those of text-to-image members at the end of their training, and along it; of members that
    another study trained those that it has."""
    there = own.pretrained if own.study.finetune.pretrained else own
    if there is not own and not (there.workdir / "records").exists():
        return [], []
    members = own.study.members  # The last command there may have been of some of them.
    study = dataclasses.replace(there.study, members=members)
    ends = [subject_lib.of_member(study, n) for n in study.trained]
    along = early.subjects(study)
    scored_by = _scored_by(there, [*ends, *along], there)
    found, others = (_records(there, subjects, scored_by) for subjects in (ends, along))
    return found, others


def _scored_by(own: Materials, subjects: Sequence[Subject], whose: Materials | Further) -> str:
    """Hash of what scored a workdir's records of these subjects: of `whose` scorer. The records say
    it where the workdir was copied without its reference or a part of it, or the scorer's packages
    are missing.

    Raises:
      UserError: where records of this config were scored in several ways then.
    """
    missing = None
    try:
        if (own.workdir / REFERENCE).exists() and whose.has_reference:
            return whose.scorer.hash
    except MissingPackageError as e:
        missing = e
    named = {r.identity.reference_hash for r in read_all(own.workdir / "records")}
    found = [name for name in sorted(named) if _records(own, subjects, name)]
    if len(found) > 1:
        raise missing or UserError(
            f"the records in {own.workdir / 'records'} were scored in {len(found)} ways, and "
            f"{own.workdir / REFERENCE}, which says which of them is this config's, is not there "
            "or not whole: copy it too, or run  ldm-scaling sweep  first"
        )
    return found[0] if found else ""


def _records(own: Materials, subjects: Sequence[Subject], reference_hash: str) -> list[Record]:
    return [
        r for subject in subjects
        for r in subject_lib.existing(subject, reference_hash, own.workdir / "records")
    ]


def study_all(materials: Materials) -> str:
    """All stages, in order."""
    study_checks.captions(materials.study)
    if not materials.study.finetune.pretrained:  # Whose members see no captions here.
        prepare(materials)
    train(materials)
    sample(materials, drawer=materials.drawer)
    run_sweep(materials)
    return run_report(materials)
