"""The sweep: every (sampler, steps, guidance) of a model, with common prompts and noise."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_scaling import __version__, files, pictures
from ldm_scaling.config import Study
from ldm_scaling.metrics import agreement, bootstrap
from ldm_scaling.metrics.agreement import Probe
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.models import zoo
from ldm_scaling.models.cost import Cost
from ldm_scaling.parallel import hosts
from ldm_scaling.study import curves, records
from ldm_scaling.study.records import Identity, Record
from ldm_scaling.tasks.text_to_image import Drawer

log = logging.getLogger(__name__)

FRECHET = "fd_effnetlite0"
AGREEMENT = "caption_agreement"
STRIP = 8


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Turns pictures and their captions into metrics.

    Attributes:
      features: `features(uint8 pictures) -> (N, D)`.
      reference: statistics of real pictures.
      probe: caption probe.
      replicates: bootstrap replicates where asked for.
    """

    features: Callable[[np.ndarray], np.ndarray]
    reference: ReferenceStats
    probe: Probe
    replicates: int

    @property
    def hash(self) -> str:
        """Hash of all that decides a metric's value for given pictures."""
        return files.sha256_of([self.reference.hash, self.probe.hash])

    def score(self, images_NHWC: np.ndarray, embeddings_NE: np.ndarray, seed: int | None):
        """(metrics, intervals, replicates); the latter two are empty where `seed` is None."""
        x_ND = self.features(images_NHWC)
        scores_N = agreement.score(self.probe, x_ND, embeddings_NE)
        metrics = {
            FRECHET: frechet_from_features(x_ND, self.reference),
            AGREEMENT: float(np.mean(scores_N)),
        }
        if seed is None:
            return metrics, {}, {}
        counts_RN = bootstrap.resample_counts(len(x_ND), self.replicates, seed)
        drawn = {
            FRECHET: bootstrap.frechet_replicates(x_ND, self.reference, counts_RN),
            AGREEMENT: bootstrap.mean_replicates(scores_N, counts_RN),
        }
        centred = {k: bootstrap.centre(metrics[k], v) for k, v in drawn.items()}
        intervals = {k: bootstrap.percentile_interval(v) for k, v in centred.items()}
        # Seven digits are more than 200 replicates can tell; the records stay small.
        return metrics, intervals, {k: [float(f"{x:.7g}") for x in v] for k, v in centred.items()}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A seed block: which captions, and which noise.

    Attributes:
      index_N: index into the validation split; noise is drawn by it too.
      context_NLD: text states of the captions.
      embeddings_NE: their sentence embeddings.
      captions: the captions themselves.
    """

    index_N: np.ndarray
    context_NLD: np.ndarray
    embeddings_NE: np.ndarray
    captions: tuple[str, ...]


def block_indices(block: int, size: int, total: int, seed: int) -> np.ndarray:
    """Indices of a block's prompts: blocks are disjoint parts of one permutation."""
    order = np.random.default_rng([seed, 20240401]).permutation(total)
    return order[block * size : (block + 1) * size]


def _identities(
    study: Study, member: str, block: int, reference_hash: str, guidance: Callable
) -> list[Identity]:
    out = []
    for name in study.sweep.samplers:
        for steps in study.sweep.steps:
            if steps > study.sweep.max_steps.get(name, steps):
                continue
            for w in guidance(name, steps):
                out.append(
                    Identity(
                        model=member,
                        model_hash=files.sha256_of(
                            [study.training_hash(member), zoo.get(member).spec]
                        ),
                        train_step=study.train.steps,
                        sampler=name,
                        steps=steps,
                        spacing=study.sweep.spacing,
                        guidance=w,
                        seed_block=block,
                        num_images=study.sweep.num_images,
                        reference_hash=reference_hash,
                        version=__version__,
                    )
                )
    return out


def selection(study: Study, member: str, reference_hash: str) -> list[Identity]:
    """The records that guidance is chosen on: the full grid on the selection block."""
    return _identities(
        study, member, study.sweep.select_block, reference_hash, lambda *_: study.sweep.guidance
    )


def reporting(
    study: Study, member: str, reference_hash: str, chosen: list[Record]
) -> list[Identity]:
    """The records that are reported: the chosen guidance of each cell on the report block."""
    best = curves.best_guidance(chosen, FRECHET, study.sweep.select_block)
    return _identities(
        study, member, study.sweep.report_block, reference_hash,
        lambda name, steps: (best[member, name, steps],),
    )


def planned(study: Study, member: str) -> int:
    """How many records a member gets, over both blocks."""
    cells = len(_identities(study, member, 0, "", lambda *_: (1.0,)))
    return cells * (len(study.sweep.guidance) + 1)


def work(study: Study, cost: Cost, identity: Identity) -> float:
    """GFLOPs of a record: every picture's steps, about doubled by guidance, and one step's worth
    of decoding and scoring. What time left is reckoned by."""
    return (2 * identity.steps + 1) * cost.gflops * study.sweep.num_images


def planned_work(study: Study, member: str, cost: Cost) -> float:
    """`work` of all records that a member gets."""
    cells = _identities(study, member, 0, "", lambda *_: (1.0,))
    return (len(study.sweep.guidance) + 1) * sum(work(study, cost, i) for i in cells)


def existing(
    study: Study, member: str, reference_hash: str, directory: epath.Path
) -> list[Record]:
    """The records of this config that are there, of both blocks."""

    def there(identities: list[Identity]) -> list[Record]:
        paths = [records.path_of(directory, i.key) for i in identities]
        return [records.read(p) for p in paths if p.exists()]

    first = selection(study, member, reference_hash)
    chosen = there(first)
    if len(chosen) < len(first):
        return chosen
    return chosen + there(reporting(study, member, reference_hash, chosen))


def run_member(
    study: Study, member: str, cost: Cost, reference_cost: Cost, params: Any, drawer: Drawer,
    scorer: Scorer, prompts: Callable[[int], Prompts], directory: epath.Path,
    strips: epath.Path, bar,
) -> list[Record]:
    """Measures what is missing of a member, and returns all its records.

    Args:
      study: the config.
      member: its name.
      cost, reference_cost: of the member, and of the member whose cost is 1.
      params: its averaged parameters.
      drawer: draws with its network.
      scorer: scores pictures.
      prompts: block -> prompts.
      directory: where records lie.
      strips: where the first pictures of each configuration go.
      bar: progress in GFLOPs, see `work`.
    """
    key = jax.random.key(study.seed)
    first = selection(study, member, scorer.hash)
    warm = False

    def measure(identity: Identity) -> None:
        nonlocal warm
        block = prompts(identity.seed_block)
        table = drawer.table(identity.sampler, identity.steps, identity.spacing)
        if not warm:  # Compilation is not part of the measured seconds.
            n = drawer.batch_size
            drawer.pictures(
                params, table, block.context_NLD[:n], identity.guidance, key, block.index_N[:n]
            )
            warm = True
        start = time.perf_counter()
        images = drawer.pictures(
            params, table, block.context_NLD, identity.guidance, key, block.index_N
        )
        seconds = time.perf_counter() - start
        seed = identity.seed_block if identity.seed_block == study.sweep.report_block else None
        metrics, intervals, replicates = scorer.score(images, block.embeddings_NE, seed)
        pictures.save_png(strips / f"{identity.key}.png", np.concatenate(images[:STRIP], axis=1))
        spec = zoo.get(member).spec
        records.write(
            directory,
            Record(
                identity=identity,
                base_channels=spec.base_channels,
                params=cost.params,
                gflops=cost.gflops,
                norm_cost=cost.gflops / reference_cost.gflops,
                calls=table.calls,
                metrics=metrics,
                intervals=intervals,
                replicates=replicates,
                seconds_per_image=seconds / len(images),
                device=hosts.describe(),
            ),
        )

    def complete(identities: list[Identity]) -> list[Record]:
        for identity in records.missing(directory, identities):
            bar.set_postfix_str(
                f"{member} {identity.sampler} {identity.steps} steps w={identity.guidance:g}",
                refresh=False,
            )
            measure(identity)
            bar.update(round(work(study, cost, identity)))
        return [records.read(records.path_of(directory, i.key)) for i in identities]

    chosen = complete(first)
    return chosen + complete(reporting(study, member, scorer.hash, chosen))
