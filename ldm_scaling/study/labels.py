"""Names for readers: the table of measures, sampler names, axis texts, numbers in words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

from ldm_scaling.errors import UserError
from ldm_scaling.study import scores


@dataclasses.dataclass(frozen=True)
class Measure:
    """One metric of the records, as a reader meets it.

    Attributes:
      name: key in `Record.metrics`.
      label: full name, for headings and axes.
      short: short name, for sentences and table heads.
      better: which direction is better.
      about: what it is, and what it is not.
    """

    name: str
    label: str
    short: str
    better: Literal["lower", "higher"]
    about: str

    @property
    def sign(self) -> int:
        """`sign * value` is a loss: smaller is better whatever the direction."""
        return 1 if self.better == "lower" else -1

    @property
    def axis(self) -> str:
        """Axis text with the direction."""
        return f"{self.label} ({self.better} is better)"


_MEASURES = (
    Measure(
        "fd_effnetlite0",
        "Fréchet distance in EfficientNet-Lite0 features",
        "FD",
        "lower",
        "The Fréchet distance between two Gaussian distributions, fitted to the features that an "
        "ImageNet-trained EfficientNet-Lite0 gives for the sampled and for the real pictures. It "
        "sees how the two sets of pictures differ as wholes (sharpness, shapes, colours, variety) "
        "and nothing of the captions. It is not FID: FID is defined by another network "
        "(Inception, 2015-12-05) and usually by 30,000 pictures, so these values compare with "
        "each other and with no published FID.",
    ),
    Measure(
        "caption_agreement",
        "caption agreement",
        "caption agreement",
        "higher",
        "A score of how well each picture agrees with its own caption, averaged over pictures. It "
        "says little about how real a picture looks, so that guidance can go on raising it past "
        "the rate where the Fréchet distance is best: the two are read together. It is not the "
        "CLIP score, and its values compare with no published ones.",
    ),
    Measure(
        "fid_tf2015", "FID (TensorFlow 1's resize)", "FID", "lower",
        "The Fréchet distance in the features of the Inception graph of 2015-12-05.",
    ),
    Measure(
        "fid_clean", "FID (clean-fid's resize)", "FID (clean)", "lower",
        "The Fréchet distance in the features of the Inception graph of 2015-12-05, after a resize "
        "that does not alias.",
    ),
    Measure(
        "fid_pytorch", "FID (pytorch-fid's resize)", "FID (pytorch)", "lower",
        "The Fréchet distance in the features of the Inception graph of 2015-12-05, resized as "
        "pytorch-fid does.",
    ),
    Measure(
        "fd_dinov2", "FD-DINOv2", "FD-DINOv2", "lower",
        "The Fréchet distance in the features of DINOv2 ViT-L/14.",
    ),
    *(
        Measure(
            f"kid_{short}", f"KID ({resize} resize)", f"KID ({short})", "lower",
            "The kernel distance in the features of the Inception graph of 2015-12-05, unbiased by "
            "the number of pictures: it may be a little below 0.",
        )
        for short, resize in (("tf2015", "TensorFlow 1's"), ("clean", "clean-fid's"))
    ),
    Measure(
        "kd_effnetlite0", "kernel distance in EfficientNet-Lite0 features", "KD", "lower",
        "KID's formula on the features that an ImageNet-trained EfficientNet-Lite0 gives of "
        "pictures at 224 px: it may be a little below 0, and is not KID.",
    ),
    Measure(
        "cmmd", "CMMD", "CMMD", "lower",
        "A kernel distance in the embeddings of CLIP ViT-L/14 at 336 px. Few pictures raise it.",
    ),
    Measure(
        "precision", "precision", "precision", "higher",
        "The share of drawn pictures that lie among the real ones, in Inception's features.",
    ),
    Measure(
        "recall", "recall", "recall", "higher",
        "The share of real pictures that lie among the drawn ones, in Inception's features. It "
        "compares at one number of pictures.",
    ),
    Measure(
        "density", "density", "density", "higher",
        "How densely real pictures lie about the drawn ones, in Inception's features: 1 where the "
        "two are alike.",
    ),
    Measure(
        "coverage", "coverage", "coverage", "higher",
        "The share of real pictures with a drawn one near, in Inception's features. It compares at "
        "one number of pictures.",
    ),
    *(
        Measure(
            f"clip_score_{short}", f"CLIP score ({model})", f"CLIP ({model[4:]})", "higher",
            "The cosine between CLIP's states of each picture and of its own caption, averaged.",
        )
        for short, model in (("l14", "ViT-L/14"), ("b32", "ViT-B/32"), ("g14", "ViT-g/14"))
    ),
    *(
        Measure(
            f"lpips_{net}", f"LPIPS ({net})", f"LPIPS ({net})", "lower",
            "A learned distance between each picture and the real one that it should be.",
        )
        for net in ("alex", "vgg")
    ),
    *(
        Measure(
            f"stlpips_{net}", f"ST-LPIPS ({net})", f"ST-LPIPS ({net})", "lower",
            "A learned distance between each picture and the real one that it should be: the "
            "shift-tolerant variant of LPIPS, whose values compare with no published LPIPS.",
        )
        for net in ("alex", "vgg")
    ),
    Measure(
        "psnr", "PSNR in dB", "PSNR", "higher",
        "How near the pixels are to the real picture's. Blurred pictures do well by it.",
    ),
    Measure(
        "ssim", "SSIM", "SSIM", "higher",
        "How alike local structures are to the real picture's. Blurred pictures do well by it.",
    ),
    Measure(
        "psnr_y", "PSNR (Y) in dB", "PSNR (Y)", "higher",
        "The same of their luma alone, as super-resolution is often reported.",
    ),
    Measure(
        "ssim_y", "SSIM (Y)", "SSIM (Y)", "higher",
        "The same of their luma alone, as super-resolution is often reported.",
    ),
    Measure(
        "label_score_effnetlite0", "label score (EfficientNet-Lite0)", "label score", "higher",
        "The inception score's formula on the labels that EfficientNet-Lite0 gives, in one split. "
        "It is not the inception score: its values compare with no published ones.",
    ),
    Measure(
        "inception_score", "inception score", "IS", "higher",
        "How sure and how varied the labels are that Inception gives. Real pictures are not asked.",
    ),
    *(
        Measure(name, f"{label} (subject fidelity)", label, "higher",
                "The cosine between states of drawn pictures of a subject and of its real ones.")
        for name, label in (("dino", "DINO"), ("clip_i", "CLIP-I"))
    ),
    Measure(
        "subject_effnetlite0", "subject similarity (EfficientNet-Lite0)", "subject similarity",
        "higher",
        "The formula of DINO and CLIP-I, the cosine between features of drawn pictures of a "
        "subject and of its real ones, in EfficientNet-Lite0's: it compares with neither.",
    ),
    Measure(
        "clip_t", "CLIP-T (prompt fidelity)", "CLIP-T", "higher",
        "The cosine between CLIP's states of drawn pictures of a subject and of their prompts.",
    ),
)
MEASURES = {m.name: m for m in _MEASURES}
# Those of pictures and their captions, the better known first.
_OF_CAPTIONS = ("clip_score_l14", "clip_score_b32", "clip_score_g14", "caption_agreement")

# As their papers write them.
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "ddpm_large": "DDPM (large variance)",
    "euler": "Euler",
    "euler_ancestral": "Euler ancestral",
    "heun": "Heun",
    "dpmpp_1s": "DPM-Solver++ (1S)",
    "dpmpp_2s": "DPM-Solver++ (2S)",
    "dpmpp_2m": "DPM-Solver++ (2M)",
    "dpmpp_3m": "DPM-Solver++ (3M)",
    "dpmpp_sde": "SDE-DPM-Solver++ (1S)",
    "dpmpp_2m_sde": "SDE-DPM-Solver++ (2M)",
    "dpmpp_3m_sde": "SDE-DPM-Solver++ (3M)",
    "unipc": "UniPC",
    "lcm": "LCM",
    "codi": "CoDi",
}

AXES = {
    "cost": "sampling cost = normalised cost × network calls",
    "seconds": "measured seconds per image",
    "steps": "sampling steps",
    "compute": "training compute\n= GFLOPs of a network call × iterations",
}


def measures() -> dict[str, Measure]:
    """All measures by their names: those of `MEASURES`, then the scores of plugins that it lacks.
    """
    own = {
        row.name: Measure(
            row.name, row.label, row.label, row.definition.better,
            f"By {row.definition.source}.{row.remark and f' {row.remark}.'}",
        )
        for row in scores.rows(name for name in scores.SCORES if name not in MEASURES)
        if not (scores.unswept(row) and scores.unswept(row, restored=True))
    }
    return MEASURES | own


def measure(name: str) -> Measure:
    """The measure called `name`. Raises `UserError` when there is none."""
    known = MEASURES if name in MEASURES else measures()
    if name not in known:
        raise UserError(
            f"no measure is called {name!r}: known are {', '.join(known)}; one of your own is a "
            "row of scores.SCORES in a plugin, see docs/extending.md"
        )
    return known[name]


def of_captions(metric: str) -> bool:
    """Whether it is of pictures and their captions."""
    own = metric in scores.SCORES and metric not in MEASURES
    return metric in _OF_CAPTIONS or (own and scores.SCORES[metric].captioned)


def frechet(metric: str) -> bool:
    """Whether it is a Fréchet distance, which depends on the number of images."""
    own = metric in scores.SCORES and scores.SCORES[metric].definition.count == "frechet"
    return own or metric.startswith(("fd_", "fid_"))


def traded(metric: str, held: Sequence[str]) -> str | None:
    """What a measure is seen against as guidance rises, of those that records hold: how pictures
    agree with their captions, by CLIP where it is there; else the next, None where there is none.
    """
    others = [name for name in held if name != metric]
    known = [name for name in others if of_captions(name)]
    if known and not of_captions(metric):
        order = (*_OF_CAPTIONS, *known)
        return min(known, key=order.index)
    return others[0] if others else None


def sampler(name: str) -> str:
    """A sampler's name for readers; an unknown one keeps its own, what an arm has more stays behind
    it (see `curves.arms`).

    `ddim:eta=0.5,final=zero` is DDIM with eta 0.5, final zero; `ddim, after 4 of ddpm` is DDIM,
    after 4 of DDPM.
    """
    spec, comma, more = name.partition(", ")
    before, of, first = more.partition(" of ")
    if of:
        more = before + of + sampler(first)
    base, _, options = spec.partition(":")
    text = SAMPLERS.get(base, base)
    if options:
        text += " with " + ", ".join(
            option.replace("=", " ", 1).replace("_", " ") for option in options.split(",")
        )
    return text + comma + more


def task(name: str) -> str:
    """A task's name for titles."""
    spelt = {
        "super_resolution": "Super-resolution", "jpeg_restoration": "JPEG restoration",
        "consistency": "Consistency distillation", "dreambooth": "DreamBooth",
    }
    return spelt.get(name, name.replace("_", " ").capitalize())


def network(model: str, task: str) -> str:
    """A network's name among those of other tasks: of a student with what made it, as
    `c8 (consistency)`."""
    of = {
        "consistency": "consistency", "guided_distillation": "guided",
        "progressive_distillation": "progressive",
    }
    return f"{model} ({of[task]})" if task in of else model


def file_name(sampler: str) -> str:
    """A sampler's name as part of a file's: `dpmpp_2m:solver_type=heun` is
    `dpmpp_2m-solver_type-heun`. Without dots: LaTeX takes what follows the first for the suffix."""
    return re.sub(r"[^\w+-]+", "-", sampler.replace(", ", "_"))


def number(value: float, beside: float = 0.0) -> str:
    """Three digits, or all of a whole number: 1234, 56.7, 3.21, 0.000456; an exponent only below
    0.000001 and from 1e9 on, as it or what it stands beside is."""
    if not value or not math.isfinite(value):
        return f"{abs(value) if not value else value:g}"
    (digits, place), (_, most) = (
        f"{v:.2e}".split("e") for v in (value, max(abs(value), abs(beside))))
    if not -6 <= int(most) < 9:
        return f"{digits}e{int(place)}"
    text = f"{value:.{max(0, 2 - max(int(place), int(most) - 4))}f}"
    return text if float(text) else "0"


def brief(value: float) -> str:
    """The same in few letters, for small cells: 242k, 2.4e-5."""
    size = abs(value)
    if size >= 9_999.5:
        return f"{'-' if value < 0 else ''}{count(size)}"
    digits, _, place = f"{value:.1e}".partition("e")
    return number(value) if size >= 0.001 or not value else f"{digits}e{int(place)}"


def interval(low: float, high: float) -> str:
    """A 95% interval in brackets."""
    return f"[{number(low, high)}, {number(high, low)}]"


def probability(value: float) -> str:
    """A bootstrap share; never rounded to certainty, which no finite number of replicates gives."""
    return "above 0.99" if value > 0.99 else "below 0.01" if value < 0.01 else f"{value:.2f}"


def count(value: float) -> str:
    """Parameters in words: 865.9M, 412k."""
    for least, scale, unit in ((999.5e6, 1e9, "B"), (999.5e3, 1e6, "M"), (999.5, 1e3, "k")):
        if value >= least:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def steps(count: int) -> str:
    """`1 step`, `4 steps`, `2,000 steps`."""
    return counted(count, "step")


def counted(number: int, what: str) -> str:
    """`1 cell`, `4,000 cells`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def listing(items: Sequence[str], word: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
