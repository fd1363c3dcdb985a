"""TAESD's decoder (github.com/madebyollin/taesd): latents to pictures with 1.2 million parameters
where the KL autoencoder's decoder has 49.

It takes latents as the U-Net has them, so their scale is 1.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import blocks, convert, pretrained
from ldm_scaling.models.pretrained import Rule, conv


@dataclasses.dataclass(frozen=True)
class TinyDecoderSpec:
    """What fixes a decoder; the defaults are TAESD's.

    Attributes:
      width: channels of every layer.
      blocks: residual blocks of each stage, from the smallest; every stage but the last doubles
        the side.
      latent_channels: channels of the latents.
    Raises:
      UserError: for a number below 1, or no stage.
    """

    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for n in (self.width, self.latent_channels, min(self.blocks, default=0)):
            if type(n) is not int or n < 1:
                raise UserError(f"{self}: give whole numbers of at least 1, and a stage")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.blocks) - 1)


class TinyDecoder(nn.Module):
    """Latents (scaled as the U-Net has them) to pictures, about [-1, 1], not clipped."""

    spec: TinyDecoderSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        spec = self.spec

        def layer(name, x, features=spec.width, **kw):
            return blocks.conv(features, 3, self.dtype, name, **kw)(x)

        h = 3.0 * jnp.tanh(z_BHWC.astype(self.dtype) / 3.0)
        h = nn.relu(layer("conv_in", h))
        last = len(spec.blocks) - 1
        for i, count in enumerate(spec.blocks):
            for j in range(count):
                y = h
                for k in range(3):
                    y = layer(f"stage_{i}_block_{j}_conv_{k}", nn.relu(y) if k else y)
                h = nn.relu(h + y)
            if i != last:
                h = layer(f"stage_{i}_conv", blocks.upsample(h), use_bias=False)
        # Trained for [0, 1].
        return 2.0 * layer("conv_out", h, 3).astype(jnp.float32) - 1.0


def init(spec: TinyDecoderSpec, key: jax.Array) -> dict:
    """Random float32 parameters."""
    return TinyDecoder(spec).init(key, jnp.zeros((1, 8, 8, spec.latent_channels)))["params"]


def decode(spec: TinyDecoderSpec, params: dict, z_BHWC: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Pictures (B, H, W, 3) of latents, about [-1, 1], not clipped."""
    return TinyDecoder(spec, dtype).apply({"params": params}, z_BHWC)


# --- files ------------------------------------------------------------------------------------

# Options of diffusers' `AutoencoderTiny` that have one value here.
_FIXED = {
    "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "out_channels": 3,
    "shift_factor": 0.0,
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> tuple[TinyDecoderSpec, dict, float]:
    """Spec, float32 parameters and latent scale of a tiny decoder.

    Args:
      path: taesd_decoder.safetensors (or .pth, which torch reads), or a folder of diffusers'
        `AutoencoderTiny`.
    Raises:
      UserError: for files that cannot be read or hold something else, with a diff where tensors do
        not fit.
    """
    tensors = functools.partial(pretrained.read_weights, path, IGNORE, pretrained.DIFFUSERS)
    if not Path(path).is_dir():
        return *from_tensors(tensors(), path), 1.0
    config = convert.read_config(path)
    wanted = spec_of(config, path)
    spec, params = from_tensors(tensors(), path)
    if spec != wanted:
        raise UserError(f"{path}: config.json describes {wanted}, but the weights are {spec}")
    return spec, params, convert.latent_scale(config, 1.0, path)


def spec_of(
    config: Mapping[str, Any], source: str | os.PathLike[str] = "config"
) -> TinyDecoderSpec:
    """The spec of an `AutoencoderTiny`'s decoder.

    Raises:
      UserError: naming the option that this decoder does not have.
    """
    table = {"decoder_block_out_channels": [64] * 4, "num_decoder_blocks": [3, 3, 3, 1]} | config
    widths = table["decoder_block_out_channels"]
    wanted = _FIXED | {"decoder_block_out_channels": widths[:1] * len(table["num_decoder_blocks"])}
    for key, value in wanted.items():
        if table.get(key, value) != value:
            raise UserError(
                f"{source}: {key}={table[key]!r} is not supported: this decoder has {key}={value!r}"
            )
    return TinyDecoderSpec(widths[0], table["num_decoder_blocks"], table.get("latent_channels", 4))


IGNORE = (r"encoder\..*",)


def from_tensors(
    tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]
) -> tuple[TinyDecoderSpec, dict]:
    """Spec and float32 parameters of a decoder; names and shapes tell all sizes.

    Args:
      tensors: a state dict as taesd_decoder.safetensors has it (an `nn.Sequential` that begins with
        a clamp: `1.weight`, `3.conv.0.weight`, ...), or diffusers' `AutoencoderTiny`
        (`decoder.layers.0.weight`, ...).
      source: where they came from, for messages.
    Raises:
      UserError: for tensors of something else, with a diff where they do not fit.
    """
    stem = "decoder.layers." if any(k.startswith("decoder.layers.") for k in tensors) else ""
    named = [re.fullmatch(re.escape(stem) + r"(\d+)\.(conv\.0\.)?weight", k) for k in tensors]
    # Layer -> whether it is a block; the rest are convolutions.
    blocky = dict(sorted((int(m[1]), m[2] is not None) for m in named if m))
    first, *middle, last = blocky if len(blocky) > 2 else (0, 0, 0)
    kernel = tensors.get(f"{stem}{first}.weight")
    if len(blocky) < 3 or kernel is None or kernel.ndim != 4 or blocky[last]:
        raise UserError(
            f"{source} holds no tiny decoder, but {', '.join(list(tensors)[:3]) or 'nothing'}, "
            "...: fetch taesd_decoder.safetensors from https://github.com/madebyollin/taesd, or "
            "config.json and diffusion_pytorch_model.safetensors of madebyollin/taesd from "
            "https://huggingface.co into a folder"
        )
    rules, counts = _rules(f"{stem}{first}", "conv_in") + _rules(f"{stem}{last}", "conv_out"), [0]
    for place in middle:
        here, stage = f"{stem}{place}", f"stage_{len(counts) - 1}"
        if blocky[place]:
            for k in range(3):
                rules += _rules(f"{here}.conv.{2 * k}", f"{stage}_block_{counts[-1]}_conv_{k}")
            counts[-1] += 1
        else:
            rules += _rules(here, f"{stage}_conv")
            counts.append(0)
    spec = TinyDecoderSpec(kernel.shape[0], tuple(counts), kernel.shape[1])
    expected = jax.eval_shape(lambda: init(spec, jax.random.key(0)))
    return spec, pretrained.fill(expected, tensors, rules, source=source, ignore=IGNORE)


def _rules(theirs: str, ours: str) -> list[Rule]:
    theirs = re.escape(theirs)
    return [
        Rule(rf"{theirs}\.weight", f"{ours}/kernel", conv),
        Rule(rf"{theirs}\.bias", f"{ours}/bias"),
    ]
