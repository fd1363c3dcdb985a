"""Evaluation protocols: every choice in one table, each with where it comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm_scaling import files
from ldm_scaling.data import coco, dreambench, image_folder, pairs
from ldm_scaling.data.coco import CaptionList
from ldm_scaling.data.dreambench import DreamBench
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.study import scores
from ldm_scaling.study.evaluate import Task
from ldm_scaling.study.features import ImageSet


@dataclasses.dataclass(frozen=True)
class Captions:
    """Which captions images are drawn for.

    Attributes:
      file: they come from, below the data's folder.
      count: how many.
      seed: of their selection; None where all are taken.
      selection: how, in words.
      hash: of the list; None where nobody has published one, records hold that of what was used.
    """

    file: str
    count: int
    seed: int | None
    selection: str
    hash: str | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    Attributes:
      name: on the command line.
      captions: None where images are drawn from images.
      side: of the square images that are scored, in pixels; None leaves them as they are.
      resizer: how they get it, generated and real ones alike.
      reference: the real images, in words.
      reference_count: how many they are; None where that is not fixed.
      metrics: names and groups of `scores`.
      sampler, steps, guidance: defaults of the drawing; guidance 1 is none.
      sources: choice to where it comes from.
    Raises:
      UserError: for a choice without a source, or metrics that are none.
    """

    name: str
    captions: Captions | None
    side: int | None
    resizer: str
    reference: str
    reference_count: int | None
    metrics: tuple[str, ...]
    sampler: str
    steps: int
    guidance: float
    sources: Mapping[str, str]

    def __post_init__(self):
        scores.rows(self.metrics)
        choices = {"captions", "side", "resizer", "reference", "metrics", "sampler"}
        wrong = choices ^ self.sources.keys()
        if wrong or self.steps < 1 or (self.side is not None and self.side < 1):
            raise UserError(f"protocol {self.name}: give a source of each choice, {sorted(wrong)}")

    def plain(self) -> dict[str, Any]:
        """For records."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_PAPER = "arXiv 2404.01367"
_COCO_SOURCES = {
    "captions": "30,000 random validation captions: DALL-E (arXiv 2102.12092), Imagen (arXiv "
    "2205.11487); neither published its list, so this one is numpy's, its hash recorded",
    "side": "256: DALL-E, Imagen, GigaGAN's and DMD2's evaluation",
    "resizer": "github.com/mingukkang/GigaGAN evaluation/evaluation.py; github.com/tianweiy/DMD2 "
    "main/coco_eval/coco_evaluator.py",
    "reference": "the full validation split: Imagen; GigaGAN and DMD2 by clean-fid",
    "metrics": "FID along both paths of the field; CLIP scores by the networks that papers use; "
    "CMMD (arXiv 2401.09603); FD-DINOv2 (arXiv 2306.04675)",
    "sampler": f"{_PAPER}, Table 1: DDIM, 50 steps, guidance 7.5",
}
_DRAWN = "numpy.random.RandomState(seed).permutation of all captions by their number, the first"
_FULL = "all images of COCO-2014's validation split"
_COCO_METRICS = ("fid", "kid", "cmmd", "fd_dinov2", "is", "prdc", "clip_score")
_TABLE = (
    Protocol(
        "coco30k", Captions(coco.ANNOTATIONS, 30_000, 2014, f"{_DRAWN} 30,000"), 256,
        image_folder.SQUARE, _FULL, coco.IMAGES, _COCO_METRICS, "ddim", 50, 7.5, _COCO_SOURCES,
    ),
    Protocol(
        "coco5k", Captions(coco.ANNOTATIONS, 5_000, 2014, f"{_DRAWN} 5,000"), 256,
        image_folder.SQUARE, _FULL, coco.IMAGES, _COCO_METRICS, "ddim", 50, 7.5,
        _COCO_SOURCES | {"captions": "ours, for quick comparisons: the first 5,000 of coco30k's, "
                         "whose images are used again; its FID is higher than that of 30,000"},
    ),
    Protocol(
        "div2k-sr", None, 512, image_folder.SQUARE,
        "the high-resolution crops that the images were made from", 3_000,
        ("lpips", "psnr", "ssim", "fid", "is"), "ddim", 50, 1.0,
        {
            "captions": "none: images are drawn from low-resolution images",
            "side": "512 from 128: StableSR (arXiv 2305.07015), its DIV2K test pairs",
            "resizer": "crops have this side already",
            "reference": f"{_PAPER}, section 3.2: 3,000 random crops of DIV2K's validation images, "
            "degraded as Real-ESRGAN does (arXiv 2107.10833)",
            "metrics": f"{_PAPER}, Fig. 4 and 17: FID, LPIPS, IS; which LPIPS it does not say, so "
            "both are given. PSNR and SSIM: StableSR, over the luma (its authors, "
            "github.com/IceClear/StableSR/issues/45); over RGB beside them",
            "sampler": f"{_PAPER}: DDIM, 50 steps, no guidance",
        },
    ),
    Protocol(
        "dreambench",
        Captions(dreambench.FILE, dreambench.SUBJECTS * dreambench.PROMPTS, None,
                 "25 prompts for each of 30 subjects, 4 images of each", "ba9dbbea81cc6b52"),
        None, "none: each network resizes for itself", "the subject's own images, 4 to 6", None,
        ("dino", "clip_i", "clip_t"), "ddim", 50, 7.5,
        {
            "captions": "DreamBooth (arXiv 2208.12242), section 4.1; github.com/google/dreambooth",
            "side": "as they are",
            "resizer": "as they are",
            "reference": "DreamBooth, section 4.2",
            "metrics": "DreamBooth, section 4.2: DINO ViT-S/16, CLIP-I and CLIP-T, whose network "
            "it does not say: ViT-B/32; CLIP-T's text is the prompt without the unique token",
            "sampler": f"{_PAPER}, Fig. 6: DDIM, 50 steps, guidance 7.5",
        },
    ),
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in _TABLE}


def get(name: str) -> Protocol:
    """The protocol of a name. Raises `UserError` that lists the names there are."""
    if name not in PROTOCOLS:
        raise UserError(f"no protocol is called {name!r}: choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclasses.dataclass(frozen=True)
class Given:
    """A protocol with its data, before there are images.

    Attributes:
      protocol: see `Protocol`.
      data: the folder.
      limit: score this many images only, to try out (DreamBench: prompts of each subject); None
        for all.
      captions: COCO's, chosen; None for the other protocols.
      caption_hash: of all prompts in order.
      real: folder of the real images; None where a file of statistics stands for them.
      bench: DreamBench's subjects and prompts; None for the other protocols.
      low: low-resolution images, in the order of `real`; None but for super-resolution.
    """

    protocol: Protocol
    data: Path
    limit: int | None
    captions: CaptionList | None
    caption_hash: str | None
    real: ImageFolder | None
    bench: DreamBench | None = None
    low: ImageFolder | None = None

    def about(self) -> dict[str, Any]:
        """For the record."""
        return {
            **self.protocol.plain(), "protocol_hash": files.sha256_of(self.protocol.plain()),
            "caption_hash": self.caption_hash, "limit": self.limit, "data": str(self.data),
        }


def given(
    protocol: Protocol, data: Path, limit: int | None = None, with_real: bool = True,
    texts: tuple[str, ...] | None = None,
) -> Given:
    """Reads a protocol's captions and real images from the folder as it was downloaded.

    Args:
      protocol: which.
      data: the folder.
      limit: score this many images only; parts of the data will do then.
      with_real: whether real images are needed.
      texts: captions to use instead of those that the protocol chooses.
    Raises:
      UserError: for data that is missing, damaged or not whole.
    """
    return _READERS[protocol.name](protocol, data, limit, with_real, texts)


def _coco(protocol, data, limit, with_real, texts) -> Given:
    whole = coco.read(data)
    if not whole.whole and limit is None:
        raise UserError(
            f"{data} holds {len(whole.files):,} images and {len(whole.captions):,} captions, "
            f"{protocol.name} is over COCO-2014's {coco.IMAGES:,} and {coco.CAPTIONS:,}: download "
            "all, or try out with a part by --limit=N"
        )
    count = protocol.captions.count
    if texts is None:
        captions = whole.choose(min(count, limit or count), protocol.captions.seed)
    else:
        chosen = texts[: min(count, limit or count)]
        if len(chosen) < min(count, limit or count):
            raise UserError(
                f"{len(chosen):,} captions are given, {protocol.name} takes "
                f"{min(count, limit or count):,}: give as many, or try out with --limit=N"
            )
        captions = CaptionList(
            tuple(coco.Caption(i, 0, text) for i, text in enumerate(chosen)),
            files.sha256_of(list(texts)),
        )
    real = whole.images if with_real else None
    return Given(protocol, data, limit, captions, captions.hash, real)


def _div2k(protocol, data, limit, with_real, texts) -> Given:
    both = pairs.read(data)
    real, low = both.high, both.low
    if limit:
        some = range(min(limit, len(real)))
        real, low = real.take(some), low.take(some)
    elif len(real) != protocol.reference_count:
        raise UserError(
            f"{data} holds {len(real):,} pairs, {protocol.name} is over "
            f"{protocol.reference_count:,}: give all, or try out with --limit=N"
        )
    _no_texts(protocol, texts)
    return Given(protocol, data, limit, None, None, real, low=low)


def _dreambench(protocol, data, limit, with_real, texts) -> Given:
    bench = dreambench.read(data)
    _no_texts(protocol, texts)
    if limit is None and bench.hash != protocol.captions.hash:
        raise UserError(
            f"{data} holds {len(bench.classes)} subjects, and classes and prompts of the hash "
            f"{bench.hash}; DreamBench has {dreambench.SUBJECTS}, and {protocol.captions.hash}: "
            f"get it from {dreambench.URL}, or try out with --limit=N prompts"
        )
    return Given(protocol, data, limit, None, bench.hash, bench.images, bench)


_READERS: dict[str, Callable[..., Given]] = {
    "coco30k": _coco, "coco5k": _coco, "div2k-sr": _div2k, "dreambench": _dreambench,
}  # fmt: skip


def _no_texts(protocol: Protocol, texts: tuple[str, ...] | None) -> None:
    if texts is not None:
        raise UserError(f"--captions is for COCO's protocols: {protocol.name} has its own")


def task(given: Given, images: Path, reference: Path | None = None) -> Task:
    """The images of a folder, scored by a protocol.

    Args:
      given: the protocol and its data.
      images: the folder; how files are named there see `coco.arrange`, `pairs.match` and
        `dreambench.generated`.
      reference: a file of statistics instead of the real images.
    Raises:
      UserError: for images that are missing or of nothing.
    """
    protocol = given.protocol
    if protocol.name == "dreambench":
        made = dreambench.generated(images, given.bench, given.limit)
        subjects = (made.subjects, given.bench.subjects)
        return Task(ImageSet(made.images), ImageSet(given.real), made.captions, subjects)
    real = reference if given.real is None else ImageSet(given.real, protocol.side)
    folder = image_folder.listing(images)
    if protocol.captions is None:
        if given.limit:
            folder = _same_names(folder, given.real)
        return Task(ImageSet(pairs.match(folder, given.real), protocol.side), real)
    folder = coco.arrange(folder, given.captions.captions)
    return Task(
        ImageSet(folder, protocol.side), real, given.captions.texts,
        real_count=None if given.limit else protocol.reference_count,
    )


def _same_names(folder: ImageFolder, real: ImageFolder) -> ImageFolder:
    have, wanted = pairs.by_stem(folder), pairs.by_stem(real)
    return dataclasses.replace(
        folder, names=tuple(name for stem, name in have.items() if stem in wanted))


def captions_in(path: Path, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Captions in a file: .txt, one a line in the order of the images' names, or .json, a table of
    image name to caption.

    Args:
      path: the file.
      names: of the images, for .json.
    Raises:
      UserError: for a file that cannot be read or lacks an image.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            # At line feeds alone: captions of the web hold other characters that part lines.
            lines = text.removesuffix("\n").split("\n") if text else ()
            return tuple(line.strip() for line in lines)
        table = json.loads(text)
    except OSError as e:
        raise UserError(f"cannot read the captions in {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise UserError(
            f"cannot read the captions in {path} ({e}): give UTF-8 text, a line for each image, or "
            "a .json table of image name to caption"
        ) from e
    if not isinstance(table, dict):
        raise UserError(f"{path} is no table of image name to caption: give one, or a .txt")
    lacks = [name for name in names or () if not isinstance(table.get(name), str)]
    if names is None or lacks:
        what = f"no caption of {lacks[0]} ({len(lacks)} are missing)" if lacks else "no order"
        raise UserError(f"{path} says {what}: give one of each image, or a .txt with a line for it")
    return tuple(table[name] for name in names)


def text() -> str:
    """The table, for people and for docs/evaluate.md."""
    out = []
    for p in PROTOCOLS.values():
        captions = f"{p.captions.count:,} of {p.captions.file}" if p.captions else "none"
        guidance = "no guidance" if p.guidance == 1 else f"guidance {p.guidance:g}"
        out += [
            f"{p.name}", f"  captions   {captions}",
            *([f"             {p.captions.selection}, seed {p.captions.seed}"]
              if p.captions and p.captions.seed is not None else []),
            f"  images     {f'{p.side} px, ' if p.side else ''}{p.resizer}",
            f"  reference  {p.reference}",
            f"  metrics    {', '.join(p.metrics)}",
            f"  drawn by   {p.sampler}, {p.steps} steps, {guidance}",
        ]
    return "\n".join(out)
