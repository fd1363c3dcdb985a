"""The table of metrics: what each needs, which way is better, where it comes from."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import (
    bootstrap,
    frechet,
    inception_score,
    infinity,
    kernel,
    prdc,
    similarity,
)

# What a metric holds the generated images against.
Against = Literal["nothing", "statistics", "features", "captions", "subjects"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
      name: key in records and on the command line.
      label: full name, for headings and axes.
      better: which direction is better.
      needs: what is extracted from the generated images, a name in `FEATURES` or one's own.
      against: "statistics" (`ReferenceStats`) or "features" (M, D) of real images, "captions":
        text embeddings (N, E) in the images' order, "subjects": features (M, D) of real images
        and the subject of each generated (N,) and real (M,) image, or "nothing".
      function: `function(generated, against, counts_RN, fields)`: the value, and its raw
        replicates or, without counts, None; or of either an object that has those `fields`.
      field: name of the number in such an object; "" where there is none.
      source: paper, and the code whose number it is.
      range: the least and the largest value that it can have.
      count: how its expected value depends on the number of generated images: "free", it does not;
        "frechet" and "inverse", as `foretold` tells; "", otherwise, so that values of different
        numbers do not compare.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    needs: str
    against: Against
    function: Callable[[np.ndarray, Any, np.ndarray | None, Sequence[str]], tuple[Any, Any]]
    field: str
    source: str
    range: tuple[float, float]
    count: Literal["free", "frechet", "inverse", ""] = ""

    def within(self, ends: tuple[float, float], foretold: bool = False) -> tuple[float, float]:
        """An interval's ends, as far as values go; of one that is foretold by "inverse" as they
        are: unbiased it may be below 0."""
        if foretold and self.count == "inverse":
            return ends
        low, high = np.clip(ends, *self.range)
        return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """A metric's value and, where replicates were asked for, its interval.

    Attributes:
      value: the metric.
      interval: (low, high) of the expected value at this number of images, within the metric's
        range, or None.
      replicates_R: raw replicates for `compare.distributions`, or None.
      remark: what to know of how the value was found; mostly nothing.
    """

    value: float
    interval: tuple[float, float] | None = None
    replicates_R: np.ndarray | None = None
    remark: str = ""


FEATURES = {
    "inception_pool": "2048 means of the 2015-12-05 Inception graph's last block",
    "inception_logits": "its 1008 class logits, the bias left out",
    "dinov2_l14": "class token of DINOv2 ViT-L/14, 1024 numbers",
    "clip_l14_336": "image embedding of CLIP ViT-L/14 at 336 pixels",
    "clip": "image embedding of the CLIP network that also embeds the captions",
    "clip_b32": "image embedding of CLIP ViT-B/32",
    "dino_s16": "class token of DINO ViT-S/16",
    "lpips": "LPIPS distance of each generated image from its real one (N, 1)",
    "psnr": "PSNR of each generated image and its real one (N, 1), over three colours",
    "psnr_y": "the same over the luma",
    "ssim": "SSIM of each generated image and its real one (N, 1), over three colours",
    "ssim_y": "the same over the luma",
}


def apart(function: Callable, replicates: Callable) -> Callable:
    """A metric of a value, `function(generated, against)`, and replicates,
    `replicates(generated, against, counts_RN)`, that share no work."""
    return lambda x, y, counts_RN, _: (
        function(x, y), None if counts_RN is None else replicates(x, y, counts_RN)
    )


def _alone(function: Callable) -> Callable:
    return lambda x, _, *rest: function(x, *rest)


def mean_of(values: Callable[[np.ndarray, Any], np.ndarray]) -> Callable:
    """A metric that is a mean over images: `values(generated, against)` is one number of each."""

    def both(x, y, counts_RN, _):
        values_N = values(x, y)
        if not len(values_N):
            raise UserError("there are no images, and a mean over them needs 1: give some")
        drawn_R = None if counts_RN is None else bootstrap.mean_replicates(values_N, counts_RN)
        return float(np.mean(values_N)), drawn_R

    return both


def _with_whole(x: np.ndarray, counts_RN: np.ndarray | None) -> np.ndarray:
    """Counts (1 + R, N) whose first replicate is of every image: the value itself."""
    ones_1N = np.ones((1, len(x)), np.int64)
    if counts_RN is None:
        return ones_1N
    return np.vstack([ones_1N, bootstrap.check_counts(counts_RN, len(x))])


def _kid(x, y, counts_RN, _):
    whole = kernel.kid(x, y)
    drawn = None if counts_RN is None else kernel.kid_replicates(x, y, counts_RN, whole=whole)
    return whole, drawn


def _cmmd(x, y, counts_RN, _):
    values = kernel.cmmd_replicates(x, y, _with_whole(x, counts_RN))
    return values[0], values[1:]


def _prdc(x, y, counts_RN, fields):
    """Each score with its authors' k."""
    k_of = {field: 3 if field in ("precision", "recall") else 5 for field in fields}
    values = prdc.replicates(x, y, _with_whole(x, counts_RN), k_of)
    whole, drawn = (
        prdc.Prdc(**{field: getattr(values, field)[part] for field in fields})
        for part in (0, slice(1, None))
    )
    return whole, drawn


_FRECHET = apart(frechet.frechet_from_features, bootstrap.frechet_replicates)
_INFINITY = apart(infinity.frechet_infinity, infinity.infinity_replicates)
_IS = apart(*(
    _alone(functools.partial(f, shuffle_seed=inception_score.SHUFFLE_SEED))
    for f in (inception_score.inception_score, inception_score.inception_score_replicates)
))
_CLIP = mean_of(similarity.pair_cosines)
_SUBJECT = mean_of(lambda x, y: similarity.subject_cosines(x, *y))
_PAIR = mean_of(lambda x, _: np.asarray(x).reshape(len(x)))

# fmt: off
_TABLE = (
    ("fid", "FID", "lower", "inception_pool", "statistics", _FRECHET, "",
     "Heusel et al. 2017; pytorch-fid, torch-fidelity, clean-fid"),
    ("fid_infinity", "FID-infinity", "lower", "inception_pool", "statistics", _INFINITY, "value",
     "Chong and Forsyth 2020"),
    ("fd_dinov2", "FD-DINOv2", "lower", "dinov2_l14", "statistics", _FRECHET, "",
     "Stein et al. 2023"),
    ("kid", "KID", "lower", "inception_pool", "features", _kid, "value",
     "Binkowski et al. 2018; torch-fidelity"),
    ("cmmd", "CMMD", "lower", "clip_l14_336", "features", _cmmd, "",
     "Jayasumana et al. 2024"),
    ("inception_score", "inception score", "higher", "inception_logits", "nothing", _IS, "value",
     "Salimans et al. 2016; torch-fidelity"),
    ("precision", "precision", "higher", "inception_pool", "features", _prdc, "precision",
     "formula of Kynkäänniemi et al. 2019, k = 3; features of ADM's evaluator"),
    ("recall", "recall", "higher", "inception_pool", "features", _prdc, "recall",
     "formula of Kynkäänniemi et al. 2019, k = 3; features of ADM's evaluator"),
    ("density", "density", "higher", "inception_pool", "features", _prdc, "density",
     "formula of Naeem et al. 2020 and prdc, k = 5"),
    ("coverage", "coverage", "higher", "inception_pool", "features", _prdc, "coverage",
     "formula of Naeem et al. 2020 and prdc, k = 5"),
    ("clip_score", "CLIP score", "higher", "clip", "captions", _CLIP, "",
     "Hessel et al. 2021, cosine; torchmetrics is 100 times it"),
    ("clip_t", "CLIP-T", "higher", "clip_b32", "captions", _CLIP, "",
     "Ruiz et al. 2023 (DreamBooth)"),
    ("clip_i", "CLIP-I", "higher", "clip_b32", "subjects", _SUBJECT, "",
     "Ruiz et al. 2023 (DreamBooth)"),
    ("dino", "DINO", "higher", "dino_s16", "subjects", _SUBJECT, "",
     "Ruiz et al. 2023 (DreamBooth)"),
    ("lpips", "LPIPS", "lower", "lpips", "nothing", _PAIR, "",
     "Zhang et al. 2018, v0.1"),
    ("psnr", "PSNR", "higher", "psnr", "nothing", _PAIR, "",
     "three colours; basicsr, scikit-image"),
    ("psnr_y", "PSNR (luma)", "higher", "psnr_y", "nothing", _PAIR, "",
     "luma of ITU-R BT.601; basicsr"),
    ("ssim", "SSIM", "higher", "ssim", "nothing", _PAIR, "",
     "Wang et al. 2004, three colours; basicsr, scikit-image"),
    ("ssim_y", "SSIM (luma)", "higher", "ssim_y", "nothing", _PAIR, "",
     "Wang et al. 2004, luma of ITU-R BT.601; basicsr"),
)
# fmt: on
# KID, unbiased, and FID-infinity, an extrapolation, have no bounds: both may be negative.
_RANGES = {
    **dict.fromkeys(
        ("fid", "fd_dinov2", "cmmd", "density", "lpips", "psnr", "psnr_y"), (0.0, math.inf)
    ),
    **dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0)),
    **dict.fromkeys(("clip_score", "clip_t", "clip_i", "dino", "ssim", "ssim_y"), (-1.0, 1.0)),
    "inception_score": (1.0, math.inf),
}
# Means over the generated images, with all else given, and what is unbiased are free. A squared MMD
# that is biased is too large by something over their number.
_COUNTS = {
    **dict.fromkeys(("fid", "fd_dinov2"), "frechet"),
    **dict.fromkeys(
        ("kid", "precision", "density", "clip_score", "clip_t", "clip_i", "dino", "lpips", "psnr",
         "psnr_y", "ssim", "ssim_y"), "free"),
    "cmmd": "inverse",
}
METRICS: dict[str, Metric] = {
    row[0]: Metric(*row, _RANGES.get(row[0], (-math.inf, math.inf)), _COUNTS.get(row[0], ""))
    for row in _TABLE
}


def metric(name: str) -> Metric:
    """The metric of a name. Raises `UserError` that lists the names there are."""
    if name not in METRICS:
        raise UserError(f"there is no metric {name!r}: choose of {', '.join(METRICS)}")
    return METRICS[name]


def _part(result: Any, field: str) -> Any:
    return result if not field or isinstance(result, np.ndarray) else getattr(result, field)


def evaluate(
    names: Sequence[str],
    generated: Mapping[str, np.ndarray],
    against: Mapping[str, Any],
    counts_RN: np.ndarray | None = None,
    level: float = 0.95,
    freedom: int | None = None,
) -> dict[str, Score]:
    """Metrics of a set of generated images, with intervals where counts are given.

    Args:
      names: which, of `METRICS`. Those that share their work do it once, and so do a value and
        its replicates.
      generated: `Metric.needs` to features of the generated images.
      against: metric's name to what it is held against; see `Metric.against`.
      counts_RN: from `bootstrap.resample_counts`, for intervals.
      level: of the intervals.
      freedom: the images' degrees of freedom; one less than their number unless given.

    Raises:
      UserError: for an unknown name, or features or a reference that are missing.
    """
    groups: dict[Any, list[Metric]] = {}
    for one in map(metric, names):
        if one.needs not in generated:
            about = f": {FEATURES[one.needs]}" if one.needs in FEATURES else ""
            raise UserError(f"{one.label} needs {one.needs}{about}")
        if one.against != "nothing" and one.name not in against:
            raise UserError(f"{one.label} is held against {one.against}: name it for {one.name!r}")
        key = (one.function, one.needs, id(against.get(one.name)))
        groups.setdefault(key, []).append(one)
    scores = {}
    for (function, needs, _), members in groups.items():
        fields = list(dict.fromkeys(one.field for one in members))
        whole, drawn = function(
            generated[needs], against.get(members[0].name), counts_RN, fields
        )
        for one in members:
            value, remark = float(_part(whole, one.field)), getattr(whole, "remark", "")
            if counts_RN is None:
                scores[one.name] = Score(value, remark=remark)
                continue
            raw_R = np.asarray(_part(drawn, one.field))
            free = counts_RN.shape[1] - 1 if freedom is None else freedom
            ends = one.within(bootstrap.basic_interval(value, raw_R, free, level))
            scores[one.name] = Score(value, ends, raw_R, remark)
    return {name: scores[name] for name in names}
