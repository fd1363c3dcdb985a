"""From pictures and the real ones that they should be to metrics: of super-resolution and other
tasks that restore an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ldm_scaling import files
from ldm_scaling.config.measuring import RESTORED
from ldm_scaling.metrics import bootstrap, fidelity, inception_score
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.study.scorer import FRECHET, with_intervals

LPIPS, PSNR, SSIM, LABELS = RESTORED
_PAIRED = (LPIPS, PSNR, SSIM)
# As many as the inception score has, for as few pictures as there may be.
_SPLITS = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PairedScorer:
    """Turns pictures and their real ones into metrics.

    Attributes:
      trunk_and_logits: uint8 pictures -> features (N, D), class logits (N, C).
      perceptual: two sets of uint8 pictures -> distances (N,).
      reference: statistics of real pictures' features.
      labels_hash, perceptual_hash: of all that decides logits and distances.
      replicates: bootstrap replicates where asked for.
      pasted: whether what networks saw of a picture has been put back into it, as `restore` does.
      collections: that the pictures are of; each one's conditions are its own.
    """

    trunk_and_logits: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray]
    reference: ReferenceStats
    labels_hash: str
    perceptual_hash: str
    replicates: int
    pasted: bool = False
    collections: int = 1

    @property
    def hash(self) -> str:
        """Hash of all that decides a metric's value for given pictures."""
        more = ["pasted"] if self.pasted else []
        if self.collections > 1:  # Before it was told, two had the same conditions.
            more.append(f"{self.collections} collections")
        return files.sha256_of(
            [self.reference.hash, self.labels_hash, self.perceptual_hash, *more])

    def features(self, images_NHWC: np.ndarray, real_NHWC: np.ndarray) -> np.ndarray:
        """What `score` needs of pictures, uint8, and of the real ones in the same order: float32
        (N, 3 + C + D)."""
        trunk_ND, logits_NC = self.trunk_and_logits(images_NHWC)
        paired_N3 = np.stack(
            [
                self.perceptual(images_NHWC, real_NHWC),
                np.minimum(fidelity.psnr(images_NHWC, real_NHWC), fidelity.MOST_PSNR),
                fidelity.ssim(images_NHWC, real_NHWC),
            ],
            axis=1,
        )
        return np.concatenate([paired_N3, logits_NC, trunk_ND], axis=1, dtype=np.float32)

    def score(
        self, x_NF: np.ndarray, embeddings_NE: np.ndarray, seed: int | None, images: int = 0
    ):
        """(metrics, intervals, replicates) of pictures of which `features` says this; the latter
        two are empty where `seed` is None.

        Args:
          x_NF: of `features`.
          embeddings_NE: of captions, which are not looked at.
          seed: of the replicates.
          images: has no meaning here: nothing races.
        """
        del embeddings_NE
        if images:
            raise ValueError("restored pictures do not race")
        width = self.reference.moments.mean_D.size
        paired = dict(zip(_PAIRED, x_NF[:, : len(_PAIRED)].T))
        logits_NC, trunk_ND = x_NF[:, len(_PAIRED) : -width], x_NF[:, -width:]
        metrics = {
            FRECHET: frechet_from_features(trunk_ND, self.reference),
            **{name: float(np.mean(values, dtype=np.float64)) for name, values in paired.items()},
            LABELS: inception_score.inception_score(logits_NC, splits=_SPLITS).value,
        }
        if seed is None:
            return metrics, {}, {}
        counts_RN = bootstrap.resample_counts(len(x_NF), self.replicates, seed)
        drawn = {
            FRECHET: bootstrap.frechet_replicates(trunk_ND, self.reference, counts_RN),
            **{name: bootstrap.mean_replicates(v, counts_RN) for name, v in paired.items()},
            LABELS: inception_score.inception_score_replicates(
                logits_NC, counts_RN, splits=_SPLITS
            ),
        }
        return with_intervals(metrics, drawn, len(x_NF))
