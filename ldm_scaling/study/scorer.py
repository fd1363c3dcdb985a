"""From pictures and captions to metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ldm_scaling import files
from ldm_scaling.config.measuring import FRECHET
from ldm_scaling.metrics import agreement, bootstrap, foretold
from ldm_scaling.metrics.agreement import Probe
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features

AGREEMENT = "caption_agreement"


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

    def score(
        self, x_ND: np.ndarray, embeddings_NE: np.ndarray, seed: int | None, images: int = 0
    ):
        """(metrics, intervals, replicates) of pictures with these features and captions; the
        latter two are empty where `seed` is None.

        With `images` the distance is the one foretold for so many, see `metrics.foretold`; it needs
        a seed.
        """
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
        if images:
            halves = float(drawn[FRECHET].mean())
            metrics[FRECHET] = foretold.foretold(
                metrics[FRECHET], halves, len(x_ND), images, self.reference
            )
        return with_intervals(metrics, drawn, len(x_ND))


def with_intervals(metrics: dict[str, float], drawn: dict[str, np.ndarray], images: int):
    """(metrics, intervals, replicates) of metrics of so many images and what bootstraps drew of
    them, which is moved to lie about them."""
    centred = {k: bootstrap.centre(metrics[k], v) for k, v in drawn.items()}
    intervals = {k: bootstrap.interval(v, images - 1) for k, v in centred.items()}
    return metrics, intervals, {k: rounded(v) for k, v in centred.items()}


def rounded(replicates_R: np.ndarray) -> list[float]:
    """Replicates as records keep them: seven digits are more than 200 of them can tell."""
    return [float(f"{x:.7g}") for x in replicates_R]
