"""What scores are computed with: feature networks, from the weights on disk, and measures of pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.metrics import fidelity
from ldm_scaling.models import clip, clip_image, clip_text, dino, efficientnet, inception, lpips

# What EfficientNet-Lite0 sees here: its own side, whatever the image's.
EFFNET_SIDE = 224
EFFNET_RESIZER = f"Pillow's bicubic to {EFFNET_SIDE} px, proportions lost, 8 bits"


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network in memory.

    Attributes:
      run: what the extractor `takes`, N of them, to layer -> features [N, D], float32.
      hash_of: hash of all that decides a layer's features, as `files.sha256_of` makes it.
      describe: a layer's name, for people.
    """

    run: Callable[[Sequence[np.ndarray]], Mapping[str, np.ndarray]]
    hash_of: Callable[[str], str]
    describe: Callable[[str], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """What embeds captions where a network embeds images.

    Attributes:
      sentence: N texts to embeddings [N, width], float32.
      hash: hash of all that decides them.
      width: how many numbers each has.
    """

    sentence: Callable[[Sequence[str]], np.ndarray]
    hash: str
    width: int


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that can be had.

    Attributes:
      weights: names in `weights.PUBLISHED`; none where a package of Python brings them.
      resizer: how an image is brought to the network's side.
      load: their paths to the network.
      takes: what the network runs on, uint8 images [H, W, 3] of any sizes: "images"; "pairs" of a
        generated image and its real one, [2, H, W, 3], of one size; or "captions", tuples of an
        image and its caption.
      layers: its outputs; none where they are not known before it runs.
      words: the same paths to what embeds captions beside it; None where nothing does.
    """

    weights: tuple[str, ...]
    resizer: str
    load: Callable[..., Network]
    takes: Literal["images", "pairs", "captions"] = "images"
    layers: tuple[str, ...] = ()
    words: Callable[..., Words] | None = None


def _by_size(
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """`run`, which takes one array, on images of any sizes."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    out: dict[str, np.ndarray] = {}
    for some in places.values():
        for layer, value_ND in run(np.stack([images[i] for i in some])).items():
            whole = out.setdefault(layer, np.empty((len(images), value_ND.shape[1]), np.float32))
            whole[some] = value_ND
    return out


def _inception(convention: str, path: Path) -> Network:
    network = inception.load(path, convention)
    return Network(network.features, network.layer_hash, network.describe)


def _effnet() -> Network:
    network = efficientnet.load(EFFNET_SIDE)

    def fit(image_HWC: np.ndarray) -> np.ndarray:
        if image_HWC.shape[:2] == (EFFNET_SIDE, EFFNET_SIDE):
            return image_HWC
        image = Image.fromarray(image_HWC)
        return np.asarray(image.resize((EFFNET_SIDE,) * 2, Image.Resampling.BICUBIC))

    return Network(
        lambda images: network.features(np.stack([fit(image) for image in images])),
        lambda layer: sha256_of([network.layer_hash(layer), EFFNET_RESIZER]),
        lambda layer: f"{network.describe(layer)}, {EFFNET_RESIZER}",
    )


def _clip(model: str, path: Path) -> Network:
    network = clip_image.load_image(path)
    wanted = clip.PUBLISHED[model]
    if any(getattr(network.spec, size) != getattr(wanted.image, size) for size in _SIZES):
        found = network.describe("pooled").partition(", pooled")[0]
        raise UserError(
            f"{path} holds {found}, not {model}: put the files of "
            f"https://huggingface.co/{wanted.repository} there"
        )
    run = functools.partial(network.features, layers=("projected",))
    return Network(run, network.layer_hash, network.describe)


def _dino(model: str, preprocessing: str, path: Path) -> Network:
    network = dino.load(path, model, preprocessing)
    return Network(network.features, network.layer_hash, network.describe)


def _lpips(name: str, path: Path | None = None) -> Network:
    network = lpips.load(name, path)

    def run(pairs_BPHWC: np.ndarray) -> dict[str, np.ndarray]:
        return {"distance": network.distance(pairs_BPHWC[:, 0], pairs_BPHWC[:, 1])[:, None]}

    return Network(
        functools.partial(_by_size, run), lambda layer: network.hash(),
        lambda layer: network.describe(),
    )  # fmt: skip


# Layer to measure, and whether it is of the luma alone.
_MEASURES = {
    "psnr": (fidelity.psnr, False), "psnr_y": (fidelity.psnr, True),
    "ssim": (fidelity.ssim, False), "ssim_y": (fidelity.ssim, True),
}  # fmt: skip
_MEASURED = "8 bits, no border left out"


def _fidelity() -> Network:
    def run(pairs_BPHWC: np.ndarray) -> dict[str, np.ndarray]:
        return {  # An SSIM is at most 1.
            layer: np.minimum(
                measure(pairs_BPHWC[:, 0], pairs_BPHWC[:, 1], luma), fidelity.MOST_PSNR
            )[:, None]
            for layer, (measure, luma) in _MEASURES.items()
        }

    def describe(layer: str) -> str:
        measure, luma = _MEASURES[layer]
        over = "the luma of ITU-R BT.601, 16 to 235" if luma else "three colours"
        how = f"window {fidelity.WINDOW}, sigma {fidelity.SIGMA}"
        if measure is fidelity.psnr:
            how = f"{fidelity.MOST_PSNR:g} dB for two that are the same"
        return f"{over}, {_MEASURED}, {how}"

    return Network(
        functools.partial(_by_size, run), lambda layer: sha256_of([layer, describe(layer)]),
        describe,
    )


def _words(path: Path) -> Words:
    """CLIP's text tower; texts become tokens as OpenAI and OpenCLIP do it.

    Raises `UserError` as `clip_text.load_text`, and for weights without the projection.
    """
    tower = clip_text.load_text(path, behaviour="open_clip")
    if tower.spec.projection is None:
        raise UserError(
            f"{path} holds no projection of texts: CLIP scores need the whole checkpoint"
        )
    return Words(tower.sentence, tower.hash, tower.spec.projection)


# What tells the models of CLIP apart.
_SIZES = ("side", "patch", "width", "layers")
_CLIP_RESIZER = "Pillow's bicubic, short side, centre, 8 bits"
EXTRACTORS: dict[str, Extractor] = {
    **{
        f"inception_{short}": Extractor(
            ("inception",), inception.CONVENTIONS[convention].resizer,
            functools.partial(_inception, convention), layers=tuple(inception.LAYERS),
        )
        for short, convention in (
            ("tf2015", "fid_tf2015"), ("clean", "clean_fid"), ("pytorch", "pytorch_fid")
        )
    },
    "effnetlite0": Extractor(
        (), EFFNET_RESIZER, _effnet, layers=tuple(efficientnet.LAYERS)
    ),
    **{
        name: Extractor(
            (name,), _CLIP_RESIZER, functools.partial(_clip, model), layers=("projected",),
            words=_words,
        )
        for name, model in (
            ("clip_b32", "ViT-B/32"), ("clip_l14", "ViT-L/14"), ("clip_l14_336", "ViT-L/14@336"),
            ("clip_g14", "ViT-g/14"),
        )
    },
    "dinov2_l14": Extractor(
        ("dinov2_l14",), "Pillow's bicubic, proportions lost, 8 bits",
        functools.partial(_dino, "dinov2_vitl14", "squeeze"), layers=(dino.LAYER,),
    ),
    "dino_s16": Extractor(
        ("dino_s16",), _CLIP_RESIZER, functools.partial(_dino, "dino_vits16", "crop"),
        layers=(dino.LAYER,),
    ),
    **{
        f"lpips_{name}": Extractor(
            needs, "none", functools.partial(_lpips, name), "pairs", ("distance",)
        )
        for name, needs in (
            ("alex", ("alexnet",)), ("vgg", ("vgg16",)), ("alex_shift_tolerant", ()),
            ("vgg_shift_tolerant", ()),
        )
    },
    "fidelity": Extractor((), "none", _fidelity, "pairs", tuple(_MEASURES)),
}  # fmt: skip
_OURS = dict(EXTRACTORS)


def load(name: str, found: Mapping[str, Path]) -> Network:
    """The network of an extractor, by the paths of its weights.

    What hashes of one's own tell apart is up to who wrote them: here those of two layers or
    extractors are never the same.
    """
    extractor = EXTRACTORS[name]
    network = extractor.load(*(found[weight] for weight in extractor.weights))
    if extractor is _OURS.get(name):
        return network
    return dataclasses.replace(
        network, hash_of=lambda layer: sha256_of([name, layer, network.hash_of(layer)]))


def layer_of(found: Mapping[str, np.ndarray], layer: str, name: str) -> np.ndarray:
    """The features of one layer of what a network gave. Raises `UserError` where it is not there.
    """
    if layer not in found:
        raise UserError(
            f"the extractor {name!r} has no layer {layer!r}, it has {', '.join(found)}: mend the "
            "row of scores.SCORES"
        )
    return found[layer]
