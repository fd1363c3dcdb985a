"""CLIP's image tower: pictures to the embeddings that CLIP scores, CMMD and CLIP-I compare."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import clip, clip_checkpoint, pretrained, spread
from ldm_scaling.models.clip import ImageSpec
from ldm_scaling.models.pretrained import Rule, linear


class ImageTower(nn.Module):
    """Scaled pictures [B, side, side, 3] to a dict, float32 at precision "highest":

    `tokens` [B, patches, D]: the patches after the last block, row by row, without a norm;
    `pooled` [B, D]: the class token after the final norm;
    `projected` [B, P], where the spec has a projection: the embedding, of any length.
    """

    spec: ImageSpec

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        s = self.spec
        batch, rows = len(x_BHWC), s.side // s.patch
        # A convolution whose stride is its side is a product with each patch, laid out flat.
        x = x_BHWC.reshape(batch, rows, s.patch, rows, s.patch, 3).swapaxes(2, 3)
        patches = nn.Dense(s.width, use_bias=False, precision="highest", name="patches")
        x_BLD = patches(x.reshape(batch, rows**2, -1))
        normal = nn.initializers.normal(0.02)
        class_D = self.param("class_token", normal, (s.width,), jnp.float32)
        positions_LD = self.param("positions", normal, (rows**2 + 1, s.width), jnp.float32)
        class_BLD = jnp.broadcast_to(class_D, (batch, 1, s.width))
        x_BLD = jnp.concatenate([class_BLD, x_BLD], axis=1) + positions_LD
        x_BLD = clip.layer_norm(s.eps, jnp.float32, "norm_before")(x_BLD)
        for i in range(s.layers):
            x_BLD = clip.Block(s, causal=False, name=f"block_{i}")(x_BLD)
        pooled_BD = clip.layer_norm(s.eps, jnp.float32, "norm")(x_BLD[:, 0])
        out = {"tokens": x_BLD[:, 1:], "pooled": pooled_BD}
        if s.projection is not None:
            project = nn.Dense(
                s.projection, use_bias=False, precision="highest", name="projection"
            )
            out["projected"] = project(pooled_BD)
        return out


def _patches(t_OIHW: np.ndarray) -> np.ndarray:
    return t_OIHW.transpose(2, 3, 1, 0).reshape(-1, t_OIHW.shape[0])


_EMBEDDINGS = r"(?:vision_model\.)?embeddings\."
RULES = (
    Rule(
        rf"{_EMBEDDINGS}patch_embedding\.weight|visual\.conv1\.weight", "patches/kernel", _patches
    ),
    Rule(rf"{_EMBEDDINGS}class_embedding|visual\.class_embedding", "class_token"),
    Rule(rf"{_EMBEDDINGS}position_embedding\.weight|visual\.positional_embedding", "positions"),
    # transformers spells it so
    *clip.norm_rules(r"(?:vision_model\.)?pre_layrnorm|visual\.ln_pre", "norm_before"),
    *clip.block_rules(r"(?:vision_model\.)?encoder\.layers|visual\.transformer\.resblocks"),
    *clip.norm_rules(r"(?:vision_model\.)?post_layernorm|visual\.ln_post", "norm"),
    Rule(r"visual_projection\.weight", "projection/kernel", linear),
    Rule(r"visual\.proj", "projection/kernel"),
)
IGNORE = (
    *clip.IGNORE, r"text_model\..*", r"text_projection(\.weight)?", r"transformer\..*",
    r"ln_final\..*", r"token_embedding\.weight", "positional_embedding",
)  # fmt: skip


# --- pictures ---------------------------------------------------------------------------------

# How a picture that is not square, or of another size, becomes one of side * side.
FITS = {
    "transformers": "short side resized, then the centre, its odd pixel left at the end",
    "open_clip": "short side resized, then the centre by torchvision: round(margin / 2)",
    "squash": "both sides resized, proportions lost",
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Pictures as their model saw them in training: Pillow's bicubic on uint8 (antialiased), one
    of `FITS`, then (x / 255 - mean) / std by channel.
    """

    side: int
    fit: str = "transformers"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self):
        if self.fit not in FITS:
            raise UserError(f"a picture is fitted by one of {', '.join(FITS)}, not {self.fit!r}")

    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to float32 [side, side, 3], equal to CLIPImageProcessor (Pillow's) and to
        open_clip's transform. Raises `UserError` on other inputs.
        """
        image_HWC = np.asarray(image_HWC)
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise UserError(
                "CLIP takes uint8 pictures [H, W, 3] in 0..255, not "
                f"{image_HWC.dtype} {image_HWC.shape}"
            )
        return self.scale(self.resize(image_HWC))

    def resize(self, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [side, side, 3]."""
        height, width, _ = image_HWC.shape
        short = min(height, width)
        size = tuple(int(self.side * n / short) for n in (height, width))
        if self.fit == "squash":
            size = (self.side, self.side)
        if size != (height, width):
            image = Image.fromarray(image_HWC).resize(size[::-1], Image.Resampling.BICUBIC)
            image_HWC = np.asarray(image)
        half = round if self.fit == "open_clip" else int
        top, left = (half((n - self.side) / 2) for n in size)
        return image_HWC[top : top + self.side, left : left + self.side]

    def scale(self, image_HWC: np.ndarray) -> np.ndarray:
        """0..255 to the network's input, float32. Takes any shape [..., 3]."""
        x_HWC = (np.asarray(image_HWC, np.float64) * (1 / 255)).astype(np.float32)
        return (x_HWC - np.float32(self.mean)) / np.float32(self.std)


def _preprocess(checkpoint: clip_checkpoint.Checkpoint, side: int, fit: str | None) -> Preprocess:
    """What the files beside the weights say on pictures; `fit` overrules them."""
    name, stored_fit = {
        "transformers": ("preprocessor_config.json", "transformers"),
        "open_clip": ("open_clip_config.json", "open_clip"),
    }[checkpoint.layout]
    file = checkpoint.folder / name
    c = clip_checkpoint.read_json(file) if file.is_file() else {}
    if checkpoint.layout == "open_clip":
        c = {f"image_{k}" if k in ("mean", "std") else k: v
             for k, v in (c.get("preprocess_cfg") or {}).items()}  # fmt: skip
        stored_fit = "squash" if c.get("resize_mode") == "squash" else stored_fit
    known = {
        "do_resize": (True,), "do_center_crop": (True,), "do_rescale": (True,),
        "do_normalize": (True,), "resample": (3,), "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}), "interpolation": ("bicubic",),
        "resize_mode": ("shortest", "squash"),
    }  # fmt: skip
    for key, values in known.items():
        if fit is None and key in c and c[key] not in values:
            raise UserError(
                f"{file}: {key}={c[key]!r} is not supported, {values[-1]!r} is; to overrule it, "
                f"name how pictures are fitted: {', '.join(FITS)}"
            )
    mean, std = tuple(c.get("image_mean", MEAN)), tuple(c.get("image_std", STD))
    return Preprocess(side, fit or stored_fit, mean, std)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipImage:
    """Pictures to features, in batches spread over devices; make one with `load_image`."""

    spec: ImageSpec
    preprocess: Preprocess
    spread: spread.Spread
    weights_hash: str
    _params: Any = dataclasses.field(repr=False)
    _apply: Callable = dataclasses.field(repr=False)

    @property
    def layers(self) -> dict[str, int]:
        """Width of each layer's features."""
        s = self.spec
        projected = {} if s.projection is None else {"projected": s.projection}
        return {"pooled": s.width, "tokens": s.width, **projected}

    def layer_hash(self, layer: str) -> str:
        """Hash of all that decides a layer's features: weights, sizes, layer, preprocessing.

        Raises:
          UserError: for a layer that this tower does not have.
        """
        self._check(layer)
        return sha256_of(["CLIP", self.weights_hash, self.spec, layer, self.preprocess])

    @property
    def hash(self) -> str:
        """The hash of the embedding, or of the pooled state of a tower without a projection."""
        return self.layer_hash("pooled" if self.spec.projection is None else "projected")

    def describe(self, layer: str) -> str:
        """The features' name, for reports."""
        s, p = self.spec, self.preprocess
        same = [name for name, model in clip.PUBLISHED.items() if model.image == s]
        name = same[0] if same else f"({s.layers} layers, width {s.width}, patch {s.patch})"
        return f"CLIP {name}, {layer} ({self.layers[layer]} features), {p.side} px, {FITS[p.fit]}"

    def features(
        self, images: Sequence[np.ndarray], layers: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """uint8 pictures [H, W, 3], each of any size, to the outputs of `ImageTower` that `layers`
        lists (all but `tokens` if None), float32.

        Raises:
          UserError: for other inputs, and for a layer that this tower does not have.
        """
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def some(rows):
                return np.stack(list(pool.map(self.preprocess, images[rows])))

            return self._run(some, len(images), layers)

    def features_of_scaled(
        self, x_BHWC: np.ndarray, layers: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The same of pictures that were resized and scaled (`Preprocess.scale`) elsewhere:
        float32 [B, side, side, 3].
        """
        side = self.spec.side
        if np.shape(x_BHWC)[1:] != (side, side, 3):
            raise UserError(f"this CLIP takes [B, {side}, {side}, 3], not {np.shape(x_BHWC)}")
        return self._run(lambda rows: np.asarray(x_BHWC[rows], np.float32), len(x_BHWC), layers)

    def _run(self, inputs, n, layers):
        layers = tuple(layers or (name for name in self.layers if name != "tokens"))
        for layer in layers:
            self._check(layer)
        side, batch = self.spec.side, self.spread.batch

        def some(rows):
            x_BHWC = inputs(rows) if n else np.zeros((0, side, side, 3), np.float32)
            return np.pad(x_BHWC, ((0, batch - len(x_BHWC)), (0, 0), (0, 0), (0, 0)))

        def run(x_BHWC):
            return self._apply(self._params, x_BHWC, layers)

        return clip.in_batches(run, some, n, self.spread)

    def _check(self, layer):
        if layer not in self.layers:
            raise UserError(f"this CLIP has the layers {', '.join(self.layers)}, not {layer!r}")


def abstract_params(spec: ImageSpec) -> Any:
    """Shapes of a tower's parameters."""
    picture = jax.ShapeDtypeStruct((1, spec.side, spec.side, 3), jnp.float32)
    return jax.eval_shape(ImageTower(spec).init, jax.random.key(0), picture)["params"]


def load_image(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    fit: str | None = None,
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> ClipImage:
    """A pretrained image tower.

    Args:
      path: a folder of transformers or of OpenCLIP, or the file of weights in it.
      model: one of `clip.PUBLISHED`, needed where no config lies beside the weights.
      fit: one of `FITS`; None for what the files beside the weights say.
      batch: pictures in one pass, a multiple of the devices; by default 8 for each CPU device and
        128 for each accelerator.
      devices: what to spread each pass over, by default all of this process.

    Raises:
      UserError: for a batch that does not divide; for files that are missing, broken or of
        something else, with what to fetch from where; for tensors that do not fit, with a diff.
    """
    spread_ = spread.over(devices, batch, cpu=8, accelerator=128)
    checkpoint = clip_checkpoint.read(path, "image", IGNORE, model)
    spec = clip_checkpoint.spec_of(checkpoint, "image", model)
    preprocess = _preprocess(checkpoint, spec.side, fit)
    tower = ImageTower(spec)
    params = pretrained.fill(
        abstract_params(spec), checkpoint.tensors, RULES, source=checkpoint.path
    )

    def apply(params, x_BHWC, layers):
        out = tower.apply({"params": params}, x_BHWC)
        return {layer: out[layer] for layer in layers}

    return ClipImage(
        spec=spec,
        preprocess=preprocess,
        spread=spread_,
        weights_hash=pretrained.hash_of(params),
        _params=spread_.everywhere(params),
        _apply=spread_.jit(apply, static_argnums=2),
    )
