"""The scores that `ldm-scaling evaluate` knows by name: a metric on the features of one network.

A name says the metric and the path to it. "FID" is a Fréchet distance in the features of the
Inception graph of 2015-12-05 and nothing else, and there are three, by the resize before it; in
other features it is an FD.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import get_args, get_type_hints

import numpy as np

from ldm_scaling.config.measuring import FRECHET
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, catalog
from ldm_scaling.metrics.catalog import Metric
from ldm_scaling.metrics.inception_score import SHUFFLE_SEED
from ldm_scaling.study import weights as weights_lib
from ldm_scaling.study.extractors import EFFNET_SIDE, EXTRACTORS, Extractor
from ldm_scaling.study.paired_scorer import LABELS, LPIPS, PSNR, SSIM
from ldm_scaling.study.scorer import AGREEMENT


@dataclasses.dataclass(frozen=True)
class Row:
    """One score that can be asked for.

    Attributes:
      name: on the command line and in records.
      label: for people.
      metric: in `catalog.METRICS`.
      extractor: in `extractors.EXTRACTORS`.
      layer: the network's output that is compared.
      remark: what the path is, where the label does not say it.
    """

    name: str
    label: str
    metric: str
    extractor: str
    layer: str
    remark: str = ""

    @property
    def definition(self) -> Metric:
        """The metric."""
        return catalog.metric(self.metric)

    @property
    def weights(self) -> tuple[str, ...]:
        """What it needs of `weights.PUBLISHED`."""
        return EXTRACTORS[self.extractor].weights

    @property
    def paired(self) -> bool:
        """Whether it is of pairs of a generated image and its real one."""
        return EXTRACTORS[self.extractor].takes == "pairs"

    @property
    def captioned(self) -> bool:
        """Whether it needs the images' captions."""
        return "captions" in (self.definition.against, EXTRACTORS[self.extractor].takes)


_PATHS = {
    "tf2015": "TensorFlow 1's resize: the graph itself, torch-fidelity",
    "clean": "clean-fid's resize, which does not alias",
    "pytorch": "pytorch-fid's resize",
}


def _inception(metric: str, label: str, *shorts: str) -> list[Row]:
    """A metric on the pooled features along several paths."""
    return [
        Row(f"{metric}_{short}", f"{label} ({short})", metric, f"inception_{short}", "pool",
            _PATHS[short])
        for short in shorts
    ]  # fmt: skip


_PRDC = (
    "on Inception's features as in ADM's evaluator; the authors' and torch-fidelity's are VGG16's, "
    "and do not compare"
)
SCORES = {row.name: row for row in (
    *_inception("fid", "FID", *_PATHS),
    *_inception("fid_infinity", "FID-infinity", "tf2015", "clean"),
    *_inception("kid", "KID", "tf2015", "clean"),
    Row("fd_dinov2", "FD-DINOv2", "fd_dinov2", "dinov2_l14", "class"),
    Row("fd_effnetlite0", "FD-EfficientNet-Lite0", "fid", "effnetlite0", "trunk",
        f"320 ImageNet features of a pip package, always at {EFFNET_SIDE} px: a study's records "
        "have it at sweep.feature_side and by another resize, and do not compare; not FID"),
    Row("kd_effnetlite0", "KD-EfficientNet-Lite0", "kid", "effnetlite0", "trunk",
        f"KID's kernel on 320 ImageNet features of a pip package, always at {EFFNET_SIDE} px; not "
        "KID"),
    Row("cmmd", "CMMD", "cmmd", "clip_l14_336", "projected"),
    Row("inception_score", "inception score", "inception_score", "inception_tf2015",
        "logits_unbiased", f"10 splits, shuffled with torch-fidelity's seed {SHUFFLE_SEED}"),
    *(
        Row(name, name, name, "inception_tf2015", "pool", f"k = {k}, {_PRDC}")
        for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5))
    ),
    *(
        Row(f"clip_score_{short}", f"CLIP score ({model})", "clip_score", f"clip_{short}",
            "projected", "cosine")
        for short, model in (("b32", "ViT-B/32"), ("l14", "ViT-L/14"), ("g14", "ViT-g/14"))
    ),
    Row("clip_t", "CLIP-T", "clip_t", "clip_b32", "projected"),
    Row("clip_i", "CLIP-I", "clip_i", "clip_b32", "projected"),
    Row("dino", "DINO", "dino", "dino_s16", "class"),
    Row("lpips_alex", "LPIPS (alex)", "lpips", "lpips_alex", "distance"),
    Row("lpips_vgg", "LPIPS (vgg)", "lpips", "lpips_vgg", "distance"),
    *(
        Row(f"stlpips_{net}", f"ST-LPIPS ({net})", "lpips", f"lpips_{net}_shift_tolerant",
            "distance", "the shift-tolerant variant (arXiv 2207.13686); not LPIPS")
        for net in ("alex", "vgg")
    ),
    *(
        Row(f"{metric}_{short}", f"{metric.upper()} ({over})", layer, "fidelity", layer)
        for metric in ("psnr", "ssim")
        for short, over, layer in (("rgb", "RGB", metric), ("y", "Y", f"{metric}_y"))
    ),
)}  # fmt: skip
# Several at once.
GROUPS = {
    "fid": ("fid_tf2015", "fid_clean"),
    "fid_infinity": ("fid_infinity_tf2015", "fid_infinity_clean"),
    "kid": ("kid_tf2015", "kid_clean"),
    "is": ("inception_score",),
    "prdc": ("precision", "recall", "density", "coverage"),
    "clip_score": ("clip_score_b32", "clip_score_l14", "clip_score_g14"),
    "lpips": ("lpips_alex", "lpips_vgg"),
    "stlpips": ("stlpips_alex", "stlpips_vgg"),
    "psnr": ("psnr_rgb", "psnr_y"),
    "ssim": ("ssim_rgb", "ssim_y"),
}


# What sweeps do not measure, though they could.
_UNSWEPT = {
    "fid_infinity": "its intervals would take an hour or more of each record",
    "clip_t": "it is of DreamBooth's subjects; the same of any captions is clip_score_b32",
}


# The names that those have in records of restored pictures which every one of them holds.
_RESTORED = {LPIPS: LPIPS, "psnr_rgb": PSNR, "ssim_rgb": SSIM}


def unswept(row: Row, restored: bool = False) -> str:
    """Why sweeps do not measure a score beside their own; empty where they do.

    Args:
      row: the score.
      restored: whether of pictures that a fine-tuned member restored, each of a real one, rather
        than of those drawn from text.
    """
    if restored and row.captioned:
        return "restored pictures have no captions to be scored by"
    if restored and row.name in _RESTORED:
        return f"every record of restored pictures has it, by the name {_RESTORED[row.name]}"
    if row.paired and not restored:
        return "it is of pairs, and what is drawn from text has no real picture of its own"
    if row.definition.against == "subjects":
        return "it is of DreamBooth's subjects"
    if row.name == FRECHET:
        return "the sweep's own Fréchet distance has this name, and every record has it"
    return _UNSWEPT.get(row.metric, "")


# What rows may say where they choose of words.
_WORDS = tuple(
    (kind, key, get_args(get_type_hints(kind)[key]))
    for kind, key in ((Metric, "better"), (Metric, "against"), (Metric, "count"),
                      (Extractor, "takes"))
)


def _check(name: str) -> None:
    """Raises `UserError` for a row that names what there is not: one of a plugin."""
    row = SCORES[name]

    def require(holds: bool, why: str) -> None:
        if not holds:
            raise UserError(f"the score {name!r} {why}: mend its row of scores.SCORES")

    require(row.name == name, f"calls itself {row.name!r}")
    require(name not in (AGREEMENT, PSNR, SSIM, LABELS), "has the name of a sweep's own measure")
    extractor = EXTRACTORS.get(row.extractor)
    require(extractor is not None, f"is by the extractor {row.extractor!r}, which "
            f"extractors.EXTRACTORS lacks; it has {', '.join(EXTRACTORS)}")
    metric = catalog.METRICS.get(row.metric)
    require(metric is not None, f"is by the metric {row.metric!r}, which catalog.METRICS lacks; it "
            f"has {', '.join(catalog.METRICS)}")
    require(metric.name == row.metric,
            f"is by the metric {row.metric!r}, which calls itself {metric.name!r}")
    for kind, key, words in _WORDS:
        value = getattr(extractor if kind is Extractor else metric, key)
        require(value in words, f"has {key}={value!r} in its {kind.__name__.lower()}: choose of "
                f"{', '.join(map(repr, words))}")
    require(not extractor.layers or row.layer in extractor.layers, f"is of the layer {row.layer!r} "
            f"of {row.extractor!r}, which has {', '.join(extractor.layers)}")
    lacking = [one for one in extractor.weights if one not in weights_lib.PUBLISHED]
    require(not lacking, f"needs the weights {', '.join(lacking)}, which weights.PUBLISHED lacks")
    require(metric.against != "captions" or extractor.words is not None,
            f"is held against captions, and {row.extractor!r} has no words")
    require(metric.count != "frechet" or metric.against == "statistics",
            f"is by the metric {row.metric!r}, whose count is that of statistics")
    require(extractor.takes == "images" or metric.against == "nothing", f"is by {row.extractor!r}, "
            f"which takes {extractor.takes}: its metric holds images against nothing else, "
            f"{row.metric!r} does against {metric.against}")


def rows(names: Iterable[str]) -> list[Row]:
    """The scores of these names and groups, each once, in their order.

    Raises `UserError` for a name that is none, with the nearest, and for a row of one's own that
    names what there is not.
    """
    out: dict[str, Row] = {}
    for name in names:
        if name not in SCORES and name not in GROUPS:
            near = difflib.get_close_matches(name, [*SCORES, *GROUPS], n=1)
            hint = f"did you mean {near[0]}?" if near else "there are"
            raise UserError(f"no score is called {name!r}; {hint} {', '.join([*GROUPS, *SCORES])}")
        out |= {one: SCORES[one] for one in GROUPS.get(name, (name,))}
    if not out:
        raise UserError(f"name at least one score: {', '.join([*GROUPS, *SCORES])}")
    for name in out:
        _check(name)
    return list(out.values())


def interval(
    name: str, replicates_R: np.ndarray, freedom: float, foretold: bool = False
) -> tuple[float, float]:
    """95% of a metric's replicates, within its range; see `bootstrap.interval`."""
    ends = bootstrap.interval(replicates_R, freedom)
    return SCORES[name].definition.within(ends, foretold) if name in SCORES else ends


def needed(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The weights that scores are by, and which each is for, as `weights.require` takes them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name in row.weights:
            found.setdefault(name, []).append(row.name)
    return found


def free() -> list[str]:
    """Names of the scores that need no download."""
    return [row.name for row in SCORES.values() if not row.weights]
