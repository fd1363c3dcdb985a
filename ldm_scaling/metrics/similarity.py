"""Cosines between embeddings: CLIP score, and DreamBench's CLIP-I, CLIP-T and DINO.

All give one number per generated image, so that their mean and its interval are those of any mean:
`bootstrap.mean_replicates`.
"""

from __future__ import annotations

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.frechet import check_widths


def unit_rows(embeddings_NE: np.ndarray, what: str) -> np.ndarray:
    """Rows at length 1, float64. Raises `UserError` for a row of zeros or not finite."""
    embeddings_NE = arrays.rows(embeddings_NE, what)
    length_N1 = np.linalg.norm(embeddings_NE, axis=1, keepdims=True)
    if not length_N1.all():
        raise UserError(
            f"{what} hold a row of zeros, row {int(length_N1.argmin())}, which has no direction: "
            "check the network"
        )
    return embeddings_NE / length_N1


def pair_cosines(images_NE: np.ndarray, texts_NE: np.ndarray) -> np.ndarray:
    """Cosine (N,) of each image's embedding with its own caption's: CLIP-T, CLIP score.

    CLIP score is Hessel et al.'s (2021) without their factor 2.5 and their cut at 0. Papers on
    text-to-image models mostly give its mean (.25 to .33); torchmetrics gives max(100 x mean, 0).

    Raises:
      UserError: when the shapes differ, a value is not finite or a row is zero.
    """
    images_NE = unit_rows(images_NE, "embeddings of the images")
    texts_NE = unit_rows(texts_NE, "embeddings of the captions")
    check_widths(images_NE.shape[1], texts_NE.shape[1])
    if len(images_NE) != len(texts_NE):
        raise UserError(
            f"{len(images_NE)} images and {len(texts_NE)} captions: a pair needs one of each"
        )
    return (images_NE * texts_NE).sum(axis=1)


def subject_cosines(
    generated_NE: np.ndarray,
    real_ME: np.ndarray,
    generated_subjects_N: np.ndarray | None = None,
    real_subjects_M: np.ndarray | None = None,
) -> np.ndarray:
    """Mean cosine (N,) of each generated image with all real images of its subject.

    CLIP-I with CLIP image embeddings, DINO with DINO ViT-S/16's class token (Ruiz et al. 2023,
    section 4.2: the average pairwise cosine between generated and real images). Its mean is
    theirs where every subject has as many generated images.

    Args:
      generated_NE: embeddings of the generated images.
      real_ME: embeddings of the real images.
      generated_subjects_N: subject of each generated image; all are of one where both are None.
      real_subjects_M: subject of each real image.

    Raises:
      UserError: when widths or lengths differ, or a subject has no real image.
    """
    generated_NE = unit_rows(generated_NE, "embeddings of the generated images")
    real_ME = unit_rows(real_ME, "embeddings of the real images")
    check_widths(generated_NE.shape[1], real_ME.shape[1])
    if (generated_subjects_N is None) != (real_subjects_M is None):
        raise UserError("subjects are named on one side only: name them on both or on neither")
    if generated_subjects_N is None:
        generated_subjects_N, real_subjects_M = np.zeros(len(generated_NE)), np.zeros(len(real_ME))
    generated_subjects_N, real_subjects_M = map(np.asarray, (generated_subjects_N, real_subjects_M))
    if (len(generated_subjects_N), len(real_subjects_M)) != (len(generated_NE), len(real_ME)):
        raise UserError(
            f"{len(generated_NE)} generated and {len(real_ME)} real images have "
            f"{len(generated_subjects_N)} and {len(real_subjects_M)} subjects: name one for each"
        )
    values_N = np.empty(len(generated_NE))
    for subject in np.unique(generated_subjects_N):
        mine_M = real_subjects_M == subject
        if not mine_M.any():
            raise UserError(f"subject {subject} has generated images and no real one: add some")
        its_N = generated_subjects_N == subject
        # The mean of cosines with unit vectors is the product with their mean.
        values_N[its_N] = generated_NE[its_N] @ real_ME[mine_M].mean(axis=0)
    return values_N
