"""A preparation by Apache Beam, for collections that outgrow one machine.

The same steps of the same parts as on one machine, and the same bytes. What is decided over the
whole collection is decided by grouping: by key, by the pixels' hash, by the perceptual hash, and by
this hash under each of the masks of `duplicates`. The destination and the collection's files must
lie on a file system that all workers see under the same path.
"""

from __future__ import annotations

import collections
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_scaling.data.preparing import decide, duplicates
from ldm_scaling.data.preparing.filters import CODE, KEPT
from ldm_scaling.data.preparing.preparation import Preparation, Verdict
from ldm_scaling.errors import MissingPackageError, UserError


class Candidate(NamedTuple):
    """A row that passes the filters; the smaller, the better, by the rule in `duplicates`."""

    area: int  # its pixels, negative
    key: str
    part: int
    row: int
    pixels: str
    perceptual: int
    captions: tuple[str, ...]


class Drop(NamedTuple):
    """A row that is dropped for another."""

    part: int
    row: int
    reason: int
    keeper: tuple[int, int]


def require() -> None:
    """Raises `MissingPackageError` where Beam is not installed; it is not imported."""
    if importlib.util.find_spec("apache_beam") is None:
        raise MissingPackageError("apache-beam", "Beam's runners", extra="beam")


def run(job: Preparation, runner: str, pipeline_options: Sequence[str] = ()) -> None:
    """Does all steps of `job` for all its parts.

    Raises `UserError` for an unknown runner, and what a step raises.
    """
    require()
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        options = PipelineOptions([f"--runner={runner}", *pipeline_options])
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as e:
        raise UserError(f"Beam has no runner {runner!r} with these options: {e}") from e
    _build(beam, pipeline, job)
    try:
        pipeline.run().wait_until_finish()
    except Exception as e:  # a runner passes a worker's error on as text, in an error of its own
        text = f"{type(e).__name__}: {e}"
        mendable = re.search(r"UserError: (.*?)(?: \[while running .*)?$", text, re.MULTILINE)
        if mendable is None:
            raise
        raise UserError(mendable[1]) from e


def _build(beam: Any, pipeline: Any, job: Preparation) -> None:
    options = job.options
    numbers = list(range(len(job.parts)))
    scanned = (
        pipeline
        | "parts" >> beam.Create(numbers, reshuffle=True)
        | "apart" >> beam.Reshuffle()
        | "examine" >> beam.Map(_scan, job)
    )
    # Facts lie on disk from here on: what fails later does not decode again.
    left = scanned | "keep" >> beam.Reshuffle() | "filter" >> beam.FlatMap(_candidates, job)
    drops = []

    found = _once(beam, left, "key", _by_key, _by_place, job)
    left, others = found.left, found.others
    drops.append(found.drops)
    if options.duplicates.exact:
        found = _once(beam, left, "duplicate", _by_pixels, None, job)
        left, others = found.left, found.others
        drops.append(found.drops)
    if options.duplicates.perceptual is not None:
        drops.append(_near(beam, left, options.duplicates.perceptual))
    parts = {
        "all": scanned | "each part" >> beam.Map(lambda i: (i, None)),
        "others": others,
        "drops": drops | beam.Flatten() | "by part" >> beam.Map(lambda drop: (drop.part, drop)),
    }
    judged = parts | "of a part" >> beam.CoGroupByKey() | "judge" >> beam.Map(_judge, job)
    if options.limit is not None:
        last = (
            judged
            | "orders" >> beam.FlatMap(_orders, job)
            | "limit" >> beam.combiners.Top.Smallest(options.limit)
            | "last" >> beam.Map(lambda orders: orders[-1] if orders else "")
        )
        judged = judged | "within" >> beam.Map(_limit, job, beam.pvalue.AsSingleton(last))
    counts = judged | "count" >> beam.Map(lambda i: (i, job.counts(i)))
    named = beam.pvalue.AsSingleton(
        counts | "counts" >> beam.combiners.ToDict() | "name" >> beam.Map(_named, job)
    )
    _ = (
        counts
        | "of all" >> beam.Keys()
        | "apart again" >> beam.Reshuffle()
        | "write" >> beam.Map(lambda i, named: job.write(i, named[i]), named)
    )


def _scan(i: int, job: Preparation) -> int:
    job.scan(i)
    job.check_broken([i])
    return i


def _candidates(i: int, job: Preparation) -> Iterator[Candidate]:
    facts = job.facts(i)
    rows = np.flatnonzero(job.options.filters.examine(facts) == KEPT)
    area = -(facts["width"].astype(np.int64) * facts["height"])
    columns = (area, facts["key"], facts["pixels"], facts["perceptual"])
    for row, captions, a, key, pixels, perceptual in zip(
        rows.tolist(), facts.captions(rows), *(column[rows].tolist() for column in columns)
    ):
        yield Candidate(a, key, i, row, pixels, perceptual, tuple(captions))


def _by_key(candidate: Candidate) -> str:
    return candidate.key


def _by_pixels(candidate: Candidate) -> str:
    return candidate.pixels


def _by_place(candidate: Candidate) -> tuple[int, int]:
    return candidate.part, candidate.row


def _once(beam: Any, left: Any, reason: str, group: Any, rank: Any, job: Preparation) -> Any:
    """The best candidate of each group (`left`), the drops of the others (`drops`), and of exact
    duplicates the captions that go to the best, by its part (`others`)."""

    def choose(members: Iterable[Candidate]) -> Iterator[Any]:
        best, *worse = sorted(members, key=rank)
        yield best
        if reason == "duplicate" and worse:
            others = decide.others(job.options, best.captions, [other.captions for other in worse])
            yield beam.pvalue.TaggedOutput("others", (best.part, (best.row, others)))
        for other in worse:
            drop = Drop(other.part, other.row, CODE[reason], (best.part, best.row))
            yield beam.pvalue.TaggedOutput("drops", drop)

    groups = left | f"by {reason}" >> beam.GroupBy(group) | f"same {reason}" >> beam.Values()
    once = beam.FlatMap(choose).with_outputs("drops", "others", main="left")
    return groups | f"once each {reason}" >> once


def _near(beam: Any, left: Any, bits: int) -> Any:
    """The drops of candidates that look like better ones."""
    members = left | "by hash" >> beam.Map(lambda candidate: (candidate.perceptual, candidate))
    best = members | "best of hash" >> beam.CombinePerKey(min) | "best" >> beam.Values()
    count = beam.pvalue.AsSingleton(best | "how many" >> beam.combiners.Count.Globally())

    def buckets(candidate: Candidate, count: int) -> Iterator[Any]:
        for i, mask in enumerate(duplicates.masks(bits, count)):
            yield (i, candidate.perceptual & mask), candidate

    def compare(bucket: Iterable[Candidate]) -> Iterator[tuple[int, Candidate]]:
        ordered = sorted(bucket)
        hashes = np.array([candidate.perceptual for candidate in ordered], np.uint64)
        for one, better in zip(ordered, duplicates.nearest(hashes, bits, [0]).tolist()):
            if better >= 0:
                yield one.perceptual, ordered[better]

    def judge(_: int, group: dict[str, Iterable[Candidate]]) -> Iterator[Drop]:
        members = list(group["members"])
        best = min([*members, *group["better"]])
        for other in members:
            if other != best:
                yield Drop(
                    other.part, other.row, CODE["near-duplicate"], (best.part, best.row)
                )  # fmt: skip

    better = (
        best
        | "under masks" >> beam.FlatMap(buckets, count)
        | "by mask" >> beam.GroupByKey()
        | "alike" >> beam.Values()
        | "compare" >> beam.FlatMap(compare)
    )
    grouped = {"members": members, "better": better} | "of a hash" >> beam.CoGroupByKey()
    return grouped | "looks the same" >> beam.FlatMapTuple(judge)


def _judge(item: tuple[int, dict[str, Iterable[Any]]], job: Preparation) -> int:
    i, group = item
    reason = job.options.filters.examine(job.facts(i))
    keeper = np.full((len(reason), 2), -1, np.int32)
    for drop in group["drops"]:
        reason[drop.row], keeper[drop.row] = drop.reason, drop.keeper
    others = {row: texts for row, texts in group["others"] if texts}
    job.save_verdict(i, Verdict(reason, keeper, others))
    return i


def _orders(i: int, job: Preparation) -> list[str]:
    keys = job.facts(i)["key"][job.verdict(i).reason == KEPT]
    return [job.options.order(key) for key in keys]


def _limit(i: int, job: Preparation, last: str) -> int:
    verdict, keys = job.verdict(i), job.facts(i)["key"]
    for row in np.flatnonzero(verdict.reason == KEPT).tolist():
        if job.options.order(keys[row]) > last:
            verdict.reason[row] = CODE["limit"]
    job.save_verdict(i, verdict)
    return i


def _named(counts: dict[int, dict[str, int]], job: Preparation) -> list[dict[str, str]]:
    none = collections.Counter()
    return job.shard_files([counts.get(i, none) for i in range(len(job.parts))])
