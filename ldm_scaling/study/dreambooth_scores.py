"""How well members draw the subjects that they were taught: scores, records and grids."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import __version__, files
from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.data.subjects import Subject
from ldm_scaling.errors import first_line
from ldm_scaling.metrics import agreement, bootstrap, similarity
from ldm_scaling.parallel import hosts
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import evaluate, labels, records, reported, scores, sheet, weights
from ldm_scaling.study.dreambooth import Taught, load
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.materials import LAYER
from ldm_scaling.study.networks import tuned_hash
from ldm_scaling.study.records import Identity, Record
from ldm_scaling.study.scorer import AGREEMENT
from ldm_scaling.tasks.drawing import sampling_key

log = logging.getLogger(__name__)

PUBLISHED = ("dino", "clip_i", "clip_t")
SUBJECT = "subject_effnetlite0"
_SHOWN_PROMPTS = 6


@dataclasses.dataclass(frozen=True)
class Values:
    """One metric of a subject's pictures.

    Attributes:
      value: mean over them.
      replicates_R: of its bootstrap over the pictures of each prompt: for other noise. Empty of
        fewer than 4 pictures, or 1 of a prompt.
      freedom: degrees of freedom of the pictures: their number less that of prompts.
    """

    value: float
    replicates_R: np.ndarray
    freedom: int

    def plain(self) -> dict[str, Any]:
        """For JSON: the value and its 95% interval."""
        if not len(self.replicates_R):
            return {"value": self.value, "interval": None}
        return {"value": self.value,
                "interval": bootstrap.basic_interval(
                    self.value, self.replicates_R, self.freedom)}


def pooled(found: Sequence[Values]) -> Values:
    """The mean over subjects, of as many pictures each: for these subjects and prompts, and other
    noise. Replicate r draws in each prompt of each subject by itself, a stratified sample.
    """
    several = all(len(v.replicates_R) for v in found)
    # Each subject's replicates in an order of its own, or all would draw the same of them.
    rows = [
        np.random.default_rng(number).permutation(v.replicates_R)
        for number, v in enumerate(found)
    ] if several else []
    return Values(
        float(np.mean([v.value for v in found])),
        np.mean(rows, axis=0) if several else np.empty(0),
        sum(v.freedom for v in found),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of what is drawn for subjects. DINO, CLIP-I and CLIP-T where the folder of published
    weights has these networks; else cosines in features that come with the package, under names of
    their own, and not what papers report.

    Attributes:
      taught: the members.
      weights: the folder, or None.
    """

    taught: Taught
    weights: Path | None

    @property
    def published(self) -> bool:
        """Whether the networks that papers use are there."""
        needed = {w for row in scores.rows(PUBLISHED) for w in row.weights}
        return all(weights.find(self.weights, name) for name in needed)

    @functools.cached_property
    def reference_hash(self) -> str:
        """Of the subjects' pictures and prompts, and of what scores them."""
        m, t = self.taught.materials, self.taught
        by = [
            evaluate.hash_of(scores.rows(PUBLISHED), self._options) if self.published
            else m.feature_network.layer_hash(LAYER)
        ]
        if not (self.published or m.study.weights):
            by.append(m.scorer.probe.hash)
        return files.sha256_of(
            [[s.name, s.kind, s.images.hashes, s.prompts] for s in t.subjects] + [by, t.drawn_hash]
        )

    @property
    def _options(self) -> evaluate.Options:
        """How published networks score."""
        sweep = self.taught.materials.study.sweep
        return evaluate.Options(
            self.weights, Path(self.taught.materials.workdir / "features" / "dreambooth"),
            sweep.replicates, sweep.report_block,
        )

    def _replicates(self, values_N: np.ndarray, texts: Sequence[str]) -> Values:
        values_N, n = np.asarray(values_N, np.float64), len(values_N)
        value, freedom = float(values_N.mean()), n - len(set(texts))
        if n < 4 or self.taught.config.images_per_prompt < 2:
            return Values(value, np.empty(0), freedom)
        sweep = self.taught.materials.study.sweep
        counts_RN = bootstrap.resample_counts(n, sweep.replicates, sweep.report_block, texts)
        return Values(value, bootstrap.mean_replicates(values_N, counts_RN), freedom)

    def of(self, subject: Subject, drawn: Sequence[epath.Path]) -> dict[str, Values]:
        """Metric to its values, of pictures drawn for a subject's prompts, in their order."""
        texts = np.repeat(
            self.taught.captions(subject, word=False), self.taught.config.images_per_prompt
        ).tolist()
        if self.published:
            return self._published(subject, drawn, texts)
        m = self.taught.materials

        def features(images: np.ndarray) -> np.ndarray:
            return m.feature_network.features(images)[LAYER]

        x_ND = features(np.stack([load(path) for path in drawn]))
        real_MD = features(subject.pictures(m.study.data.side))
        out = {SUBJECT: self._replicates(similarity.subject_cosines(x_ND, real_MD), texts)}
        if not m.study.weights:  # The probe knows the study's own pictures and captions.
            embeddings = m.text_encoder.sentence(texts)
            agreed_N = agreement.score(m.scorer.probe, x_ND, embeddings)
            out[AGREEMENT] = self._replicates(agreed_N, texts)
        return out

    def _published(
        self, subject: Subject, drawn: Sequence[epath.Path], texts: list[str]
    ) -> dict[str, Values]:
        images = ImageFolder(Path(drawn[0].parent), tuple(path.name for path in drawn))
        of = (subject.name,)
        task = evaluate.Task(
            ImageSet(images), ImageSet(subject.images), tuple(texts),
            (of * len(images), of * len(subject.images)),
        )
        return {
            score.name: Values(
                score.value, np.empty(0) if score.replicates_R is None else score.replicates_R,
                task.freedom,
            )
            for score in evaluate.score(scores.rows(PUBLISHED), task, self._options)
        }

    # What is kept.

    def path(self, member: str) -> epath.Path:
        """Where a member's scores lie."""
        folder = self.taught.root / member
        return folder / f"scores_{self.reference_hash[:8]}.json"

    def remember(self) -> None:
        """Keeps which these are of those that the folder comes to hold: figures show the last."""
        files.atomic_write_text(
            self.taught.root / reported.LAST_SCORED, self.reference_hash + "\n")

    def member(self, member: str) -> dict[str, Any]:
        """Draws and scores what is missing of a member, keeps it as JSON and, of the taught one, as
        a record; returns the scores. The pictures must be drawn, see `Taught.drawn`; in one
        process."""
        path = self.path(member)
        record = records.path_of(self._records, self.identity(member).key)
        if record.exists() and (kept := _kept(path)) is not None:
            return kept
        found: dict[str, dict[str, dict[str, Values]]] = {}
        subjects = self.taught.subjects
        with files.progress(2 * len(subjects), f"{member}, scores", "subject") as bar:
            for when, after in (("before", False), ("after", True)):
                for subject in subjects:
                    drawn = self.taught.drawn(member, subject, after)
                    found.setdefault(when, {})[subject.name] = self.of(subject, drawn)
                    bar.update()
        names = list(found["after"][subjects[0].name])
        means = {
            when: {n: pooled([own[n] for own in by.values()]) for n in names}
            for when, by in found.items()
        }
        plain = {
            when: {
                "mean": {n: v.plain() for n, v in means[when].items()},
                "subjects": {s: {n: v.plain() for n, v in own.items()} for s, own in by.items()},
            }
            for when, by in found.items()
        }
        files.write_json(path, plain)
        records.write(self._records, self._record(member, means["after"]))
        return plain

    def words(self, member: str) -> str:
        """A member's scores in a line, drawn and scored if need be."""
        found = self.member(member)

        def said(when: str, name: str) -> str:
            one = found[when]["mean"][name]
            sure = labels.interval(*one["interval"]) if one["interval"] and when == "after" else ""
            return f"{labels.number(one['value'])} {sure}".strip()

        parts = [
            f"{labels.measure(name).short} {said('after', name)}, {said('before', name)} before"
            for name in found["after"]["mean"]
        ]
        return f"{member}: {'; '.join(parts)}"

    def grid_name(self, subject: Subject) -> str:
        """Of a subject's grid: what it shows decides it."""
        t = self.taught
        members = t.materials.study.members
        digest = files.sha256_of([t.config.hash, t.drawn_hash, subject.images.hashes, members])
        return f"dreambooth_{subject.name}_{digest[:8]}"

    @property
    def _records(self) -> epath.Path:
        return self.taught.materials.workdir / "records"

    def identity(self, member: str) -> Identity:
        """Of a taught member's record."""
        study, t = self.taught.materials.study, self.taught
        sample = t.config.sample
        count = sum(len(s.prompts) for s in t.subjects) * t.config.images_per_prompt
        return Identity(
            model=member,
            model_hash=tuned_hash(study, member, t.config),
            train_step=t.config.train.steps,
            sampler=solvers.canonical(sample.sampler),
            steps=sample.steps,
            spacing=solvers.spacing_of(sample.sampler, sample.spacing),
            guidance=sample.guidance,
            seed_block=study.sweep.report_block,
            num_images=count,
            reference_hash=self.reference_hash,
            version=__version__,
        )

    def _record(self, member: str, means: dict[str, Values]) -> Record:
        m = self.taught.materials
        spent, reference = (m.cost(m.spec(n)) for n in (member, m.study.reference))
        sure = {n: v for n, v in means.items() if len(v.replicates_R)}
        centred = {n: bootstrap.centre(v.value, v.replicates_R) for n, v in sure.items()}
        sample, drawer = self.taught.config.sample, self.taught.drawer(member)
        table = drawer.table(sample.sampler, sample.steps, sample.spacing)
        short = drawer.table(sample.sampler, min(sample.steps, 4), sample.spacing)
        one = Configuration(short, sample.guidance, np.zeros(1, np.int32), np.zeros(1, np.int32))
        row, decode = drawer.seconds(
            m.member_params(member), one, m.states([""]), sampling_key(m.study.seed)
        )
        return Record(
            identity=self.identity(member),
            base_channels=m.spec(member).base_channels,
            params=spent.params,
            gflops=spent.gflops,
            norm_cost=spent.gflops / reference.gflops,
            calls=table.calls,
            metrics={n: v.value for n, v in means.items()},
            intervals={n: bootstrap.interval(c, sure[n].freedom) for n, c in centred.items()},
            replicates={n: [float(f"{x:.7g}") for x in c] for n, c in centred.items()},
            seconds_per_image=table.calls * row + decode,
            device=hosts.describe(list(drawer.mesh.devices.flat)),
            task="dreambooth",
            setting=self.taught.config.setting,
            guided_calls=table.guided_calls,
        )


def _kept(path: epath.Path) -> dict[str, Any] | None:
    """The scores that a file holds; None where there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text())
        _ = [dict(kept[when]["mean"]) for when in ("before", "after")]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as e:
        log.warning("%s is damaged (%s): the pictures are scored anew", path, first_line(e))
        return None
    return kept


# --- grids ------------------------------------------------------------------------------------


def grid(taught: Taught, members: Sequence[str], subject: Subject) -> np.ndarray:
    """A labelled grid, uint8 (H, W, 3): a subject's pictures, and what each member draws for its
    prompts before and after it is taught, with the same noise (the paper's Fig. 6)."""
    side, each = taught.materials.study.data.side, taught.config.images_per_prompt
    real = subject.pictures(side)
    columns = {}
    for member in members:
        for when, after in (("before", False), ("taught", True)):
            columns[f"{member}, {when}"] = taught.drawn(member, subject, after)
    texts, rows = taught.captions(subject, word=True), []
    for p in range(min(len(texts), _SHOWN_PROMPTS)):
        cells = [real[p % len(real)][None]]
        cells += [
            image_folder.square(load(paths[p * each]), side)[None]
            for paths in columns.values()
        ]
        heads = () if rows else ("the subject", *columns)
        rows.append(sheet.Row(cells, (f"“{texts[p]}”",), heads))
    sample, c = taught.config.sample, taught.config
    how = f"LoRA of rank {c.lora_rank}" if c.lora_rank else "all parameters"
    prior = f"{c.class_images} pictures of the class" if c.prior_weight else "without prior"
    about = (
        f"{labels.steps(c.train.steps)} of {how}"
        f"{', text encoder too' if c.train_text_encoder else ''} · {prior} · "
        f"{labels.sampler(sample.sampler)}, {labels.steps(sample.steps)} · "
        f"guidance {sample.guidance:g}"
    )
    title = f"DreamBooth: {subject.name} ({subject.kind})"
    return np.asarray(sheet.draw(sheet.Sheet(title, about, rows)))
