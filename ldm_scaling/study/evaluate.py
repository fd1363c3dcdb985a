"""From images and what they are held against to scores, each with all that decides its number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_scaling import files
from ldm_scaling.data import pairs
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.metrics import bootstrap, catalog, compare, reference
from ldm_scaling.metrics.compare import Comparison
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.study import evaluate_checks, extractors, features, references, weights
from ldm_scaling.study import scores as scores_lib
from ldm_scaling.study.extractors import EXTRACTORS, Network, Words
from ldm_scaling.study.features import CaptionedSet, ImageSet, PairSet
from ldm_scaling.study.scores import Row


@dataclasses.dataclass(frozen=True)
class Task:
    """What is scored.

    Attributes:
      generated: the images.
      real: real images, a file of their statistics or features, or None.
      captions: of the generated images, in their order, or None.
      subjects: the subject of each generated and of each real image, or None.
      real_count: how many images the statistics in a file should be of; None where that is free.
    """

    generated: ImageSet
    real: ImageSet | Path | None = None
    captions: tuple[str, ...] | None = None
    subjects: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    real_count: int | None = None

    def __post_init__(self):
        if self.captions is not None and len(self.captions) != len(self.generated):
            raise UserError(
                f"{len(self.captions)} captions for {len(self.generated)} images in "
                f"{self.generated.folder.root}: give one for each, in the order of names"
            )

    @property
    def strata(self) -> tuple[tuple[str, str], ...] | None:
        """Subject and caption of each generated image; None where they are of no subjects."""
        if self.subjects is None:
            return None
        generated, _ = self.subjects
        return tuple(zip(generated, self.captions or ("",) * len(generated), strict=True))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the generated images, see `bootstrap.interval`."""
        return len(self.generated) - len(set(self.strata or ("",)))


@dataclasses.dataclass(frozen=True)
class Options:
    """How it is scored.

    Attributes:
      weights: the folder of published weights, or None.
      cache: where features are kept.
      replicates: bootstrap replicates, 0 for no intervals.
      seed: of their drawing: the same for two sets of images pairs them.
      level: of the intervals.
      prefix: what is put before every caption for CLIP scores.
    """

    weights: Path | None
    cache: Path
    replicates: int = 100
    seed: int = 0
    level: float = 0.95
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
      name, label, better, source: see `Row` and `catalog.Metric`.
      value: the score.
      interval: (low, high) of its expectation at this number of images, or None.
      n: generated images.
      extractor: hash of network, weights, layer and preprocessing.
      features: the same in words.
      resizer: how images are brought to the network's side.
      against: what the images are held against, in words.
      reference: hash of it; None where there is nothing.
      reference_n: how many images that is, None where there is nothing or it is not known.
      remark: what else decides the number, or why there is no interval.
    """

    name: str
    label: str
    better: str
    value: float
    interval: tuple[float, float] | None
    n: int
    extractor: str
    features: str
    resizer: str
    against: str
    reference: str | None
    reference_n: int | None
    remark: str
    source: str
    replicates_R: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def plain(self) -> dict[str, Any]:
        """For JSON; the replicates are left out."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
            if f.name != "replicates_R"
        }


@dataclasses.dataclass(frozen=True, eq=False)
class _Against:
    """What one metric takes as its other side, with its hash, count and words."""

    value: Any = None
    hash: str | None = None
    count: int | None = None
    text: str = ""


def score(rows: Sequence[Row], task: Task, options: Options) -> list[Score]:
    """The scores of these rows, in their order.

    Raises:
      UserError: when something that they need is missing, before anything is computed; for a
        reference that is of something else, with both values; for broken images.
    """
    evaluate_checks.counts_and_kinds(rows, task)
    found = require(rows, options)
    for images in (task.generated, task.real):
        if isinstance(images, ImageSet):
            images.remember(options.cache)
    out = {}
    for name, group in _groups(rows):
        network = extractors.load(name, found)
        out |= _group(name, network, group, task, options, found)
    return [out[row.name] for row in rows]


def require(rows: Sequence[Row], options: Options) -> dict[str, Path]:
    """The weights that these scores need, by their name in `weights.PUBLISHED`.

    Raises `UserError` that names all which are missing.
    """
    return weights.require(options.weights, scores_lib.needed(rows), scores_lib.free())


def compared(
    a: Sequence[Score], b: Sequence[Score], freedom: int, level: float
) -> dict[str, Comparison]:
    """Score name to a's less b's, paired over images, of which each has so many degrees of freedom;
    those without replicates are left out.

    Raises `UserError` when the two are of different numbers of images.
    """
    if a and b and a[0].n != b[0].n:
        raise UserError(
            f"{a[0].n} and {b[0].n} images: a paired comparison needs as many of both, drawn for "
            "the same captions and noise in the same order of names"
        )
    return {
        one.name: compare.distributions(
            one.value, other.value, one.replicates_R, other.replicates_R, freedom=freedom,
            level=level,
        )
        for one, other in zip(a, b)
        if one.replicates_R is not None and other.replicates_R is not None
    }


def make_reference(
    rows: Sequence[Row], images: ImageSet, options: Options, path: Path
) -> list[Path]:
    """Writes the statistics that these scores hold images against; returns the files.

    One network's go to `path`, those of several beside it, see `references.file_of`.
    """
    wrong = [row.name for row in rows if row.definition.against != "statistics"]
    if wrong:
        raise UserError(f"{', '.join(wrong)} hold images against no statistics: name others")
    if len(images) < 2:
        raise UserError(f"statistics need 2 images, there is 1 in {images.folder.root}: give more")
    found, out = require(rows, options), []
    images.remember(options.cache)
    groups = _groups(rows)
    if len(groups) > len({name for name, _ in groups}):
        raise UserError(
            f"{', '.join(row.name for row in rows)}: a file of statistics is of one layer of a "
            "network: name one of them"
        )
    for name, (row, *_) in groups:
        network = extractors.load(name, found)
        values = _extract(name, network, images, [row], options, "real")
        target = path if len(groups) == 1 else references.file_of(path, name)
        origin = references.origin_of(name, network.hash_of(row.layer), images)
        reference.save(target, Moments.of(values[row.layer]), origin)
        out.append(target)
    return out


def hash_of(rows: Sequence[Row], options: Options) -> str:
    """Of the networks and their preprocessing that these scores are by, those of captions too."""
    found, by = require(rows, options), []
    for name, some in _groups(rows):
        network = extractors.load(name, found)
        by += [[row.name, network.hash_of(row.layer)] for row in some]
        if any(row.definition.against == "captions" for row in some):
            by.append(_words(name, found).hash)
    return sha256_of(by)


# --- what is needed ---------------------------------------------------------------------------


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by extractor: each network is loaded once, and one is in memory at a time. Where one
    metric is of two layers of a network, the second comes in a group of its own."""
    out: list[tuple[str, list[Row]]] = []
    for row in rows:
        for name, group in out:
            same = (one for one in group if one.definition.needs == row.definition.needs)
            if name == row.extractor and all(one.layer == row.layer for one in same):
                group.append(row)
                break
        else:
            out.append((row.extractor, [row]))
    return out


def _words(name: str, found: Mapping[str, Path]) -> Words:
    extractor = EXTRACTORS[name]
    return extractor.words(*(found[w] for w in extractor.weights))


# --- one network ------------------------------------------------------------------------------


def _extract(
    name: str, network: Network, images: ImageSet | PairSet | CaptionedSet, rows: Sequence[Row],
    options: Options, what: str,
) -> dict[str, np.ndarray]:
    hashes = {row.layer: network.hash_of(row.layer) for row in rows}

    def run(some: list[Any]) -> dict[str, np.ndarray]:
        values = network.run(some)
        return {layer: extractors.layer_of(values, layer, name) for layer in hashes}

    return features.of_images(images, run, hashes, options.cache, f"{name}, {what}")


def _group(
    name: str, network: Network, rows: Sequence[Row], task: Task, options: Options,
    found: Mapping[str, Path],
) -> dict[str, Score]:
    images, real, against = task.generated, {}, {}
    if rows[0].paired:
        # In the generated images' order.
        folder = pairs.match(task.real.folder, images.folder)
        images = PairSet(images, dataclasses.replace(task.real, folder=folder))
        evaluate_checks.sides(rows, task.generated)
        same = _Against(None, images.second.list_hash, len(images), str(folder.root))
        against = {row.metric: same for row in rows}
    elif EXTRACTORS[name].takes == "captions":
        images = CaptionedSet(images, task.captions)
        same = _Against(None, sha256_of(task.captions), len(images), "their captions")
        against = {row.metric: same for row in rows}
    else:
        with_real = [r for r in rows if evaluate_checks.takes_real(r)]
        for row in with_real if isinstance(task.real, Path) else ():
            if row.definition.against == "statistics":  # Refused before the images are looked at.
                file = references.load(
                    task.real, row.extractor, network.hash_of(row.layer), task.generated,
                    task.real_count,
                )
                against[row.metric] = _Against(*file)
        if with_real and isinstance(task.real, ImageSet):
            real = _extract(name, network, task.real, with_real, options, "real")
    for row in rows:  # Words before images: a vocabulary that is missing is told early.
        if row.definition.against == "captions":
            against[row.metric] = _other_side(row, network, task, options, found, {}, None)
    x = _extract(name, network, images, rows, options, "generated")
    statistics = {
        layer: ReferenceStats(Moments.of(value), network.hash_of(layer))
        for layer, value in real.items()
        if any(r.layer == layer and r.definition.against == "statistics" for r in rows)
    }
    for row in rows:
        if row.metric not in against:
            against[row.metric] = _other_side(
                row, network, task, options, found, real, statistics.get(row.layer)
            )
        if isinstance(task.real, Path) and evaluate_checks.takes_real(row):
            value = against[row.metric].value
            have = value.moments.d if isinstance(value, ReferenceStats) else value.shape[1]
            evaluate_checks.width(row, task.real, have, x[row.layer].shape[1])
    counts_RN, words = _counts(task, options)
    values, notes = _evaluate(name, rows, x, against, counts_RN, options.level, task.freedom)
    for row in rows:
        if words and row.metric not in notes:
            notes[row.metric] = [words]
        n, d = x[row.layer].shape
        if row.definition.against == "statistics" and n <= d:
            notes.setdefault(row.metric, []).append(
                f"{n} images are no more than the {d} features: the distance is far too large, "
                "compare it at this number of images only"
            )
    return {row.name: _score(row, network, values, against, notes, len(images)) for row in rows}


def _counts(task: Task, options: Options) -> tuple[np.ndarray | None, str]:
    """Of the bootstrap; and what their intervals are for, or why there are none, where that is not
    plain."""
    n, strata = len(task.generated), task.strata
    if not options.replicates:
        return None, ""
    try:
        counts_RN = bootstrap.resample_counts(n, options.replicates, options.seed, strata)
    except UserError as e:
        return None, f"no interval: {e}"
    return counts_RN, "interval: these subjects and prompts, other noise" if strata else ""


def _other_side(
    row: Row, network: Network, task: Task, options: Options, found: Mapping[str, Path],
    real: Mapping[str, np.ndarray], statistics: ReferenceStats | None,
) -> _Against:
    """What a row's metric takes beside the generated images' features."""
    kind = row.definition.against
    if kind == "captions":
        tower = _words(row.extractor, found)
        prefix = options.prefix if row.metric == "clip_score" else ""
        texts = [prefix + caption for caption in task.captions]
        value = features.of_texts(
            texts, tower.sentence, tower.hash, options.cache, f"{row.extractor}, captions"
        )
        words = f"their captions, {'prefix ' + repr(prefix) if prefix else 'without a prefix'}"
        return _Against(value, sha256_of([texts, tower.hash]), len(texts), words)
    if kind == "nothing":
        return _Against()
    if isinstance(task.real, Path):  # Statistics were read before.
        value = reference.load_features(task.real)
        return _Against(value, sha256_of(value), len(value), str(task.real))
    origin = references.origin_of(row.extractor, network.hash_of(row.layer), task.real)
    said = (references.hash_of(origin), origin.count, str(task.real.folder.root))
    if kind == "statistics":
        return _Against(statistics, *said)
    value = real[row.layer]
    return _Against((value, *task.subjects) if kind == "subjects" else value, *said)


def _evaluate(
    name: str, rows: Sequence[Row], x: Mapping[str, np.ndarray], against: Mapping[str, _Against],
    counts_RN: np.ndarray | None, level: float, freedom: int,
) -> tuple[dict[str, catalog.Score], dict[str, list[str]]]:
    """Values with intervals, and remarks on those that can have none."""
    generated = {row.definition.needs: x[row.layer] for row in rows}
    others = {metric: side.value for metric, side in against.items() if side.value is not None}

    def run(metrics: list[str], counts_RN: np.ndarray | None) -> dict[str, catalog.Score]:
        return catalog.evaluate(metrics, generated, others, counts_RN, level, freedom)

    metrics, notes = [row.metric for row in rows], {}
    with files.progress(len(rows), f"{name}, scores", "score") as bar:
        try:
            values = run(metrics, counts_RN)
        except UserError:
            values = {}
            for metric in metrics:
                try:
                    values |= run([metric], counts_RN)
                except UserError as e:
                    values |= run([metric], None)
                    notes[metric] = [f"no interval: {e}"]
        bar.update(len(rows))
    return values, notes


def _score(
    row: Row, network: Network, values: Mapping[str, catalog.Score],
    against: Mapping[str, _Against], notes: Mapping[str, list[str]], n: int,
) -> Score:
    value, side = values[row.metric], against[row.metric]
    remarks = [row.remark, value.remark, *notes.get(row.metric, ())]
    return Score(
        name=row.name, label=row.label, better=row.definition.better, value=value.value,
        interval=value.interval, n=n, extractor=network.hash_of(row.layer),
        features=network.describe(row.layer), resizer=EXTRACTORS[row.extractor].resizer,
        against=side.text, reference=side.hash, reference_n=side.count,
        remark="; ".join(filter(None, remarks)), source=row.definition.source,
        replicates_R=value.replicates_R,
    )
