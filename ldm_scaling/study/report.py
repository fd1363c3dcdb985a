"""The report: one self-contained HTML page, made from records and the pictures beside them."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from ldm_scaling import files
from ldm_scaling.errors import UserError
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import (
    families,
    findings,
    labels,
    page_advice,
    page_data,
    plot_style,
    repeated,
    thumbnails,
)
from ldm_scaling.study import reported as reported_lib
from ldm_scaling.study.curves import Curves
from ldm_scaling.study.figures import catalogue, rows
from ldm_scaling.study.records import RESTORING, TEXT_TO_IMAGE, Record
from ldm_scaling.study.statistics import blocks as blocks_lib
from ldm_scaling.study.statistics import claims, words

_PAGE = pathlib.Path(__file__).parent / "page"
_SCRIPTS = ("charts.js", "panel.js", "figures.js", "advice.js", "table.js")

MOST_BYTES = 16 * 2**20
"""What the page may weigh before it shows fewer pictures of each point; other parts stay whole."""
_NOTE_BYTES = 256  # Room for the sentence that says so.
_FIRST = 3  # Findings that are read at once.


@dataclasses.dataclass(frozen=True)
class Context:
    """What the records do not say, told by whoever ran the study.

    Attributes:
      title: heading of the page.
      summary: one or two sentences under it; by default made of the records' networks.
      metric: the main measure.
      select_block: seed block that chose the guidance.
      report_blocks: seed blocks that are reported; the mean over several, of those that hold all
        that is reported, see `reported.whole`.
      dataset: paragraphs on the data set: what it is, where from, how many pairs, the split.
      captions: of the first pictures that a reported record keeps, for those that the page shows.
      measures: measure -> one more paragraph on how it was computed here.
      protocol: paragraphs that follow the built-in ones.
      limits: sentences on what is left out because a file is damaged.
      attribution: attributions that licences ask for; addresses become links.
      config: the study's configuration, shown as JSON.
      versions: package -> version.
    """

    title: str = "Quality against sampling cost"
    summary: str = ""
    metric: str = "fd_effnetlite0"
    select_block: int = 0
    report_blocks: Sequence[int] = (1,)
    dataset: Sequence[str] = ()
    captions: Sequence[str] = ()
    measures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    protocol: Sequence[str] = ()
    limits: Sequence[str] = ()
    attribution: Sequence[str] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Picture:
    title: str
    alt: str
    uri: str


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _pictures(
    directory: epath.Path, records: Sequence[Record], drawn: Sequence[str] | None
) -> dict[str, list[_Picture]]:
    """Every picture of the folder, by section: SVG, but PNG for those that hold images. Figures
    that are not among `drawn` are of other records, or of another measure, and stay out."""
    arms = curves_lib.samplers(curves_lib.distinct(records))
    samplers = {labels.file_name(name): name for name in arms}
    out: dict[str, list[_Picture]] = {e.section: [] for e in catalogue.FIGURES}
    out["other"] = []
    left, entries = {}, {}
    if directory.exists():
        mine = {e.name for e in catalogue.FIGURES} | catalogue.parts_in(directory)
        stale = set() if drawn is None else mine - set(drawn)
        paths = sorted(p for p in directory.iterdir()
                       if not p.name.startswith(".") and p.stem not in stale)
        entries = {p.stem: catalogue.entry_of(p.stem) for p in paths
                   if drawn is None or p.stem in drawn}
        left = {kind: [p for p in paths if p.suffix == f".{kind}"] for kind in ("png", "svg")}
        left = {p.stem: p for p in (*left["png"], *left["svg"])} | {
            p.stem: p for p in left["png"]
            if (own := entries.get(p.stem)) is None or own.section == "images"
        }
    for name in sorted(left, key=lambda name: _reading_order(name, entries.get(name))):
        section, title, alt = _section(name, entries.get(name), samplers)
        kind = "image/png" if left[name].suffix == ".png" else "image/svg+xml"
        out[section].append(_Picture(title, alt, _uri(kind, left[name].read_bytes())))
    return out


def _section(
    name: str, entry: catalogue.Entry | None, samplers: Mapping[str, str]
) -> tuple[str, str, str]:
    """Section, title and alternative text of a picture with this file name, of a figure or none."""
    if entry is None:
        title = name.replace("_", " ")
        return "other", title, title
    title, alt = entry.heading, entry.alt
    part = name.removeprefix(entry.name).removeprefix("_")
    if part in RESTORING:
        paper, own = labels.task(RESTORING[0]), labels.task(part)
        title, alt = title.replace(paper, own), alt.replace(paper.lower(), own.lower())
    elif part:
        title += f": {labels.sampler(samplers.get(part, part))}"
    return entry.section, title, f"{title}. {alt}"


def _reading_order(name: str, entry: catalogue.Entry | None) -> tuple[int, bool, str]:
    known = catalogue.FIGURES
    place = known.index(entry) if entry else len(known)
    return place, not name.endswith("_ddim"), name


def _csv(records: Sequence[Record]) -> str:
    return _uri("text/csv;charset=utf-8", rows.text([r.flat() for r in records]).encode())


def _protocol(records: Sequence[Record], context: Context) -> list[str]:
    images = {r.identity.seed_block: set() for r in records}
    for r in records:
        images[r.identity.seed_block].add(r.identity.num_images)
    counts = "; ".join(
        f"seed block {block}: {labels.listing([f'{n:,}' for n in sorted(images[block])], 'or')} "
        "images per configuration"
        for block in sorted(images)
    )
    draws = {len(v) for r in records for v in r.replicates.values()}
    frechet = any(map(labels.frechet, curves_lib.measures(records)))
    several = len(context.report_blocks) > 1
    where = labels.listing([str(block) for block in context.report_blocks])
    within = "step count that a size takes within a budget"
    rates = {r.identity.guidance for r in records}
    chosen, too = ("best guidance rate of each size, sampler and step count", (
        f" The {within} is chosen in the same way.")) if len(rates) > 1 else (within, "")
    protocol = [
        f"Every configuration draws images for the same prompts from the same noise ({counts}). "
        f"The {chosen} is chosen on seed block "
        f"{context.select_block}; what is reported was sampled anew on block{'s' * several} "
        f"{where}, with other prompts and noise, so the choice does not flatter the result.{too}",
    ]
    if any(r.round for r in records):
        protocol.append(
            f"On seed block {context.select_block} guidance rates raced: all drew a few images, "
            "the better half drew more, and so on. A distance from some of the block's images is "
            "foretold for all of them, so that rates can be compared."
        )
    if draws:
        number = labels.listing([str(d) for d in sorted(draws)], "or")
        protocol.append(
            f"Intervals and probabilities come from {number} bootstrap replicates, each a random "
            "half of the prompts, centred"
            + (" because fewer images give a larger Fréchet distance" if frechet else "")
            + ". A replicate takes the same prompts for every configuration, so differences "
            "between sizes are paired."
        )
    if several:
        protocol.append(
            f"What is reported is the mean over seed blocks {where}, each with prompts and noise "
            "of its own: the score that one block's number of images has, known more precisely. "
            "Replicates are means over the blocks as well."
        )
    return [*protocol, *context.protocol]


def _limits(records: Sequence[Record], untested: str, lost: Sequence[str]) -> list[str]:
    trained = sorted({r.identity.train_step for r in records} - {0})  # 0 is a published model.
    steps = [labels.listing([f"{s:,}" for s in trained], "or")] if trained else []
    frechet = any(map(labels.frechet, curves_lib.measures(records)))
    return [
        "Sampling cost counts the denoising network alone, one call per step; the text encoder, "
        "the image decoder and the second call that guidance makes are left out, as in the paper. "
        "Measured seconds include the second call and the decoder.",
        *(repeated.words(records) or f"Each size was trained once, for {s} steps: the intervals "
          "cover the choice of prompts, not the chance of another training run." for s in steps),
        f"{'A Fréchet distance depends on the number of images; compare' if frechet else 'Compare'}"
        " only values with the same number, network and reference pictures.",
        *([f"Not tested by these records: {untested} of the paper."] if untested else []),
        *(f"{line[0].upper()}{line[1:]}." for line in lost),
    ]


def _images(
    records: Sequence[Record], arms: Sequence[Record], curves: Curves, block: int,
    strips: Sequence[epath.PathLike], others: Sequence[Record],
    advice: Sequence[Mapping[str, Any]],
) -> dict[str, list[str]]:
    """The kept pictures of every point of the curves and of the advice, as data URIs, by the lines
    "network", "sampler" and "steps"."""
    if not strips:
        return {}
    own = {r.task for r in records}
    points = {(p.task, p.model, p.sampler, p.steps, p.guidance): p.model
              for c in curves.values() for p in c}
    points |= {(p["task"], p["model"], p["sampler"], p["steps"], p["guidance"]): p["name"]
               for p in (advice[0]["points"] if advice else ()) if p["task"] not in own}
    pairs = [*zip(records, arms, strict=True)]
    for task in {r.task for r in others} - own:
        pairs += curves_lib.arms(curves_lib.longest([r for r in others if r.task == task]))
    keys = {}
    for record, arm in pairs:
        i = arm.identity
        name = points.get((record.task, i.model, i.sampler, i.steps, i.guidance))
        if i.seed_block == block and name is not None:
            keys[f"{name}\n{i.sampler}\n{i.steps}"] = record.identity.key
    found = thumbnails.read(strips, keys.values())
    return {cell: found[key] for cell, key in keys.items() if key in found}


def _thinned(found: Mapping[str, list[str]], room: int) -> tuple[dict[str, list[str]], str]:
    """Those pictures that there is room for, and a sentence on what is left out."""
    shown = thumbnails.thinned(found, room)
    all_of, some_of = (max(map(len, images.values()), default=0) for images in (found, shown))
    note = "" if some_of == all_of else (
        f"Of the {all_of} pictures kept of each point {some_of or 'none'} "
        f"{'is' if some_of < 2 else 'are'} here: they are not to take the page beyond "
        f"{MOST_BYTES // 2**20} MiB."
    )
    return shown, note


def write(
    workdir: epath.PathLike,
    records: Sequence[Record],
    figures_dir: epath.PathLike,
    told: Context,
    strips: Sequence[epath.PathLike] = (),
    others: Sequence[Record] = (),
    further: Sequence[str] = (),
    drawn: Sequence[str] | None = None,
) -> epath.Path:
    """Writes `report.html` into `workdir`; the same input gives the same bytes.

    Args:
      workdir: where the page goes.
      records: all records of one study, finished or not.
      figures_dir: what `figures.catalogue.write` drew; other PNG or SVG files there are shown
        too.
      told: what records do not say.
      strips: folders of the strips of pictures that sweeps kept, `KEY.png`; the page shows them
        as thumbnails, fewer of each where it would weigh more than `MOST_BYTES`.
      others: records of the same members' other tasks, which claims are judged by too, and advice
        chooses from where they draw from text.
      further: findings that follow those of the records.
      drawn: the pictures that `catalogue.write` has just drawn of these records; others of its own
        are not shown. All that are there, if not given.

    Returns:
      The page's path.

    Raises:
      UserError: without any record, on an unknown measure, or when two records claim the same
        configuration.
    """
    records = curves_lib.last_rounds(records)
    luck, every = findings.between_runs(records, told.metric), [*records, *others]
    mine = {r.identity for r in records}
    merged = repeated.merged(every)
    records = [r for r in merged if r.identity in mine]
    others = [r for r in merged if r.identity not in mine]
    records = sorted(records, key=lambda r: (r.params, dataclasses.astuple(r.identity)))
    if not records:
        raise UserError(f"no records to report for {workdir}: run the sweep first")
    measure = labels.measure(told.metric)
    arms = curves_lib.distinct(records)
    report_blocks = reported_lib.whole(
        arms, told.metric, told.select_block, told.report_blocks)
    lacking = list(filter(None, [reported_lib.left_out(told.report_blocks, report_blocks)]))
    told = dataclasses.replace(
        told, report_blocks=report_blocks, summary=told.summary or families.summary(records))
    blocks = (told.select_block, told.report_blocks[0])
    pooled = blocks_lib.pooled(arms, told.select_block, told.report_blocks)
    sizes = curves_lib.models(arms)
    curves = curves_lib.quality_curves(pooled, told.metric, None, *blocks)
    data = page_data.charts(pooled, told.metric, *blocks)
    sentences = findings.findings(pooled, told.metric, *blocks)
    sentences += findings.between_blocks(
        arms, told.metric, told.select_block, told.report_blocks)
    if all(r.task == TEXT_TO_IMAGE for r in records):
        sentences += families.sentences(curves, told.metric)
    sentences += [*luck, *further, *lacking]
    missing = findings.incomplete(pooled, told.metric, *blocks)
    said = [s for s in sentences if s not in missing]
    # Sizes of one family alone are a ladder, smaller to larger.
    name, ladder = families.ladder(sizes)
    evidence = claims.Evidence.of([
        r for own in ([r for r in every if r.task == TEXT_TO_IMAGE],  # Of all runs, for claim 1.
                      [r for r in merged if r.task != TEXT_TO_IMAGE])
        for r in blocks_lib.pooled(own, told.select_block, told.report_blocks)
        if r.identity.model in ladder
    ])
    if name:
        lacking.append(
            f"Claims, and what is said of smaller and larger sizes, are of {name} alone "
            f"({labels.listing(ladder)}): sizes of several families are no ladder."
        )
    verdicts = claims.verdicts(evidence, told.metric, *blocks)
    numbers = [str(v.number) for v in verdicts if not v.tested]
    untested = f"claim{'s' * (len(numbers) > 1)} {labels.listing(numbers)}" if numbers else ""
    advice = page_advice.units(
        arms, told.metric, told.select_block, told.report_blocks, others) if curves else []
    table = page_data.table(records, arms, curves, told.report_blocks)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    draw = functools.partial(
        environment.get_template("report.html.jinja").render,
        context=told,
        css=(_PAGE / "report.css").read_text("utf-8"),
        js="\n".join((_PAGE / name).read_text("utf-8") for name in _SCRIPTS),
        light=plot_style.ramp(len(sizes)),
        dark=plot_style.ramp(len(sizes), 0.3, 1.0),
        marks=page_data.MARKS,
        facts=page_data.facts(arms),
        verdicts=verdicts,
        untested=untested,
        findings=[*said[:_FIRST], *missing],
        more=said[_FIRST:],
        confidence=f"{words.CONFIDENCE:g}",
        doubt=f"{1 - words.CONFIDENCE:.2g}",
        data=data | {"advice": advice},
        advice=advice,
        has_curves=bool(curves),
        measure=measure,
        measures=[labels.measure(m["name"]) for m in data["measures"]],
        reference=page_data.reference(arms),
        devices=labels.listing(sorted({r.device for r in records})),
        alt=page_data.alternatives(arms, measure, sentences, data["trade"]),
        pictures=_pictures(epath.Path(figures_dir), records, drawn),
        winner_rows=page_data.winner_rows(curves, told.metric, sizes, data["samplers"][0]["name"]),
        csv=_csv(records),
        protocol=[*_protocol(records, told), *lacking],
        limits=_limits(records, untested, told.limits),
        config=json.dumps(told.config, indent=1, sort_keys=True, default=str),
        **table,
    )
    images = _images(records, arms, curves, blocks[1], strips,
                     page_advice.weighed(records, others), advice)
    page = draw(images={"captions": told.captions, "points": {}, "note": ""})
    if images:
        shown, note = _thinned(images, MOST_BYTES - len(page.encode()) - _NOTE_BYTES)
        page = draw(images={"captions": told.captions, "points": shown, "note": note})
    path = epath.Path(workdir) / "report.html"
    files.atomic_write_text(path, page)
    return path
