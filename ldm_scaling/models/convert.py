"""Checkpoints of diffusers as our networks: `UNet2DConditionModel` and `AutoencoderKL`.

A model saved there is a folder of `config.json` and `diffusion_pytorch_model.safetensors` (or .bin,
which torch reads). The config becomes a spec, or an error that names the option we do not have; the
tensors fill the tree strictly (see `pretrained.fill`). diffusers is not needed.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, pretrained, unet
from ldm_scaling.models.pretrained import FlatTensors, Rule, conv, linear, same

WEIGHTS = pretrained.DIFFUSERS[0]
# What Stable Diffusion's latents are multiplied by, where a checkpoint does not say.
SCALE = 0.18215


def load_unet(folder: str | os.PathLike[str]) -> tuple[unet.UNetSpec, dict]:
    """Spec and float32 parameters of a U-Net saved by diffusers, e.g. SD v1.5's `unet/`.

    Raises:
      UserError: for files that cannot be read, an option that our network does not have, or
        tensors that do not fit (with a diff).
    """
    spec = unet_spec(read_config(folder), source=folder)
    tensors = pretrained.read_weights(folder, names=pretrained.DIFFUSERS)
    return spec, unet_params(spec, tensors, source=folder)


def load_autoencoder(
    folder: str | os.PathLike[str],
) -> tuple[autoencoder.AutoencoderSpec, dict, float]:
    """Spec, float32 parameters and latent scale of an autoencoder saved by diffusers.

    Raises:
      UserError: as `load_unet`.
    """
    config = read_config(folder)
    spec = autoencoder_spec(config, source=folder)
    tensors = pretrained.read_weights(folder, names=pretrained.DIFFUSERS)
    params = autoencoder_params(spec, tensors, source=folder)
    return spec, params, latent_scale(config, SCALE, folder)


def latent_scale(
    config: Mapping[str, Any], usual: float, source: str | os.PathLike[str] = "config"
) -> float:
    """What latents are multiplied by, a config's `scaling_factor`; the usual one where it names
    none. Raises `UserError` for what is no number above 0."""
    value = config.get("scaling_factor")
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{source}: scaling_factor={value!r} is not supported: a number above 0 is")
    return float(value)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a model that diffusers saved. Raises `UserError`."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot read {path} ({e}): give the folder that diffusers saved, with config.json "
            f"and {WEIGHTS} in it"
        ) from e
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no table of options: fetch the checkpoint again")
    return config


# --- configs ----------------------------------------------------------------------------------

# Options that must have one value, when they are there; those that no spec needs; and those read
# below. Any other option must be off.
_UNET_FIXED = {
    "act_fn": "silu", "addition_embed_type_num_heads": 64, "attention_type": "default",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional", "transformer_layers_per_block": 1,
}  # fmt: skip
_UNET_READ = {
    "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
    "in_channels", "layers_per_block", "norm_num_groups", "num_attention_heads", "out_channels",
    "sample_size", "time_cond_proj_dim", "up_block_types",
}  # fmt: skip
_UNET_FREE = {
    "dropout", "upcast_attention", "use_linear_projection",
    # How an average over training was taken, which EMAModel writes beside the network's own.
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup",
}  # fmt: skip

_AUTOENCODER_FIXED = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True,
    "use_post_quant_conv": True,
}  # fmt: skip
_AUTOENCODER_READ = {
    "block_out_channels", "down_block_types", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "scaling_factor", "up_block_types",
}  # fmt: skip
_AUTOENCODER_FREE = {"force_upcast", "sample_size"}


def _check(config: Mapping, fixed: Mapping, known: set[str], source) -> None:
    """Stops at an option that would change the network."""
    for key, value in config.items():
        if key.startswith("_") or key in known:
            continue
        wanted = fixed.get(key)
        if value != wanted and (key in fixed or value not in (None, False)):
            raise UserError(
                f"{source}: {key}={value!r} is not supported: this network has "
                f"{key}={wanted!r}"
            )


def _widths(config: Mapping, source) -> tuple[int, tuple[int, ...]]:
    """Base width and multipliers."""
    widths = config["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths or any(
        not isinstance(w, int) or w < 1 or w % widths[0] for w in widths
    ):
        raise UserError(
            f"{source}: block_out_channels={widths} must be multiples of the first of them"
        )
    return widths[0], tuple(width // widths[0] for width in widths)


def _levels(config: Mapping, key: str, kinds: Mapping[str, bool], source) -> tuple[bool, ...]:
    """The block types of `key` as booleans."""
    if not isinstance(config[key], list | tuple):
        raise UserError(f"{source}: {key}={config[key]!r} is not supported: a list is")
    for kind in config[key]:
        if kind not in kinds:
            raise UserError(
                f"{source}: {key} names {kind!r}, which is not one of {', '.join(kinds)}"
            )
    return tuple(kinds[kind] for kind in config[key])


def _whole(config: Mapping, key: str, source) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{source}: {key}={value!r} is not supported: one whole number is")
    return value


def _heads(config: Mapping, key: str, source) -> int | tuple[int, ...]:
    """One number of heads, or one a level (SD v2)."""
    value = config[key]
    if not isinstance(value, list | tuple):
        return _whole(config, key, source)
    return value[0] if len(set(value)) == 1 else tuple(value)


def _needs(config: Mapping, keys: Sequence[str], source) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        kind = config.get("_class_name")
        of = f" of {kind}" if kind else ""
        raise UserError(
            f"{source}: config.json{of} lacks {', '.join(missing)}: give the folder of the network "
            "that is asked for, or fetch the file again"
        )


def unet_spec(
    config: Mapping[str, Any], source: str | os.PathLike[str] = "config"
) -> unet.UNetSpec:
    """The spec of a `UNet2DConditionModel`'s config.

    `attention_head_dim` is the number of heads there (a historical misnomer of diffusers).

    Raises:
      UserError: naming the option that our network does not have.
    """
    optional = {"num_attention_heads", "sample_size", "time_cond_proj_dim"}
    _needs(config, sorted(_UNET_READ - optional), source)
    _check(config, _UNET_FIXED, _UNET_READ | _UNET_FREE, source)
    base, mults = _widths(config, source)
    down = _levels(
        config, "down_block_types", {"CrossAttnDownBlock2D": True, "DownBlock2D": False}, source
    )
    up = _levels(
        config, "up_block_types", {"CrossAttnUpBlock2D": True, "UpBlock2D": False}, source
    )
    if up != down[::-1]:
        raise UserError(
            f"{source}: up_block_types={config['up_block_types']} do not mirror down_block_types="
            f"{config['down_block_types']}, which is not supported"
        )
    named = config.get("num_attention_heads") is not None
    told = config.get("time_cond_proj_dim") is not None
    number = functools.partial(_whole, config, source=source)
    return unet.UNetSpec(
        base,
        context_dim=number("cross_attention_dim"),
        channel_mults=mults,
        attention_levels=down,
        blocks_per_level=number("layers_per_block"),
        heads=_heads(config, "num_attention_heads" if named else "attention_head_dim", source),
        groups=number("norm_num_groups"),
        in_channels=number("in_channels"),
        out_channels=number("out_channels"),
        sample_size=64 if config.get("sample_size") is None else number("sample_size"),
        guidance_dim=number("time_cond_proj_dim") if told else 0,
    )


def autoencoder_spec(
    config: Mapping[str, Any], source: str | os.PathLike[str] = "config"
) -> autoencoder.AutoencoderSpec:
    """The spec of an `AutoencoderKL`'s config.

    Raises:
      UserError: naming the option that our network does not have.
    """
    optional = {"mid_block_add_attention", "scaling_factor"}
    _needs(config, sorted(_AUTOENCODER_READ - optional), source)
    _check(config, _AUTOENCODER_FIXED, _AUTOENCODER_READ | _AUTOENCODER_FREE, source)
    base, mults = _widths(config, source)
    _levels(config, "down_block_types", {"DownEncoderBlock2D": False}, source)
    _levels(config, "up_block_types", {"UpDecoderBlock2D": False}, source)
    number = functools.partial(_whole, config, source=source)
    return autoencoder.AutoencoderSpec(
        base,
        channel_mults=mults,
        blocks_per_level=number("layers_per_block"),
        latent_channels=number("latent_channels"),
        groups=number("norm_num_groups"),
        mid_attention=bool(config.get("mid_block_add_attention", True)),
    )


# --- tensors ----------------------------------------------------------------------------------


def _pointwise(t: np.ndarray) -> np.ndarray:
    """A linear layer, stored as such or as a convolution of size 1, to a `Dense` kernel."""
    return linear(t.reshape(t.shape[:2]))


NORM = ("scale", same)
DENSE = ("kernel", linear)
CONV = ("kernel", conv)
POINTWISE = ("kernel", _pointwise)

# (layer there, layer here, its weight); a layer without a bias has no such tensor to match. The
# transformer's are those of the original checkpoints too.
_RESNET = (
    (r"norm(?P<k>[12])", r"norm\g<k>", NORM),
    (r"conv(?P<k>[12])", r"conv\g<k>", CONV),
    (r"time_emb_proj", r"time_emb_proj", DENSE),
    (r"conv_shortcut", r"conv_shortcut", CONV),
)
_BLOCK = r"transformer_blocks\.0\."
TRANSFORMER = (
    (r"norm", r"norm", NORM),
    (r"proj_(?P<k>in|out)", r"proj_\g<k>", POINTWISE),
    (_BLOCK + r"norm(?P<k>[123])", r"block/norm\g<k>", NORM),
    (_BLOCK + r"attn(?P<k>[12])\.to_(?P<q>[qkv])", r"block/attn\g<k>/to_\g<q>", DENSE),
    (_BLOCK + r"attn(?P<k>[12])\.to_out\.0", r"block/attn\g<k>/to_out", DENSE),
    (_BLOCK + r"ff\.net\.0\.proj\[in\]", r"block/ff_in", DENSE),
    (_BLOCK + r"ff\.net\.0\.proj\[gate\]", r"block/ff_gate", DENSE),
    (_BLOCK + r"ff\.net\.2", r"block/ff_out", DENSE),
)
# The autoencoder's attention, under the names of today and those of older checkpoints.
_ATTENTION = (
    (r"group_norm", r"attn_norm", NORM),
    (r"to_(?P<k>[qkv])", r"attn/to_\g<k>", POINTWISE),
    (r"to_out\.0", r"attn/to_out", POINTWISE),
    (r"query", r"attn/to_q", POINTWISE),
    (r"key", r"attn/to_k", POINTWISE),
    (r"value", r"attn/to_v", POINTWISE),
    (r"proj_attn", r"attn/to_out", POINTWISE),
)


def one(weight: tuple) -> tuple:
    """A place that is a single layer."""
    return ((r"", r"", weight),)


def rules_of(source: str, target: str, layers: Sequence[tuple]) -> list[Rule]:
    """Rules for the weights and biases of `layers` at one place."""
    rules = []
    for there, here, (leaf, layout) in layers:
        there, here = source + there, target + here
        rules += [Rule(there + r"\.weight", f"{here}/{leaf}", layout)]
        rules += [Rule(there + r"\.bias", f"{here}/bias")]
    return rules


def _unet_rules(spec: unet.UNetSpec) -> list[Rule]:
    rules = rules_of(r"conv_in", r"conv_in", one(CONV))
    rules += rules_of(r"time_embedding\.linear_(?P<k>[12])", r"time_embedding_\g<k>", one(DENSE))
    rules += rules_of(r"time_embedding\.cond_proj", r"guidance_embedding", one(DENSE))
    rules += rules_of(r"mid_block\.resnets\.(?P<j>\d+)\.", r"mid_res_\g<j>/", _RESNET)
    rules += rules_of(r"mid_block\.attentions\.0\.", r"mid_attn/", TRANSFORMER)
    rules += rules_of(r"conv_norm_out", r"norm_out", one(NORM))
    rules += rules_of(r"conv_out", r"conv_out", one(CONV))
    levels = len(spec.channel_mults)
    for i in range(levels):
        # diffusers counts the way up from the bottom, we count levels.
        for there, here in ((rf"down_blocks\.{i}", f"down_{i}"),
                            (rf"up_blocks\.{levels - 1 - i}", f"up_{i}")):
            rules += rules_of(there + r"\.resnets\.(?P<j>\d+)\.", here + r"_res_\g<j>/", _RESNET)
            rules += rules_of(
                there + r"\.attentions\.(?P<j>\d+)\.", here + r"_attn_\g<j>/", TRANSFORMER
            )
            rules += rules_of(
                there + r"\.(?P<j>down|up)samplers\.0\.conv", here + r"_\g<j>sample", one(CONV)
            )
    return rules


def split_gates(tensors: Mapping[str, np.ndarray]) -> FlatTensors:
    """GEGLU's one tensor of twice the width as two, values first: `proj[in]`, `proj[gate]`."""
    out = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem.endswith("ff.net.0.proj") and tensor.ndim:
            for half, part in zip(("in", "gate"), np.array_split(tensor, 2), strict=True):
                out[f"{stem}[{half}].{leaf}"] = part
        else:
            out[name] = tensor
    return out


def unet_params(
    spec: unet.UNetSpec, tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]
) -> dict:
    """Float32 parameters of our U-Net from a `UNet2DConditionModel`'s state dict.

    Args:
      spec: the network.
      tensors: the state dict; `proj_in` and `proj_out` linear or convolutions of size 1.
      source: where they came from, for messages.
    Raises:
      UserError: with a diff, unless every tensor and every parameter finds its partner.
    """
    expected = unet.param_shapes(spec)
    return pretrained.fill(expected, split_gates(tensors), _unet_rules(spec), source=source)


def _autoencoder_rules(spec: autoencoder.AutoencoderSpec) -> list[Rule]:
    rules = rules_of(r"quant_conv", r"encoder/quant_conv", one(CONV))
    rules += rules_of(r"post_quant_conv", r"decoder/post_quant_conv", one(CONV))
    levels = len(spec.channel_mults)
    for half in ("encoder", "decoder"):
        there, here = rf"{half}\.", f"{half}/"
        rules += rules_of(there + r"conv_(?P<k>in|out)", here + r"conv_\g<k>", one(CONV))
        rules += rules_of(there + r"conv_norm_out", here + r"norm_out", one(NORM))
        rules += rules_of(
            there + r"mid_block\.resnets\.(?P<j>\d+)\.", here + r"mid/res_\g<j>/", _RESNET
        )
        rules += rules_of(there + r"mid_block\.attentions\.0\.", here + r"mid/", _ATTENTION)
    for i in range(levels):
        for there, here in (
            (rf"encoder\.down_blocks\.{i}", f"encoder/down_{i}"),
            (rf"decoder\.up_blocks\.{levels - 1 - i}", f"decoder/up_{i}"),
        ):
            rules += rules_of(there + r"\.resnets\.(?P<j>\d+)\.", here + r"_res_\g<j>/", _RESNET)
            rules += rules_of(
                there + r"\.(?P<j>down|up)samplers\.0\.conv", here + r"_\g<j>sample", one(CONV)
            )
    return rules


def autoencoder_params(
    spec: autoencoder.AutoencoderSpec,
    tensors: Mapping[str, np.ndarray],
    source: str | os.PathLike[str],
) -> dict:
    """Float32 parameters of our autoencoder from an `AutoencoderKL`'s state dict.

    Args:
      spec: the network.
      tensors: the state dict, the attention's names new or old.
      source: where they came from, for messages.
    Raises:
      UserError: with a diff, unless every tensor and every parameter finds its partner.
    """
    expected = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    return pretrained.fill(expected, tensors, _autoencoder_rules(spec), source=source)
