"""The feature network of FID, KID and IS: Inception v3 as TensorFlow's graph of 2015-12-05 has it.

Architecture: arXiv 1512.00567 with the graph's own ways, as torch-fidelity and pytorch-fid have
them: 1008 classes, average pools that leave the padding out of the mean, and a maximum instead of
an average in the pool branch of the last block. The names are those of the published file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import pretrained, resize
from ldm_scaling.models.pretrained import Rule, conv, linear

NAME = "Inception-2015-12-05"
SIDE = 299
LAYERS = {"pool": 2048, "logits_unbiased": 1008}
# The same bytes under two names: torch-fidelity's and pytorch-fid's.
URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
)
PUBLISHED = "6726825d0af5f729"  # their SHA-256 begins so


class Convention(NamedTuple):
    """How pixels of 0..255 reach the network: resized, then x / divisor - 1."""

    resizer: str
    divisor: float


CONVENTIONS = {
    "fid_tf2015": Convention("tf1_bilinear", 128.0),  # the graph itself, torch-fidelity
    "clean_fid": Convention("clean_fid", 128.0),  # clean-fid, mode="clean"
    "pytorch_fid": Convention("torch_bilinear", 127.5),  # pytorch-fid; clean-fid's legacy_pytorch
}


# --- the network -------------------------------------------------------------------------------


def _conv(
    x_BHWC: jax.Array, name: str, width: int, kernel: tuple[int, int] = (3, 3),
    stride: int = 1, padding: str = "SAME",
) -> jax.Array:  # fmt: skip
    """Convolution and ReLU; the batch norm between them is folded into kernel and bias."""
    # XLA:CPU takes 2.5 to 5 times as long for a convolution of stride 1 that is not padded (80 to
    # 192 channels at 73 px, 32 to 32 at 149 px, of 8 pictures): pad it and cut the border off.
    crop = stride == 1 and padding == "VALID"
    x_BHWC = nn.Conv(
        width, kernel, stride, padding="SAME" if crop else padding, precision="highest", name=name
    )(x_BHWC)
    return jax.nn.relu(x_BHWC[:, 1:-1, 1:-1] if crop else x_BHWC)


class _Pointwise(nn.Module):
    width: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        kernel_IO = self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.width))
        return kernel_IO, self.param("bias", nn.initializers.zeros, (self.width,))


def _pointwise(x_BHWC: jax.Array, **widths: int) -> list[jax.Array]:
    """The 1x1 convolutions that read the same input, as one product; no ReLU yet."""
    weights = [_Pointwise(width, name=name)(x_BHWC.shape[-1]) for name, width in widths.items()]
    kernels, biases = zip(*weights)
    y_BHWC = jnp.dot(x_BHWC, jnp.concatenate(kernels, -1), precision="highest")
    y_BHWC = y_BHWC + jnp.concatenate(biases)
    ends = np.cumsum([0, *widths.values()])
    return [y_BHWC[..., a:b] for a, b in zip(ends, ends[1:])]


def _average(x_BHWC: jax.Array) -> jax.Array:
    """Mean of each 3x3 neighbourhood's pixels inside the map. The blocks take it after the 1x1
    convolution, with which it commutes, for there are fewer channels then.
    """
    return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x_BHWC: jax.Array) -> jax.Array:
    return nn.max_pool(x_BHWC, (3, 3), (2, 2))


class BlockA(nn.Module):
    """35x35: branches 1x1, 5x5, 3x3 twice, pool."""

    pool: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        one, five, three, pool = _pointwise(
            x_BHWC, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=self.pool
        )
        five = _conv(jax.nn.relu(five), "branch5x5_2", 64, (5, 5))
        three = _conv(jax.nn.relu(three), "branch3x3dbl_2", 96)
        three = _conv(three, "branch3x3dbl_3", 96)
        one, pool = jax.nn.relu(one), jax.nn.relu(_average(pool))
        return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        (double,) = _pointwise(x_BHWC, branch3x3dbl_1=64)
        double = _conv(jax.nn.relu(double), "branch3x3dbl_2", 96)
        double = _conv(double, "branch3x3dbl_3", 96, stride=2, padding="VALID")
        three = _conv(x_BHWC, "branch3x3", 384, stride=2, padding="VALID")
        return jnp.concatenate([three, double, _halve(x_BHWC)], -1)


class BlockC(nn.Module):
    """17x17: branches 1x1, 7x7 once and twice (as rows and columns), pool."""

    width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        width, row, column = self.width, (1, 7), (7, 1)
        one, seven, double, pool = _pointwise(
            x_BHWC, branch1x1=192, branch7x7_1=width, branch7x7dbl_1=width, branch_pool=192
        )
        seven = _conv(jax.nn.relu(seven), "branch7x7_2", width, row)
        seven = _conv(seven, "branch7x7_3", 192, column)
        double = _conv(jax.nn.relu(double), "branch7x7dbl_2", width, column)
        double = _conv(double, "branch7x7dbl_3", width, row)
        double = _conv(double, "branch7x7dbl_4", width, column)
        double = _conv(double, "branch7x7dbl_5", 192, row)
        one, pool = jax.nn.relu(one), jax.nn.relu(_average(pool))
        return jnp.concatenate([one, seven, double, pool], -1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        three, seven = _pointwise(x_BHWC, branch3x3_1=192, branch7x7x3_1=192)
        three = _conv(jax.nn.relu(three), "branch3x3_2", 320, stride=2, padding="VALID")
        seven = _conv(jax.nn.relu(seven), "branch7x7x3_2", 192, (1, 7))
        seven = _conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = _conv(seven, "branch7x7x3_4", 192, stride=2, padding="VALID")
        return jnp.concatenate([three, seven, _halve(x_BHWC)], -1)


class BlockE(nn.Module):
    """8x8: branches 1x1, 3x3 once and twice (each ending in a row beside a column), pool."""

    maximum: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        widths = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.maximum:
            one, three, double = _pointwise(x_BHWC, **widths)
            (pool,) = _pointwise(nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME"), branch_pool=192)
        else:
            one, three, double, pool = _pointwise(x_BHWC, **widths, branch_pool=192)
            pool = _average(pool)
        three = jax.nn.relu(three)
        double = _conv(jax.nn.relu(double), "branch3x3dbl_2", 384)
        ends = [
            _conv(x, name + side, 384, kernel)
            for x, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return jnp.concatenate([jax.nn.relu(one), *ends, jax.nn.relu(pool)], -1)


BLOCKS = {
    "Mixed_5b": (BlockA, 32), "Mixed_5c": (BlockA, 64), "Mixed_5d": (BlockA, 64),
    "Mixed_6a": (BlockB,),
    "Mixed_6b": (BlockC, 128), "Mixed_6c": (BlockC, 160), "Mixed_6d": (BlockC, 160),
    "Mixed_6e": (BlockC, 192),
    "Mixed_7a": (BlockD,),
    "Mixed_7b": (BlockE, False), "Mixed_7c": (BlockE, True),
}  # fmt: skip


class Inception(nn.Module):
    """Scaled pictures [B, 299, 299, 3] to `pool` [B, 2048], the mean of the last map, and
    `logits_unbiased` [B, 1008], the classes' logits without their bias (IS is defined on these).
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        x_BHWC = _conv(x_BHWC, "Conv2d_1a_3x3", 32, stride=2, padding="VALID")
        x_BHWC = _conv(x_BHWC, "Conv2d_2a_3x3", 32, padding="VALID")
        x_BHWC = _halve(_conv(x_BHWC, "Conv2d_2b_3x3", 64))
        x_BHWC = jax.nn.relu(_pointwise(x_BHWC, Conv2d_3b_1x1=80)[0])
        x_BHWC = _halve(_conv(x_BHWC, "Conv2d_4a_3x3", 192, padding="VALID"))
        for name, (block, *sizes) in BLOCKS.items():
            x_BHWC = block(*sizes, name=name)(x_BHWC)
        pool_BD = x_BHWC.mean((1, 2))
        classify = nn.Dense(LAYERS["logits_unbiased"], False, precision="highest", name="fc")
        return {"pool": pool_BD, "logits_unbiased": classify(pool_BD)}


# --- its weights -------------------------------------------------------------------------------


def _layout(t_OIHW: np.ndarray) -> np.ndarray:
    kernel_HWIO = conv(t_OIHW)
    return kernel_HWIO[0, 0] if kernel_HWIO.shape[:2] == (1, 1) else kernel_HWIO


_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_PLACES = {r"(Conv2d_\w+)": r"\1", r"(Mixed_\w+)\.(branch\w+)": r"\1/\2"}
RULES = (
    Rule(r"fc\.weight", "fc/kernel", linear),
    *(Rule(rf"{a}\.conv\.weight", f"{b}/kernel", _layout) for a, b in _PLACES.items()),
    *(
        Rule(rf"{a}\.bn\.{theirs}", f"{b}/{ours}")
        for a, b in _PLACES.items()
        for theirs, ours in _NORM.items()
    ),
)
IGNORE = (r"fc\.bias", r".*\.num_batches_tracked")


def _with_norm(node: Any) -> Any:
    """What the file holds for a convolution of ours: a kernel, and a norm instead of a bias."""
    return {"kernel": node["kernel"], **dict.fromkeys(_NORM.values(), node["bias"])}


def _fold(node: Any) -> Any:
    """The convolution's kernel and bias that do its norm's work (eps 1e-3), by float64."""
    kernel, scale, bias, mean, var = (
        node[k].astype(np.float64) for k in ("kernel", "scale", "bias", "mean", "var")
    )
    gain = scale / np.sqrt(var + 1e-3)
    folded = {"kernel": kernel * gain, "bias": bias - mean * gain}
    return {k: v.astype(np.float32) for k, v in folded.items()}


def _each_conv(function: Any, params: dict) -> dict:
    convs = {k: v for k, v in params.items() if k != "fc"}
    return {**jax.tree.map(function, convs, is_leaf=lambda n: "bias" in n), "fc": params["fc"]}


def read_params(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """`Inception`'s parameters from the published file (see `URLS`; also as .safetensors under the
    same names), and the hash of what the file holds.

    Raises `UserError` when the file is missing, cannot be read or does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"Inception's weights are not at {path}: download them with  curl -L -o {path} "
            f"{URLS[0]}  or name the file that you have (pytorch-fid's is the same)"
        )
    picture = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    expected = jax.eval_shape(Inception().init, jax.random.key(0), picture)["params"]
    expected = _each_conv(_with_norm, expected)
    tensors = pretrained.read_torch(path)
    params = pretrained.fill(expected, tensors, RULES, source=path, ignore=IGNORE)
    return _each_conv(_fold, params), pretrained.hash_of(params)


# --- pictures to features ----------------------------------------------------------------------


@jax.jit
def _apply(params: Any, x_BHWC: jax.Array, divisor: float) -> dict[str, jax.Array]:
    return Inception().apply({"params": params}, x_BHWC / divisor - 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Pictures to Inception's features by one of `CONVENTIONS`; make one with `load`.

    Attributes:
      convention: the name, one of `CONVENTIONS`.
      batch: pictures a step, on all the devices together.
      weights_hash: of the weights' values, the same from whatever file.
      published: whether the file is the published one, byte by byte.
    """

    convention: str
    batch: int
    weights_hash: str
    published: bool
    params: Any = dataclasses.field(repr=False)
    sharding: jax.sharding.Sharding = dataclasses.field(repr=False)

    def layer_hash(self, layer: str) -> str:
        """Hash of all that decides a layer's features: weights, layer, resizer, scaling.

        Raises `UserError` for a layer that is not in `LAYERS`.
        """
        _check_layer(layer)
        resizer, divisor = CONVENTIONS[self.convention]
        return sha256_of([NAME, self.weights_hash, layer, SIDE, resizer, divisor])

    def describe(self, layer: str) -> str:
        """The features' name with its resizer and weights, for reports."""
        _check_layer(layer)
        resizer, divisor = CONVENTIONS[self.convention]
        weights = "the published weights" if self.published else f"weights {self.weights_hash}"
        return (
            f"{NAME}, {weights}, {layer} ({LAYERS[layer]} features), {self.convention}: "
            f"{resize.RESIZERS[resizer].text} to {SIDE} px, x / {divisor:g} - 1"
        )

    def _filled(self, images_BHWC: np.ndarray) -> np.ndarray:
        fill = ((0, self.batch - len(images_BHWC)), (0, 0), (0, 0), (0, 0))
        return np.pad(images_BHWC, fill, mode="edge")

    def _start(self, images: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        """Begins on at most `batch` pictures; the arrays returned may not be ready yet."""
        resizer, divisor = CONVENTIONS[self.convention]
        if resize.RESIZERS[resizer].on_host or len({image.shape for image in images}) > 1:
            x_BHWC = self._filled(resize.resize_each(images, resizer, SIDE))
        else:
            images_BHWC = jax.device_put(self._filled(np.stack(images)), self.sharding)
            x_BHWC = resize.resize(images_BHWC, resizer, SIDE)
        return _apply(self.params, jax.device_put(x_BHWC, self.sharding), divisor)

    def features(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """uint8 pictures [H, W, 3], each of any size, to {"pool": [B, 2048], "logits_unbiased":
        [B, 1008]}, float32. The network compiles once, the bilinear resizers once for each size
        that fills a batch. Raises `UserError` on other inputs.
        """
        for image in images:
            if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
                raise UserError(
                    "Inception's features are of uint8 pictures [H, W, 3] in 0..255, not "
                    f"{image.dtype} {image.shape}"
                )
        out = {k: np.empty((len(images), width), np.float32) for k, width in LAYERS.items()}

        def finish(i, values):
            for layer, value in values.items():
                rows = out[layer][i : i + self.batch]
                rows[:] = np.asarray(value)[: len(rows)]

        pending = None  # one batch is being resized while another computes
        for i in range(0, len(images), self.batch):
            begun = i, self._start(images[i : i + self.batch])
            if pending:
                finish(*pending)
            pending = begun
        if pending:
            finish(*pending)
        return out


def _check_layer(layer: str) -> None:
    if layer not in LAYERS:
        raise UserError(f"Inception has the layers {', '.join(LAYERS)}, not {layer!r}")


def load(
    path: str | os.PathLike[str],
    resizer: str = "fid_tf2015",
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> FeatureNetwork:
    """The network with the weights at `path` (see `URLS`; .pth needs torch, .safetensors does not).

    Args:
      resizer: one of `CONVENTIONS`: "fid_tf2015", "clean_fid" or "pytorch_fid".
      batch: pictures a step, a multiple of the devices; by default 8 for each CPU device, where
        more no longer fit the caches, and 128 for each accelerator.
      devices: what to spread each batch over, by default all of this process.

    Raises `UserError` for an unknown resizer, a batch that does not divide, and a file that is
    missing or does not fit.
    """
    if resizer not in CONVENTIONS:
        raise UserError(f"FID's resizer is one of {', '.join(CONVENTIONS)}, not {resizer!r}")
    devices = jax.local_devices() if devices is None else list(devices)
    batch = batch or len(devices) * (8 if devices[0].platform == "cpu" else 128)
    if batch < 1 or batch % len(devices):
        raise UserError(f"a batch of {batch} does not divide over {len(devices)} devices")
    params, weights_hash = read_params(path)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return FeatureNetwork(
        convention=resizer,
        batch=batch,
        weights_hash=weights_hash,
        published=sha256_of(Path(path).read_bytes()) == PUBLISHED,
        params=jax.device_put(params, everywhere),
        sharding=everywhere.update(spec=jax.sharding.PartitionSpec("data")),
    )
