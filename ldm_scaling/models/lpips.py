"""LPIPS, the learned perceptual distance between two pictures (arXiv 1801.03924, v0.1).

Both pictures go through AlexNet or VGG16; after each of five stages the channels are scaled to
unit length, their squared differences weighted, and the mean over the map taken; the distance is
the sum. The shift-tolerant variants (arXiv 2207.13686) blur before every halving; their whole
weights are on PyPI.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
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
from ldm_scaling.models import pretrained, small_maps, spread
from ldm_scaling.models.pretrained import Rule, conv

# For pictures in -1..1 (`ScalingLayer` of the lpips package).
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIDE = 32
PACKAGE = "stlpips_pytorch"


class Stage(NamedTuple):
    """Convolutions (width, kernel, stride, padding), each with ReLU, after a pool or none."""

    pooled: bool
    convs: tuple[tuple[int, int, int, int], ...]


class Net(NamedTuple):
    """A trunk: its stages, its pool's window (halving), its tensors' numbers in the file, whether
    it blurs where the plain one skips pixels, and where to get the weights.
    """

    stages: tuple[Stage, ...]
    window: int
    numbers: tuple[int, ...]
    blurred: bool = False
    source: str = ""


ALEX = (
    Stage(False, ((64, 11, 4, 2),)),
    Stage(True, ((192, 5, 1, 2),)),
    Stage(True, ((384, 3, 1, 1),)),
    Stage(False, ((256, 3, 1, 1),)),
    Stage(False, ((256, 3, 1, 1),)),
)
VGG16 = tuple(
    Stage(i > 0, ((width, 3, 1, 1),) * repeats)
    for i, (repeats, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)))
)
_TORCHVISION = "https://download.pytorch.org/models/"
NETS = {
    "alex": Net(
        ALEX, 3, (0, 3, 6, 8, 10), source=_TORCHVISION + "alexnet-owt-7be5be79.pth"
    ),
    "vgg": Net(
        VGG16, 2, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        source=_TORCHVISION + "vgg16-397923af.pth",
    ),
    "alex_shift_tolerant": Net(
        ALEX, 3, (0, 5, 9, 11, 13), True, "weights/vST0.0/alex_shift_tolerant.pth"
    ),
    "vgg_shift_tolerant": Net(
        VGG16, 2, (0, 2, 6, 8, 12, 14, 16, 20, 22, 24, 28, 30, 32), True,
        "weights/vST0.0/vgg_shift_tolerant.pth",
    ),
}  # fmt: skip


def _blur_halve(x_BHWC: jax.Array) -> jax.Array:
    """Every second pixel of the picture blurred by (1, 2, 1) / 4 along both axes, with two pixels
    of reflection around it (`Downsample(pad_more=True)` of the peer).
    """
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    for axis in (1, 2):
        last = x_BHWC.shape[axis] - 2
        a, b, c = (jax.lax.slice_in_dim(x_BHWC, i, last + i, 2, axis) for i in range(3))
        x_BHWC = (a + 2 * b + c) / 4
    return x_BHWC


class Trunk(nn.Module):
    """Scaled pictures [B, H, W, 3] to the five maps that LPIPS compares."""

    net: Net

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> list[jax.Array]:
        window, blurred = self.net.window, self.net.blurred
        numbers, maps = iter(range(len(self.net.numbers))), []
        for pooled, convs in self.net.stages:
            if pooled:
                x_BHWC = nn.max_pool(x_BHWC, (window, window), (1, 1) if blurred else (2, 2))
                x_BHWC = _blur_halve(x_BHWC) if blurred else x_BHWC
            for width, kernel, stride, padding in convs:
                x_BHWC = nn.Conv(
                    width, (kernel, kernel), 1 if blurred else stride, padding=padding,
                    precision="highest", conv_general_dilated=small_maps.convolve,
                    name=f"conv_{next(numbers)}",
                )(x_BHWC)  # fmt: skip
                # The variant replaces a stride of 4 by one halving only.
                x_BHWC = _blur_halve(x_BHWC) if blurred and stride > 1 else x_BHWC
                x_BHWC = jax.nn.relu(x_BHWC)
            maps.append(x_BHWC)
        return maps


class LPIPS(nn.Module):
    """Pairs of pictures [B, 2, H, W, 3] in -1..1 to distances [B]."""

    net: Net

    @nn.compact
    def __call__(self, pairs_BPHWC: jax.Array) -> jax.Array:
        x_NHWC = pairs_BPHWC.reshape(-1, *pairs_BPHWC.shape[2:])
        x_NHWC = (x_NHWC - jnp.array(SHIFT)) / jnp.array(SCALE)
        total_B = jnp.zeros(len(pairs_BPHWC))
        for i, map_NHWC in enumerate(Trunk(self.net, name="trunk")(x_NHWC)):
            head_C = self.param(f"head_{i}", nn.initializers.ones, map_NHWC.shape[-1:])
            # XLA:CPU would sum each pixel's squares again for each of its channels, were the
            # length not held back: 48 ms against 3 for 64 channels at 256 px.
            length = jnp.sqrt(jnp.square(map_NHWC).sum(-1, keepdims=True)) + 1e-10
            unit_NHWC = map_NHWC / jax.lax.optimization_barrier(length)
            unit_BPHWC = unit_NHWC.reshape(-1, 2, *unit_NHWC.shape[1:])
            square_BHWC = jnp.square(unit_BPHWC[:, 0] - unit_BPHWC[:, 1])
            difference_BHW = jnp.dot(square_BHWC, head_C, precision="highest")
            total_B += difference_BHW.mean((1, 2))
        return total_B


# --- their weights -----------------------------------------------------------------------------


def _rules(net: Net) -> list[Rule]:
    """torchvision's names, or those of an LPIPS module of the lpips package."""
    rules = [Rule(r"lin(\d)\.model\.1\.weight", r"head_\1", np.ravel)]
    for i, number in enumerate(net.numbers):
        theirs, ours = rf"(?:features|net\.slice\d)\.{number}\.", f"trunk/conv_{i}/"
        rules.append(Rule(theirs + "weight", ours + "kernel", conv))
        rules.append(Rule(theirs + "bias", ours + "bias"))
    return rules


# The classifier behind the trunk, LPIPS' heads a second time, constants.
IGNORE = (r"classifier\..*", r"lins\..*", r"scaling_layer\..*", r".*\.filt")


def _heads_of(name: str) -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"LPIPS needs its heads: run  pip install --no-deps lpips==0.1.4  or name its file "
            f"weights/v0.1/{name}.pth"
        )
    return Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{name}.pth"


def read_params(
    name: str, trunk: str | os.PathLike[str] | None, heads: str | os.PathLike[str] | None
) -> Any:
    """`LPIPS`' parameters; for the arguments see `load`."""
    net = NETS[name]
    if net.blurred:
        what = "shift-tolerant LPIPS"
        trunk = pretrained.package_file(PACKAGE, net.source, what) if trunk is None else trunk
    elif trunk is None or not Path(trunk).is_file():
        where = "not named" if trunk is None else f"not at {trunk}"
        to = trunk or Path(net.source).name
        raise UserError(
            f"LPIPS ({name}) needs torchvision's weights, which are {where}: download them with  "
            f"curl -L -o {to} {net.source}  and name that file"
        )
    tensors = pretrained.read_torch(trunk)
    if heads is None and not net.blurred and "lin0.model.1.weight" not in tensors:
        heads = _heads_of(name)
    if heads is not None:
        tensors = tensors | pretrained.read_torch(heads)
    pairs = jax.ShapeDtypeStruct((1, 2, MIN_SIDE, MIN_SIDE, 3), jnp.float32)
    expected = jax.eval_shape(LPIPS(net).init, jax.random.key(0), pairs)["params"]
    source = trunk if heads is None else f"{trunk} and {heads}"
    return pretrained.fill(expected, tensors, _rules(net), source=source, ignore=IGNORE)


# --- pictures to distances ---------------------------------------------------------------------


def _apply(net: Net, params: Any, pairs_BPHWC: jax.Array) -> jax.Array:
    if pairs_BPHWC.dtype == jnp.uint8:
        pairs_BPHWC = pairs_BPHWC.astype(jnp.float32) / 127.5 - 1.0
    return LPIPS(net).apply({"params": params}, pairs_BPHWC)


@functools.cache
def _program(platform: str) -> Any:
    options = spread.compiler_options(platform)
    return jax.jit(_apply, static_argnames="net", compiler_options=options)


@dataclasses.dataclass(frozen=True, eq=False)
class PerceptualDistance:
    """LPIPS of pairs of pictures; make one with `load`.

    Attributes:
      name: one of `NETS`.
      batch: pairs a step, on all the devices together; None to choose by the pictures' size.
      weights_hash: of the weights' values, the same from whatever files.
    """

    name: str
    batch: int | None
    weights_hash: str
    params: Any = dataclasses.field(repr=False)
    sharding: jax.sharding.NamedSharding = dataclasses.field(repr=False)

    def hash(self) -> str:
        """Hash of all that decides a distance: network and weights."""
        return sha256_of(["LPIPS v0.1", self.name, self.weights_hash])

    def describe(self) -> str:
        """The distance's name with its network and weights, for reports."""
        return f"LPIPS v0.1 ({self.name}), weights {self.weights_hash}"

    def _batch_for(self, height: int, width: int) -> int:
        """On a CPU the maps of a step should stay in the caches; an accelerator likes more."""
        if self.batch is not None:
            return self.batch
        devices = self.sharding.mesh.devices.flat
        net = NETS[self.name]
        stride = 1 if net.blurred else net.stages[0].convs[0][2]  # AlexNet's maps are soon small
        pixels = 2**15 * stride if devices[0].platform == "cpu" else 2**22
        return len(devices) * max(1, min(256, pixels // (height * width)))

    def _room_for(self, pairs: int) -> int:
        """A power of two of pairs for each device: few sizes are compiled, and few pairs idle."""
        devices = self.sharding.mesh.devices.size
        return devices << (-(-pairs // devices) - 1).bit_length()

    def distance(self, a_BHWC: np.ndarray, b_BHWC: np.ndarray) -> np.ndarray:
        """The distances [B], float32, between two sets of pictures [B, H, W, 3], both of them
        float in -1..1 (what reaches a little beyond is taken as it is) or uint8 in 0..255.

        Compiles once for each picture size. Raises `UserError` for other inputs and for pictures
        below 32 px.
        """
        a_BHWC, b_BHWC = (_checked(x) for x in (a_BHWC, b_BHWC))
        if a_BHWC.shape != b_BHWC.shape or a_BHWC.dtype != b_BHWC.dtype:
            raise UserError(
                f"LPIPS compares pictures of one shape and kind, not {a_BHWC.dtype} "
                f"{a_BHWC.shape} and {b_BHWC.dtype} {b_BHWC.shape}"
            )
        n, batch = len(a_BHWC), self._batch_for(*a_BHWC.shape[1:3])
        program = _program(self.sharding.mesh.devices.flat[0].platform)
        out_B = np.empty(n, np.float32)
        for i in range(0, n, batch):
            pairs_BPHWC = np.stack([a_BHWC[i : i + batch], b_BHWC[i : i + batch]], 1)
            some = len(pairs_BPHWC)
            fill = ((0, min(batch, self._room_for(some)) - some), *((0, 0),) * 4)
            pairs_BPHWC = jax.device_put(np.pad(pairs_BPHWC, fill, mode="edge"), self.sharding)
            distances_B = program(NETS[self.name], self.params, pairs_BPHWC)
            out_B[i : i + some] = np.asarray(distances_B)[:some]
        return out_B


def _checked(images_BHWC: np.ndarray) -> np.ndarray:
    x_BHWC = np.asarray(images_BHWC)
    if np.issubdtype(x_BHWC.dtype, np.floating):
        x_BHWC = x_BHWC.astype(np.float32)
    if x_BHWC.dtype not in (np.uint8, np.float32) or x_BHWC.shape[3:] != (3,):
        raise UserError(
            "LPIPS takes pictures [B, H, W, 3], float in -1..1 or uint8, not "
            f"{x_BHWC.dtype} {x_BHWC.shape}"
        )
    if min(x_BHWC.shape[1:3]) < MIN_SIDE:
        raise UserError(
            f"LPIPS halves a picture four times: give {MIN_SIDE} px or more, not "
            f"{x_BHWC.shape[1]} x {x_BHWC.shape[2]}"
        )
    most = np.abs(x_BHWC).max(initial=0) if x_BHWC.dtype == np.float32 else 0
    if not most <= 1.5:
        raise UserError(f"LPIPS takes floats in -1..1; these reach {most:g}: scale them")
    return x_BHWC


def load(
    name: str = "alex",
    trunk: str | os.PathLike[str] | None = None,
    heads: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> PerceptualDistance:
    """LPIPS with the weights of files.

    Args:
      name: "alex", "vgg" or their variants "alex_shift_tolerant", "vgg_shift_tolerant"; a distance
        by one is not comparable with that by another.
      trunk: torchvision's weights of AlexNet or VGG16, or the state dict of a whole LPIPS module;
        by default, of a variant, the file in the package stlpips-pytorch.
      heads: the weights of the heads, `weights/v0.1/{alex,vgg}.pth` of the lpips package, by
        default as installed; torch-fidelity's weights-vgg16-lpips.pth is the same file as vgg.pth.
      batch: pairs a step, a multiple of the devices; by default few on a CPU, by picture size.
      devices: what to spread each batch over, by default all of this process.

    Raises `UserError` for an unknown name, a batch that does not divide, and weights that are
    missing or do not fit.
    """
    if name not in NETS:
        raise UserError(f"LPIPS' network is one of {', '.join(NETS)}, not {name!r}")
    devices = jax.local_devices() if devices is None else list(devices)
    if batch is not None and (batch < 1 or batch % len(devices)):
        raise UserError(f"a batch of {batch} does not divide over {len(devices)} devices")
    params = read_params(name, trunk, heads)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return PerceptualDistance(
        name=name,
        batch=batch,
        weights_hash=pretrained.hash_of(params),
        params=jax.device_put(params, everywhere),
        sharding=everywhere.update(spec=jax.sharding.PartitionSpec("data")),
    )
