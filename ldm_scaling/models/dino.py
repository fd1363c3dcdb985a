"""DINO and DINOv2: vision transformers trained without labels, as frozen feature networks.

DINO (arXiv 2104.14294) measures the likeness of subjects as DreamBooth does, DINOv2 (arXiv
2304.07193) gives the features of FD-DINOv2 (arXiv 2306.04675).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import dino_vit, pretrained
from ldm_scaling.models.dino_vit import Vit, VitSpec

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pictures in 0..1
LAYER = "class"

# patch, width, layers, heads, MLP, side; named as on torch hub.
PRESETS = {
    "dino_vits16": VitSpec(16, 384, 12, 6, 1536, 224),
    "dino_vits8": VitSpec(8, 384, 12, 6, 1536, 224),
    "dino_vitb16": VitSpec(16, 768, 12, 12, 3072, 224),
    "dino_vitb8": VitSpec(8, 768, 12, 12, 3072, 224),
    "dinov2_vits14": VitSpec(14, 384, 12, 6, 1536, 518, layer_scale=True),
    "dinov2_vitb14": VitSpec(14, 768, 12, 12, 3072, 518, layer_scale=True),
    "dinov2_vitl14": VitSpec(14, 1024, 24, 16, 4096, 518, layer_scale=True),
    "dinov2_vitg14": VitSpec(14, 1536, 40, 24, 4096, 518, layer_scale=True, gated=True),
}
# (file at https://dl.fbaipublicfiles.com, repository at https://huggingface.co)
SOURCES = {
    "dino_vits16": ("dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "dino-vits16"),
    "dino_vits8": ("dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", "dino-vits8"),
    "dino_vitb16": ("dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "dino-vitb16"),
    "dino_vitb8": ("dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", "dino-vitb8"),
    "dinov2_vits14": ("dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", "dinov2-small"),
    "dinov2_vitb14": ("dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "dinov2-base"),
    "dinov2_vitl14": ("dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "dinov2-large"),
    "dinov2_vitg14": ("dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth", "dinov2-giant"),
}


# --- pictures ---------------------------------------------------------------------------------


def crop(picture_HWC: np.ndarray) -> np.ndarray:
    """The shorter side to 256 by Pillow's bicubic, then the middle 224 x 224, uint8.

    The evaluation of both: DINO's eval_knn.py, DINOv2's `make_classification_eval_transform`; the
    rounding is torchvision's.
    """
    height, width = picture_HWC.shape[:2]
    short = min(height, width)
    height, width = (256 if n == short else int(256 * n / short) for n in (height, width))
    resized_HWC = np.asarray(_resize(picture_HWC, height, width))
    top, left = (round((n - SIDE) / 2) for n in (height, width))
    return resized_HWC[top : top + SIDE, left : left + SIDE]


def squeeze(picture_HWC: np.ndarray) -> np.ndarray:
    """To 224 x 224 whatever the shape, by Pillow's bicubic, uint8: what the authors of FD-DINOv2 do
    (dgm-eval, models/dinov2.py, without its option `--clean_resize`).
    """
    return np.asarray(_resize(picture_HWC, SIDE, SIDE))


def _resize(picture_HWC: np.ndarray, height: int, width: int) -> Image.Image:
    return Image.fromarray(picture_HWC).resize((width, height), Image.Resampling.BICUBIC)


PREPROCESSING: dict[str, Callable[[np.ndarray], np.ndarray]] = {"crop": crop, "squeeze": squeeze}


def scale(pictures_BHWC: jax.Array) -> jax.Array:
    """uint8 pictures to what the networks take."""
    return (pictures_BHWC / jnp.float32(255) - jnp.array(MEAN)) / jnp.array(STD)


# --- the feature network ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class DinoNetwork:
    """Pictures to features, in batches of `batch` at 224 x 224, spread over devices; make one with
    `load`.
    """

    name: str
    spec: VitSpec
    preprocessing: str
    offset: float
    batch: int
    weights_hash: str
    params: Any = dataclasses.field(repr=False)
    sharding: jax.sharding.Sharding = dataclasses.field(repr=False)
    _apply: Any = dataclasses.field(repr=False)

    def layer_hash(self, layer: str = LAYER) -> str:
        """Hash of all that decides a layer's features: weights, sizes, preprocessing, positions.

        Raises `UserError` for another layer than "class".
        """
        if layer != LAYER:
            raise UserError(f"{self.name} has the layer {LAYER!r}, not {layer!r}")
        choices = [layer, self.preprocessing, self.offset, SIDE, MEAN, STD]
        return sha256_of([self.weights_hash, self.spec, *choices])

    def describe(self, layer: str = LAYER) -> str:
        """The features' name, for reports."""
        return f"{self.name}, {layer} token ({self.spec.width} features), {self.preprocessing}"

    def features(self, pictures: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """uint8 pictures [H, W, 3], of any sizes, to {"class": [N, D]} float32: the class token
        after the last norm. One compilation. Raises `UserError` on other inputs.
        """
        prepare, rows = PREPROCESSING[self.preprocessing], iter(pictures)
        done, n = [np.empty((0, self.spec.width), np.float32)], 0
        while some := [prepare(_checked(p)) for p in itertools.islice(rows, self.batch)]:
            n += len(some)
            fill = ((0, self.batch - len(some)), (0, 0), (0, 0), (0, 0))
            pictures_BHWC = np.pad(np.stack(some), fill, mode="edge")
            done.append(self._apply(self.params, jax.device_put(pictures_BHWC, self.sharding)))
            # The device works on this batch while the host prepares the next one.
            done[-2] = np.asarray(done[-2])
        return {LAYER: np.concatenate(done)[:n]}


def _checked(picture: np.ndarray) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(
            f"DINO takes uint8 pictures [H, W, 3] in 0..255, not {picture.dtype} {picture.shape}"
        )
    return picture


def load(
    path: str | os.PathLike[str],
    model: str | VitSpec,
    preprocessing: str = "crop",
    *,
    offset: float = 0.1,
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> DinoNetwork:
    """The network whose weights lie at `path`.

    Args:
      path: the authors' .pth (read through torch), the same as .safetensors, or a folder of
        transformers with config.json and model.safetensors.
      model: one of `PRESETS`, or the sizes of another.
      preprocessing: "crop" or "squeeze"; FD-DINOv2 is dinov2_vitl14 with "squeeze".
      offset: how positions are resampled (`dino_vit.resampling`): 0.1 as the authors' code does,
        whose features published numbers come from, 0 as transformers. DINOv2 always resamples at
        224, DINO never.
      batch: pictures in one pass, a multiple of the devices; by default 8 for each CPU device and
        128 for each accelerator.
      devices: what to spread each pass over, by default all of this process.

    Raises:
      UserError: for names that are unknown, a batch that does not divide, and weights that are
        missing or do not fit.
    """
    if not isinstance(model, VitSpec) and model not in PRESETS:
        raise UserError(f"no DINO is called {model!r}; these are: {', '.join(PRESETS)}")
    if preprocessing not in PREPROCESSING:
        raise UserError(
            f"DINO's pictures are prepared by {' or '.join(PREPROCESSING)}, not {preprocessing!r}"
        )
    devices = jax.local_devices() if devices is None else list(devices)
    batch = batch or len(devices) * (8 if devices[0].platform == "cpu" else 128)
    if batch < 1 or batch % len(devices):
        raise UserError(f"a batch of {batch} does not divide over {len(devices)} devices")
    path = Path(path)
    name, spec = ("ViT", model) if isinstance(model, VitSpec) else (model, PRESETS[model])
    if not path.exists():
        raise UserError(f"there are no weights of {name} at {path}{_remedy(name)}")
    config = path / "config.json"
    if config.is_file():
        spec = _agreed(config, name, spec)
    params = dino_vit.params_of(spec, pretrained.read_weights(path), path)
    network = Vit(spec, offset)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @jax.jit
    def apply(params, pictures_BHWC):
        return network.apply({"params": params}, scale(pictures_BHWC))["class"]

    return DinoNetwork(
        name=name,
        spec=spec,
        preprocessing=preprocessing,
        offset=offset,
        batch=batch,
        weights_hash=pretrained.hash_of(params),
        params=jax.device_put(params, everywhere),
        sharding=everywhere.update(spec=jax.sharding.PartitionSpec("data")),
        _apply=apply,
    )


def _remedy(name: str) -> str:
    if name not in SOURCES:
        return ""
    file, repository = SOURCES[name]
    return (
        f": fetch https://dl.fbaipublicfiles.com/{file} (reading it needs torch), or config.json "
        f"and model.safetensors of facebook/{repository} from https://huggingface.co into a folder"
    )


def _agreed(config: Path, name: str, spec: VitSpec) -> VitSpec:
    """The spec with the config's epsilon, once everything else agrees."""
    try:
        table = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {config} ({e}): fetch it again") from e
    found = dino_vit.spec_of(table, config)
    if dataclasses.replace(found, eps=spec.eps) != spec:
        raise UserError(f"{config} describes {found}, but {name} is {spec}")
    return found
