"""RRDBNet, the network of ESRGAN (arXiv 1809.00219) and Real-ESRGAN (arXiv 2107.10833): pictures
four times larger, by residual blocks of residual dense blocks without normalisation.

Published files in three namings are read: Real-ESRGAN's (`RealESRGAN_x4plus.pth`, BasicSR),
ESRGAN's (`RRDB_ESRGAN_x4.pth`) and that of ESRGAN's first release
(`RRDB_ESRGAN_x4_old_arch.pth`), which many files by others have; and ncnn's .param and .bin, which
a package on PyPI brings.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ldm_scaling.errors import UserError
from ldm_scaling.models import ncnn_files, pretrained
from ldm_scaling.models.pretrained import Rule, conv

FACTOR = 4
_DENSE, _CONVS, _SLOPE, _SMALL = 3, 5, 0.2, 0.2
_OUTER = ("conv_first", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")


@dataclasses.dataclass(frozen=True)
class RRDBNetSpec:
    """What fixes a network; the defaults are those of ESRGAN and Real-ESRGAN's x4plus.

    Attributes:
      blocks: residual-in-residual dense blocks (6 in x4plus_anime).
      features: channels between them.
      growth: channels that each convolution of a dense block adds.
    Raises:
      UserError: for a number below 1.
    """

    blocks: int = 23
    features: int = 64
    growth: int = 32

    def __post_init__(self):
        for n in dataclasses.astuple(self):
            if type(n) is not int or n < 1:
                raise UserError(f"{self}: give whole numbers of at least 1")

    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer to channels (in, out), in the order in which they are used: `conv_first`, ...,
        `body_0/rdb1/conv1`, ..., `conv_last`."""
        f, g = self.features, self.growth
        body = {
            f"body_{i}/rdb{j}/conv{k}": (f + (k - 1) * g, g if k < _CONVS else f)
            for i in range(self.blocks)
            for j in range(1, _DENSE + 1)
            for k in range(1, _CONVS + 1)
        }
        after = dict.fromkeys(_OUTER[1:-1], (f, f))
        return {"conv_first": (3, f), **body, **after, "conv_last": (f, 3)}


def apply(params: Mapping[str, Any], x_BHWC: jax.Array) -> jax.Array:
    """Pictures (B, 4 H, 4 W, 3) of pictures (B, H, W, 3), both about [0, 1] and not clipped.

    Args:
      params: of `init` or `load`; those of the blocks have a leading axis, over which one compiled
        block is run.
      x_BHWC: float32.
    """
    x_BHWC = _conv(params["conv_first"], x_BHWC)

    def block(h_BHWC, layer):
        y_BHWC = h_BHWC
        for j in range(1, _DENSE + 1):
            y_BHWC = _dense(layer[f"rdb{j}"], y_BHWC)
        return h_BHWC + _SMALL * y_BHWC, None

    h_BHWC, _ = lax.scan(block, x_BHWC, params["body"])
    h_BHWC = x_BHWC + _conv(params["conv_body"], h_BHWC)
    for name in ("conv_up1", "conv_up2"):
        h_BHWC = h_BHWC.repeat(2, axis=1).repeat(2, axis=2)
        h_BHWC = _rectified(_conv(params[name], h_BHWC))
    return _conv(params["conv_last"], _rectified(_conv(params["conv_hr"], h_BHWC)))


def _dense(layers: Mapping[str, Any], x_BHWC: jax.Array) -> jax.Array:
    """Each convolution sees the input and what those before it made."""
    seen_BHWC = x_BHWC
    for k in range(1, _CONVS):
        y_BHWC = _rectified(_conv(layers[f"conv{k}"], seen_BHWC))
        seen_BHWC = jnp.concatenate([seen_BHWC, y_BHWC], axis=-1)
    return x_BHWC + _SMALL * _conv(layers[f"conv{_CONVS}"], seen_BHWC)


def _rectified(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, _SLOPE * x)


def _conv(layer: Mapping[str, jax.Array], x_BHWC: jax.Array) -> jax.Array:
    out_BHWC = lax.conv_general_dilated(
        x_BHWC, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return out_BHWC + layer["bias"]


def init(spec: RRDBNetSpec, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: He's, of a tenth of their spread in the blocks (ESRGAN, 3.1)."""
    layers: dict[str, Any] = {}
    for i, (name, (inputs, outputs)) in enumerate(spec.widths().items()):
        scale = (0.1 if name.startswith("body_") else 1.0) * (2 / (9 * inputs)) ** 0.5
        kernel = scale * jax.random.normal(jax.random.fold_in(key, i), (3, 3, inputs, outputs))
        layers[f"{name}/kernel"], layers[f"{name}/bias"] = kernel, jnp.zeros(outputs)
    return _stacked(spec, layers)


def _stacked(spec: RRDBNetSpec, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `apply`, of arrays by `widths`' names and /kernel or /bias."""
    xp = jnp if isinstance(layers["conv_first/bias"], jax.Array) else np
    out: dict[str, Any] = {
        name: {part: layers[f"{name}/{part}"] for part in ("kernel", "bias")} for name in _OUTER
    }
    out["body"] = {
        f"rdb{j}": {
            f"conv{k}": {
                part: xp.stack([
                    layers[f"body_{i}/rdb{j}/conv{k}/{part}"] for i in range(spec.blocks)
                ])
                for part in ("kernel", "bias")
            }
            for k in range(1, _CONVS + 1)
        }
        for j in range(1, _DENSE + 1)
    }
    return out


# --- files ------------------------------------------------------------------------------------

# Published names of the layers, up to .weight and .bias: BasicSR's, ESRGAN's, its first release's.
_NAMES = (
    (r"(conv_first|conv_body|conv_up1|conv_up2|conv_hr|conv_last)", r"\1"),
    (r"body\.(\d+)\.rdb(\d)\.conv(\d)", r"body_\1/rdb\2/conv\3"),
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)", r"body_\1/rdb\2/conv\3"),
    (r"trunk_conv", "conv_body"), (r"upconv([12])", r"conv_up\1"), (r"HRconv", "conv_hr"),
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", r"body_\1/rdb\2/conv\3"),
    (r"model\.0", "conv_first"), (r"model\.1\.sub\.\d+", "conv_body"), (r"model\.3", "conv_up1"),
    (r"model\.6", "conv_up2"), (r"model\.8", "conv_hr"), (r"model\.10", "conv_last"),
)  # fmt: skip
_RULES = [
    Rule(rf"{theirs}\.{part}", f"{ours}/{name}", layout)
    for theirs, ours in _NAMES
    for part, name, layout in (("weight", "kernel", conv), ("bias", "bias", pretrained.same))
]
_FETCH = "RealESRGAN_x4plus.pth from https://github.com/xinntao/Real-ESRGAN/releases"


def load(path: str | os.PathLike[str]) -> tuple[RRDBNetSpec, dict[str, Any]]:
    """Spec and float32 parameters of a published file: .pth, .safetensors, or ncnn's .param or
    .bin with the other one beside it.

    Raises:
      UserError: for files that cannot be read or hold something else, with a diff where tensors do
        not fit.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give weights such as {_FETCH}")
    if path.suffix in ncnn_files.SUFFIXES:
        return from_convolutions(ncnn_files.read_convolutions(path), path)
    return from_tensors(pretrained.read_torch(path), path)


def from_tensors(
    tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]
) -> tuple[RRDBNetSpec, dict[str, Any]]:
    """Spec and float32 parameters; names and shapes tell all sizes.

    Args:
      tensors: a state dict in one of the three namings.
      source: where they came from, for messages.
    Raises:
      UserError: as `load`.
    """
    named = {}
    for name, tensor in tensors.items():
        for rule in _RULES:
            if match := re.fullmatch(rule.pattern, name):
                named[match.expand(rule.target)] = tensor
                break
    first, grown = named.get("conv_first/kernel"), named.get("body_0/rdb1/conv1/kernel")
    blocks = {int(m[1]) for name in named if (m := re.match(r"body_(\d+)/", name))}
    if first is None or grown is None or first.ndim != 4 or grown.ndim != 4:
        raise UserError(
            f"{source} holds no network of ESRGAN's kind, but "
            f"{', '.join(list(tensors)[:3]) or 'nothing'}, ...: give weights such as {_FETCH}"
        )
    if first.shape[1] != 3:
        raise UserError(
            f"{source} takes {first.shape[1]} channels, not 3 colours: it makes pictures "
            f"{ {12: 2, 48: 1}.get(first.shape[1], 'so many') } times larger; give weights that "
            f"make them {FACTOR} times larger, such as {_FETCH}"
        )
    spec = RRDBNetSpec(max(blocks) + 1, first.shape[0], grown.shape[0])
    expected = {
        f"{name}/{part}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, (i, o) in spec.widths().items()
        for part, shape in (("kernel", (3, 3, i, o)), ("bias", (o,)))
    }
    return spec, _stacked(spec, pretrained.fill(expected, tensors, _RULES, source=source))


def from_convolutions(
    convolutions: list[tuple[np.ndarray, np.ndarray]], source: str | os.PathLike[str]
) -> tuple[RRDBNetSpec, dict[str, Any]]:
    """As `from_tensors`, of all convolutions (weight [out, in, 3, 3], bias) in their order.

    Raises:
      UserError: when they are not those of such a network.
    """
    blocks, rest = divmod(len(convolutions) - len(_OUTER), _DENSE * _CONVS)
    if rest or blocks < 1:
        raise UserError(
            f"{source} holds {len(convolutions)} convolutions, and no network of ESRGAN's kind has "
            f"so many: give weights such as {_FETCH}"
        )
    (features, *_), (growth, *_) = convolutions[0][0].shape, convolutions[1][0].shape
    names = RRDBNetSpec(blocks, features, growth).widths()
    tensors = {}
    for name, (weight_OIHW, bias_O) in zip(names, convolutions):
        theirs = re.sub(r"body_(\d+)/", r"body.\1.", name).replace("/", ".")
        tensors |= {f"{theirs}.weight": weight_OIHW, f"{theirs}.bias": bias_O}
    return from_tensors(tensors, source)
