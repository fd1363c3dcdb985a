"""Inception score: how sure the classifier is of each image, and how varied the classes are."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.metrics.bootstrap import check_counts

SHUFFLE_SEED = 2020
"""Of torch-fidelity's order of images (its defaults `samples_shuffle` and `rng_seed`)."""


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """An inception score.

    Attributes:
      value: mean over splits of exp(mean KL(p(class | image) || p(class))); at least 1.
      std: its standard deviation over splits (divisor `splits`), as the field reports it.
      splits: how many.
    """

    value: float
    std: float
    splits: int


def _prepare(
    logits_NC: np.ndarray, splits: int, shuffle_seed: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class probabilities (N, C), their negative entropies (N,), and the images' order (N,)."""
    logits_NC = arrays.rows(logits_NC, "class logits")
    n = len(logits_NC)
    if not 1 <= splits <= n:
        raise UserError(
            f"an inception score over {splits} splits needs at least {max(splits, 1)} images, "
            f"there are {n}: use 1 split, or more images"
        )
    log_NC = scipy.special.log_softmax(logits_NC, axis=1)
    p_NC = np.exp(log_NC)
    order_N = np.arange(n)
    if shuffle_seed is not None:
        order_N = np.random.RandomState(shuffle_seed).permutation(n)
    return p_NC, (p_NC * log_NC).sum(axis=1), order_N


def _scores(
    p_NC: np.ndarray, negentropy_N: np.ndarray, order_N: np.ndarray, splits: int
) -> np.ndarray:
    """Score of each split (S,) of the images `order_N`, an index that may repeat."""
    n = len(order_N)
    weight_SN = np.zeros((splits, len(p_NC)))
    for s in range(splits):
        part = order_N[s * n // splits : (s + 1) * n // splits]
        weight_SN[s] = np.bincount(part, minlength=len(p_NC)) / len(part)
    q_SC = weight_SN @ p_NC
    # Mean KL = mean negative entropy - negative entropy of the mean: one product a split.
    return np.exp(weight_SN @ negentropy_N - scipy.special.xlogy(q_SC, q_SC).sum(axis=1))


def inception_score(
    logits_NC: np.ndarray, *, splits: int = 10, shuffle_seed: int | None = None
) -> InceptionScore:
    """Inception score (Salimans et al. 2016) in float64.

    The field's values are over the 1008 outputs of the 2015-12-05 graph's last product, its bias
    left out. Ten splits of 5,000 images each are usual: the score grows with the split's size, so
    values of other numbers of images or splits do not compare.

    Args:
      logits_NC: class logits (N, C) before the softmax.
      splits: consecutive parts whose scores are averaged.
      shuffle_seed: order of the images before splitting; `SHUFFLE_SEED` is torch-fidelity's
        (`metric_isc.py`, numpy's frozen `RandomState`). None keeps theirs, as the authors do, for
        images in no order: of folders by class, each split would hold a tenth of the classes.

    Raises:
      UserError: when there are fewer images than splits or a value is not finite.
    """
    values_S = _scores(*_prepare(logits_NC, splits, shuffle_seed), splits)
    return InceptionScore(float(values_S.mean()), float(values_S.std()), splits)


def inception_score_replicates(
    logits_NC: np.ndarray,
    counts_RN: np.ndarray,
    *,
    splits: int = 10,
    shuffle_seed: int | None = None,
) -> np.ndarray:
    """Replicates (R,) of `inception_score`: image i counted `counts_RN[r, i]` times.

    The score grows with a split's size, by much where there are many classes, and its spread grows
    with it. So a replicate scores the images that it counts in splits of the size that those of all
    images have, half as many for half of the images, and all are then multiplied by what brings
    their mean to the score of all images: one split cannot be halved. `bootstrap.centre` them.

    Simulated with 300 classes, 600 images and 10 splits, 95% intervals hold the expected score in
    95% of trials, with one split in 95%, with one split of 256 images and 1,000 classes in 88%
    (75, 92 and 75% in as many splits as all images and not multiplied).

    Raises:
      UserError: as `inception_score`, and when a replicate counts no image.
    """
    p_NC, negentropy_N, order_N = _prepare(logits_NC, splits, shuffle_seed)
    value = _scores(p_NC, negentropy_N, order_N, splits).mean()
    counts_RN = check_counts(counts_RN, len(order_N))
    raw = []
    for counts_N in counts_RN:
        counted = np.repeat(order_N, counts_N[order_N])
        own = max(1, round(splits * len(counted) / len(order_N)))
        raw.append(_scores(p_NC, negentropy_N, counted, own).mean())
    return value * np.array(raw) / np.mean(raw)
