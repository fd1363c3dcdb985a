"""The sweep: every (sampler, steps, guidance) of a model, with common prompts and noise."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_scaling import __version__, files, pictures
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone
from ldm_scaling.models.cost import Cost
from ldm_scaling.parallel import hosts, processes
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.table import SamplerTable
from ldm_scaling.study import raced, records, row_times
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.behind import Behind
from ldm_scaling.study.paired_scorer import PairedScorer
from ldm_scaling.study.progress import Progress
from ldm_scaling.study.published_scorer import WithPublished
from ldm_scaling.study.records import RESTORING, Identity, Record
from ldm_scaling.study.scorer import Scorer
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks.cascade_drawing import CascadeDrawer
from ldm_scaling.tasks.drawing import Drawer, sampling_key

log = logging.getLogger(__name__)

STRIP = 8
TIMED_CALLS = 10  # of the network, for a picture


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A seed block: which captions, and which noise.

    Attributes:
      index_N: index into the validation split; noise is drawn by it too.
      context_NLD: text states of the captions.
      embeddings_NE: their embeddings, as the scorer takes them.
      captions: the captions themselves.
      condition_NHWC: what networks see beside the text, see `Drawer.draw`; None if nothing.
      real: places in the block -> the real pictures, uint8, where drawn ones are compared with
        their own; None where they are not.
      finished: drawn pictures and their places in the block -> the pictures that are measured; None
        where these are as they are drawn.
    """

    index_N: np.ndarray
    context_NLD: np.ndarray
    embeddings_NE: np.ndarray
    captions: tuple[str, ...]
    condition_NHWC: np.ndarray | None = None
    real: Callable[[np.ndarray], np.ndarray] | None = None
    finished: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def block_indices(block: int, size: int, total: int, seed: int) -> np.ndarray:
    """Indices of a block's prompts: blocks are disjoint parts of one permutation."""
    order = np.random.default_rng([seed, 20240401]).permutation(total)
    return order[block * size : (block + 1) * size]


def shared(work_N: Sequence[float], count: int) -> list[list[int]]:
    """Numbers of N pieces of work in `count` parts of about equal sums, ascending: the largest
    first, each to the part that has least."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for number in sorted(range(len(work_N)), key=lambda n: (-work_N[n], n)):
        least = sums.index(min(sums))
        parts[least].append(number)
        sums[least] += work_N[number]
    return [sorted(part) for part in parts]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What a member is measured with.

    Attributes:
      spec: its network.
      drawer: draws with it.
      params: its averaged parameters.
      cost, reference_cost: of the member, and of the member whose cost is 1.
      scorer: scores pictures, see `scorer`, `paired_scorer` and `published_scorer`.
      prompts: block -> prompts.
      directory: where records lie.
      strips: where the first pictures of each configuration go.
      seconds: measured seconds of a row and of decoding a picture, by program; see `row_times`.
    """

    spec: backbone.Spec
    drawer: Drawer | CascadeDrawer
    params: Any
    cost: Cost
    reference_cost: Cost
    scorer: Scorer | PairedScorer | WithPublished
    prompts: Callable[[int], Prompts]
    directory: epath.Path
    strips: epath.Path
    seconds: dict[Any, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def features(self) -> epath.Path:
        """Folder of the features that a race keeps between rounds."""
        return epath.Path(self.directory).parent / "features"


def run(subject: Subject, bench: Bench, progress: Progress) -> list[Record]:
    """Measures what is missing of a network, and returns all its records.

    The rates of the selection block run together in lanes, all at once or in the rounds of a race,
    then the chosen ones on the report blocks; of a further training run the rates that the first
    run chose, whose records must be there. Pictures are decoded and scored behind the sampler; a
    record is written when the last picture of its configuration is scored, so that a run that is
    killed loses what was under way.

    Several processes share out each block's configurations, and all must come here: the rates that
    are reported are chosen among the records of all.
    """
    first = subject_lib.selection(subject, bench.scorer.hash)
    if subject.first_run:
        chosen, _ = subject_lib.chosen(subject, bench.scorer.hash, bench.directory)
    elif subject_lib.races(subject):
        chosen = _race(subject, first, bench, progress)
    else:
        chosen = select(subject, bench, progress)
    if hosts.is_lead():
        raced.forget(bench.features, bench.directory, first)
    last = subject_lib.reporting(subject, bench.scorer.hash, chosen)
    for block in dict.fromkeys(i.seed_block for i in last):
        _complete(subject, [i for i in last if i.seed_block == block], bench, progress)
    processes.barrier("reported")
    own = [] if subject.first_run else chosen
    return own + [records.read(records.path_of(bench.directory, i.key)) for i in last]


def select(subject: Subject, bench: Bench, progress: Progress) -> list[Record]:
    """Measures what is missing on the block that chooses, all rates of the grid, and returns its
    records; see `run`."""
    wanted = subject_lib.selection(subject, bench.scorer.hash)
    _complete(subject, wanted, bench, progress)
    processes.barrier("selected")
    return [records.read(records.path_of(bench.directory, i.key)) for i in wanted]


def _race(
    subject: Subject, grid: list[Identity], bench: Bench, progress: Progress
) -> list[Record]:
    """Runs the rounds that are missing; the last record of each rate.

    Between rounds features are kept. Where they are gone, all of a rate's pictures are drawn anew.
    """
    by = subject.sweep.choose_by
    while (now := raced.agreed_round(subject.sweep, grid, bench.directory, by)) is not None:
        lost = set(processes.from_lead("lost", lambda now=now: [
            i.key for i in now.identities
            if now.start and not raced.before(bench.features, i, now.start).exists()
        ]))
        anew = dataclasses.replace(now, start=0)
        for part, stretch in ((True, anew), (False, now)):
            some = [i for i in now.identities if (i.key in lost) == part]
            _complete(subject, some, bench, progress, stretch)
        processes.barrier(f"round {now.number}")
    return raced.last_rounds(subject.sweep, grid, bench.directory, by)[0]


def _complete(
    subject: Subject, wanted: list[Identity], bench: Bench, progress: Progress,
    race: raced.Round | None = None,
) -> None:
    """Measures this process's share of those of one block's configurations that have no record
    yet; of a race, by the pictures of its round and those before."""
    absent = set(processes.from_lead(
        "absent", lambda: [i.key for i in records.missing(bench.directory, wanted)]
    ))
    missing = [i for i in wanted if i.key in absent]
    parts = shared(
        [subject_lib.work(subject, bench.cost, i) for i in missing], jax.process_count()
    )
    missing = [missing[k] for k in parts[jax.process_index()]]
    if not missing:
        return
    block = bench.prompts(missing[0].seed_block)
    drawer, key, sweep = bench.drawer, sampling_key(subject.seed), subject.sweep
    places = np.arange(race.start, race.stop) if race else np.arange(len(block.index_N))
    configurations = [
        Configuration(
            drawer.table(i.sampler, i.steps, i.spacing), i.guidance, block.index_N[places], places
        )
        for i in missing
    ]
    plans = drawer.plans(configurations)
    rows, useful = (sum(p.lanes * p.rows for p in plans), sum(p.useful_rows for p in plans))
    log.info(
        "%s: %d configurations of %d pictures in %d lanes and %d programs: %d rows, %.2f%% useful",
        missing[0].model, len(missing), len(places), drawer.batch_size, len(plans), rows,
        100 * useful / rows,
    )
    seconds = _seconds(subject, bench, configurations, block, key)

    broken: set[int] = set()

    def write(number: int, images_NHWC: np.ndarray, features_ND: np.ndarray) -> None:
        if number in broken:
            return
        identity, configuration = missing[number], configurations[number]
        if race and race.start:
            earlier_ND = raced.kept(raced.before(bench.features, identity, race.start))
            features_ND = np.concatenate([earlier_ND, features_ND])
        else:
            pictures.save_png(
                bench.strips / f"{identity.key}.png", np.concatenate(images_NHWC, axis=1)
            )
        reported = identity.seed_block in sweep.report_blocks
        seed = identity.seed_block if reported or race else None
        metrics, intervals, replicates = bench.scorer.score(
            features_ND, block.embeddings_NE[: len(features_ND)], seed,
            sweep.num_images if race else 0,
        )
        if race:
            raced.keep(raced.before(bench.features, identity, race.stop), features_ND)
        records.write(
            bench.directory,
            Record(
                identity=identity,
                base_channels=bench.spec.base_channels,
                params=bench.cost.params,
                gflops=bench.cost.gflops,
                norm_cost=bench.cost.gflops / bench.reference_cost.gflops,
                calls=configuration.table.calls,
                metrics=metrics,
                intervals=intervals,
                replicates=replicates,
                seconds_per_image=seconds[number],
                device=hosts.describe(list(drawer.mesh.devices.flat)),
                round=race.number if race else 0,
                task=subject.task,
                told=subject.told,
                student_steps=subject.student_steps,
                setting=subject.setting,
                first=subject.first,
                guided_calls=configuration.table.guided_calls,
                repeats=subject.first_run.hash if subject.first_run else "",
                run=subject.run,
            ),
        )

    def decode(
        latents_JHWC: np.ndarray, number_J: list[int], places_J: np.ndarray
    ) -> np.ndarray:
        images_JHWC = drawer.decode(latents_JHWC, str, lambda j: broken.add(number_J[j]))
        if block.finished is None:
            return images_JHWC
        return block.finished(images_JHWC, places[places_J])

    def features(images_JHWC: np.ndarray, places_J: np.ndarray) -> np.ndarray:
        own, more = places[places_J], {}
        if isinstance(bench.scorer, WithPublished):
            more["captions"] = [block.captions[place] for place in own]
        real = () if block.real is None else (block.real(own),)
        return bench.scorer.features(images_JHWC, *real, **more)

    drawn = drawer.draw(
        bench.params, configurations, block.context_NLD, key, block.condition_NHWC
    )
    with Behind(
        decode, features, write, len(places), drawer.batch_size, STRIP
    ) as behind:
        for finished in drawn:
            behind.put(finished)
            rows, images = finished.rows, len(finished.position)
            evaluations = finished.evaluations + images
            gflops = subject.first.gflops if finished.first else bench.cost.gflops
            progress.update(rows, images, evaluations * gflops)
    if broken:
        i = missing[min(broken)]
        raise UserError(
            f"{len(broken)} of {len(missing)} configurations draw pictures that are not finite, "
            f"such as {i.model}, {i.sampler}, {i.steps} steps at guidance {i.guidance:g}; the "
            "others are measured. Take such guidance rates, steps or samplers out of the config, "
            "use train.compute_dtype=float32, or train anew"
        )


def _seconds(
    subject: Subject, bench: Bench, configurations: list[Configuration], block: Prompts, key: Any
) -> list[float]:
    """Measured seconds per image of each configuration: of its rows, and of decoding it.

    Rows are timed once for each program of a network and kind of device, in whatever run comes
    first (`row_times`), with all lanes full, by the configuration whose calls are nearest to
    `TIMED_CALLS`: in lanes, configurations share a batch, so none has a time of its own. Of tables
    with guidance in some rows only, both kinds of rows are timed, as if all were so.
    """

    def seconds(guided: bool, timed: Configuration, once: bool) -> tuple[float, float]:
        """Of a row, and of decoding; `once` is of rows without guidance in a guided table."""
        correction = timed.table.correction
        if once:
            none = timed.table.with_guidance(np.zeros(timed.table.calls))
            timed = dataclasses.replace(timed, table=none)
            guided, correction = False, dataclasses.replace(correction, rescale=0.0)
        apart = once and subject.first is not None  # Its first stage is guided all the same.
        kind = (guided, correction, apart)
        if kind not in bench.seconds:
            drawer = bench.drawer
            program = {
                "model": subject.model, "task": subject.task,
                # Times of fine-tuned networks were kept before these had a setting.
                "setting": "" if subject.task in RESTORING else subject.setting,
                "first": subject.first.spelling if subject.first else "",
                "network": files.sha256_of(bench.spec), "version": __version__,
                "guided": guided, "correction": dataclasses.asdict(correction),
                "batch": drawer.batch_size, "program": drawer.program, "jax": jax.__version__,
                "device": hosts.describe(list(drawer.mesh.devices.flat)),
            } | ({"once": True} if apart else {})
            bench.seconds[kind] = row_times.kept(
                epath.Path(bench.directory).parent, program, functools.partial(
                    drawer.seconds, bench.params, timed, block.context_NLD, key,
                    block.condition_NHWC),
            )
        return bench.seconds[kind]

    out = [0.0] * len(configurations)
    whole = [dataclasses.replace(c, table=_everywhere(c.table)) for c in configurations]
    for guided, group in bench.drawer.split(whole):
        # Of a few rows: with one a sample, what is timed is the host, which begins samples.
        timed = min((whole[i] for i in group), key=lambda c: abs(c.table.calls - TIMED_CALLS))
        row, decode = seconds(guided, timed, once=False)
        for i in group:
            table = configurations[i].table
            out[i] = table.calls * row + decode
            if table.partly and (guided or subject.first):
                less = row - seconds(guided, timed, once=True)[0]
                out[i] -= (table.calls - table.guided_calls) * less
    return out


def _everywhere(table: SamplerTable) -> SamplerTable:
    """The table with guidance in all rows, if it has some."""
    return dataclasses.replace(table, g=np.ones_like(table.g)) if table.partly else table
