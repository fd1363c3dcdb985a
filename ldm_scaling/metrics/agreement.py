"""Caption agreement: does a picture's content point where its caption points?

A ridge regression, the probe, maps features of a pretrained image network to sentence embeddings
of a pretrained text network; it is fitted in closed form on real pairs. A picture's score is the
cosine between its predicted embedding and its caption's, both about the training mean, so that
pairs that do not belong together score about 0.

**This is not a CLIP score**: no network here was trained to align pictures with text beyond the
few thousand pairs of the fit, values depend on those pairs, and they compare only with values of
the same probe (its `hash` says which). Real pairs that the fit has not seen give the level to
hold values against: see `sanity`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays

_KIND = "caption-agreement probe"
_ARRAYS = ("feature_mean_D", "feature_scale_D", "weight_DE", "embedding_mean_E")
_RIDGES = tuple(float(r) for r in np.logspace(-4, 3, 29))
_HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe: predicted embedding = ((x - mean) / scale) @ weight, about the mean's.

    Attributes:
      feature_mean_D: mean of the training features.
      feature_scale_D: their standard deviation, 1 where a feature never varies.
      weight_DE: ridge solution on standardised features and centred embeddings.
      embedding_mean_E: mean of the training embeddings.
      ridge: chosen lambda over the number of pairs.
      held_out_score: mean score that chose it, on pairs held out of that fit.
      pairs: how many pairs it was fitted on.
      extractor: hash of the image network, its weights and its input transform.
      encoder: hash of the text network and its weights.
    """

    feature_mean_D: np.ndarray
    feature_scale_D: np.ndarray
    weight_DE: np.ndarray
    embedding_mean_E: np.ndarray
    ridge: float
    held_out_score: float
    pairs: int
    extractor: str
    encoder: str

    def __post_init__(self):
        for name in _ARRAYS:
            object.__setattr__(self, name, arrays.freeze(getattr(self, name)))
        shape = self.weight_DE.shape
        d, e = self.feature_mean_D.shape, self.embedding_mean_E.shape
        if shape != d + e or self.feature_scale_D.shape != d:
            raise UserError(f"a probe from {d} to {e} cannot have a weight of shape {shape}")
        if not all(np.isfinite(getattr(self, name)).all() for name in _ARRAYS):
            raise UserError("the probe's values are not finite: fit it anew")

    @property
    def _meta(self) -> dict[str, float | int | str]:
        names = ("ridge", "held_out_score", "pairs", "extractor", "encoder")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def hash(self) -> str:
        """Hash of all that decides its scores."""
        return arrays.content_hash({name: getattr(self, name) for name in _ARRAYS}, self._meta)

    def predict(self, features_ND: np.ndarray) -> np.ndarray:
        """Embeddings (N, E) that the features (N, D) speak for, about the training mean."""
        features_ND = arrays.rows(features_ND, "features")
        if features_ND.shape[1] != len(self.feature_mean_D):
            raise UserError(
                f"the probe was fitted on features of width {len(self.feature_mean_D)}, these "
                f"have {features_ND.shape[1]}: use the same feature network"
            )
        return ((features_ND - self.feature_mean_D) / self.feature_scale_D) @ self.weight_DE

    def centred(self, embeddings_NE: np.ndarray) -> np.ndarray:
        """Caption embeddings (N, E) about the training mean."""
        embeddings_NE = arrays.rows(embeddings_NE, "caption embeddings")
        if embeddings_NE.shape[1] != len(self.embedding_mean_E):
            raise UserError(
                f"the probe was fitted on embeddings of width {len(self.embedding_mean_E)}, "
                f"these have {embeddings_NE.shape[1]}: use the same text encoder"
            )
        return embeddings_NE - self.embedding_mean_E


@dataclasses.dataclass(frozen=True)
class Sanity:
    """What the probe makes of real pairs it was not fitted on.

    Attributes:
      pairs: how many.
      score: mean score of the true pairs: the level for generated pictures.
      mismatched: mean score of every picture with every other pair's caption; about 0.
      top1: share of pictures that prefer their caption, in meaning, to all others'; of captions
        that a picture likes equally each has its part of the places that they take.
      top5: share whose caption is among the five best.
      chance1: what `top1` would be by guessing, 1 over the number of distinct captions.
    """

    pairs: int
    score: float
    mismatched: float
    top1: float
    top5: float
    chance1: float


def _unit(rows_NE: np.ndarray) -> np.ndarray:
    """Rows at length 1; a row of zeros, which points nowhere, stays zero and scores 0."""
    length_N1 = np.linalg.norm(rows_NE, axis=1, keepdims=True)
    return np.divide(rows_NE, length_N1, out=np.zeros_like(rows_NE), where=length_N1 > 0)


def _standards(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean_D, scale_D = features_ND.mean(axis=0), features_ND.std(axis=0)
    # A feature that never varies has a deviation of pure rounding: dividing would amplify it.
    still_D = scale_D <= 1e-9 * np.maximum(np.abs(features_ND).max(axis=0), 1e-300)
    return mean_D, np.where(still_D, 1.0, scale_D)


class _Ridge:
    """Every lambda's solution from one eigendecomposition of the standardised features' Gram."""

    def __init__(self, features_ND: np.ndarray, embeddings_NE: np.ndarray):
        self.n = len(features_ND)
        self.mean_D, self.scale_D = _standards(features_ND)
        self.embedding_mean_E = embeddings_NE.mean(axis=0)
        z_ND = (features_ND - self.mean_D) / self.scale_D
        gram_DD = z_ND.T @ z_ND
        with arrays.one_blas_thread():
            values_D, self.vectors_DD = np.linalg.eigh(gram_DD)
        self.values_D = np.clip(values_D, 0.0, None)
        self.target_DE = self.vectors_DD.T @ (z_ND.T @ (embeddings_NE - self.embedding_mean_E))

    def weight(self, ridge: float) -> np.ndarray:
        """(Z^T Z + ridge n I)^-1 Z^T E."""
        return self.vectors_DD @ (self.target_DE / (self.values_D + ridge * self.n)[:, None])


def _held_out(groups_N: np.ndarray, seed: int) -> np.ndarray:
    """Mask (N,) of the pairs, in whole groups, that choose lambda."""
    names, index_N = np.unique(groups_N, return_inverse=True)
    if len(names) < 5:
        raise UserError(
            f"the caption-agreement probe needs pairs of at least 5 groups, there are "
            f"{len(names)}: give it more training pairs"
        )
    chosen = np.random.default_rng(seed).permutation(len(names))
    return np.isin(index_N, chosen[: max(1, round(_HELD_OUT * len(names)))])


def fit(
    features_ND: np.ndarray,
    embeddings_NE: np.ndarray,
    *,
    groups_N: np.ndarray | None = None,
    extractor: str = "",
    encoder: str = "",
    seed: int = 0,
) -> Probe:
    """Fits the probe on real training pairs, in float64.

    lambda is the one of a fixed log grid whose fit on 80% of the groups gives the best mean score
    on the rest; the final fit takes all pairs with it.

    Args:
      features_ND: image features (N, D).
      embeddings_NE: sentence embeddings (N, E) of the captions, of unit length or not.
      groups_N: what may not be split between fit and choice, e.g. the concept a picture shows;
        with several pictures of a concept and no groups, lambda comes out too small for new
        concepts. Each pair is its own group by default.
      extractor: hash of the image network, kept with the probe.
      encoder: hash of the text network, kept with the probe.
      seed: of the choice of held-out groups.

    Raises:
      UserError: when the numbers of rows differ, a value is not finite, or there are fewer than
        5 groups.
    """
    features_ND = arrays.rows(features_ND, "features")
    embeddings_NE = arrays.rows(embeddings_NE, "caption embeddings")
    n = len(features_ND)
    groups_N = np.arange(n) if groups_N is None else np.asarray(groups_N)
    if not n == len(embeddings_NE) == len(groups_N):
        raise UserError(
            f"{n} images, {len(embeddings_NE)} captions and {len(groups_N)} groups: "
            "a pair needs one of each"
        )
    held_N = _held_out(groups_N, seed)
    trial = _Ridge(features_ND[~held_N], embeddings_NE[~held_N])
    z_ND = (features_ND[held_N] - trial.mean_D) / trial.scale_D
    truth_NE = _unit(embeddings_NE[held_N] - trial.embedding_mean_E)
    score_R = [
        (_unit(z_ND @ trial.weight(ridge)) * truth_NE).sum(axis=1).mean() for ridge in _RIDGES
    ]
    best = int(np.argmax(score_R))
    whole = _Ridge(features_ND, embeddings_NE)
    return Probe(
        feature_mean_D=whole.mean_D,
        feature_scale_D=whole.scale_D,
        weight_DE=whole.weight(_RIDGES[best]),
        embedding_mean_E=whole.embedding_mean_E,
        ridge=_RIDGES[best],
        held_out_score=float(score_R[best]),
        pairs=n,
        extractor=extractor,
        encoder=encoder,
    )


def score(probe: Probe, features_ND: np.ndarray, embeddings_NE: np.ndarray) -> np.ndarray:
    """Caption agreement (N,) of N pictures with their captions, in [-1, 1].

    Args:
      probe: from `fit`.
      features_ND: features of the pictures (N, D).
      embeddings_NE: sentence embeddings of their captions (N, E).

    Raises:
      UserError: when widths or numbers of rows differ or a value is not finite.
    """
    predicted_NE, truth_NE = probe.predict(features_ND), probe.centred(embeddings_NE)
    if len(predicted_NE) != len(truth_NE):
        raise UserError(
            f"{len(predicted_NE)} images and {len(truth_NE)} captions: a pair needs one of each"
        )
    return (_unit(predicted_NE) * _unit(truth_NE)).sum(axis=1)


def sanity(probe: Probe, features_ND: np.ndarray, embeddings_NE: np.ndarray) -> Sanity:
    """Scores and retrieval accuracy on N >= 2 real pairs that the fit has not seen.

    Captions whose embeddings are equal count as one, so repeats neither help nor hurt.
    """
    true_N = score(probe, features_ND, embeddings_NE)
    names_KE, index_N = np.unique(np.asarray(embeddings_NE), axis=0, return_inverse=True)
    n, k = len(true_N), len(names_KE)
    if k < 2:
        raise UserError(f"retrieval needs at least 2 distinct captions, there are {k} in {n} pairs")
    table_NK = _unit(probe.predict(features_ND)) @ _unit(probe.centred(names_KE)).T
    own_NK = index_N.reshape(-1, 1) == np.arange(k)
    own_N1 = table_NK[own_NK][:, None]
    better_N, equal_N = (table_NK > own_N1).sum(axis=1), (table_NK == own_N1).sum(axis=1)

    def top(places: int) -> float:
        # Captions equally far, the own one among them, are in any order.
        return float(np.clip((places - better_N) / equal_N, 0.0, 1.0).mean())

    return Sanity(
        pairs=n,
        score=float(true_N.mean()),
        mismatched=float(table_NK[~own_NK].mean()),
        top1=top(1),
        top5=top(5),
        chance1=1.0 / k,
    )


def save(path: epath.PathLike, probe: Probe) -> None:
    """Writes the probe to an .npz, whole or not at all."""
    arrays.save(path, _KIND, {name: getattr(probe, name) for name in _ARRAYS}, probe._meta)


def load(path: epath.PathLike) -> Probe:
    """Reads a probe written by `save`. Raises `UserError` when it is missing or damaged."""
    values, meta = arrays.load(path, _KIND)
    return Probe(**values, **meta)
