"""Stable Diffusion's original checkpoints as our networks: one file that holds all of them.

Versions 1 (CompVis, RunwayML) and 2 (Stability AI). Which layers there are is read off the tensors'
names and shapes, for the file has no config; `model.diffusion_model.*` is the U-Net, `model_ema.*`
its average over training, `first_stage_model.*` the autoencoder, `cond_stage_model.*` the text
tower of CLIP (version 1) or OpenCLIP (version 2).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, clip_checkpoint, clip_text, convert, pretrained, unet
from ldm_scaling.models.clip import TextSpec
from ldm_scaling.models.convert import CONV, DENSE, NORM, POINTWISE, TRANSFORMER, one, rules_of
from ldm_scaling.models.pretrained import FlatTensors, Rule

log = logging.getLogger(__name__)

_UNET, _EMA, _AUTOENCODER = "model.diffusion_model.", "model_ema.", "first_stage_model."
# The text tower's place, with what the tensors do not tell: its activation, and which of its states
# condition the U-Net.
_TOWERS = {
    "cond_stage_model.transformer.": ("quick_gelu", "last"),
    "cond_stage_model.model.": ("gelu", "penultimate"),
}
_XL = r"conditioner\..*\.bias"
_HEAD_WIDTH = 64  # of every published text tower, and of version 2's U-Net

_RESNET = (
    (r"in_layers\.0", "norm1", NORM),
    (r"in_layers\.2", "conv1", CONV),
    (r"emb_layers\.1", "time_emb_proj", DENSE),
    (r"out_layers\.0", "norm2", NORM),
    (r"out_layers\.3", "conv2", CONV),
    (r"skip_connection", "conv_shortcut", CONV),
)
_AUTOENCODER_RESNET = (
    (r"norm(?P<k>[12])", r"norm\g<k>", NORM),
    (r"conv(?P<k>[12])", r"conv\g<k>", CONV),
    (r"nin_shortcut", "conv_shortcut", CONV),
)
_ATTENTION = (
    (r"norm", "attn_norm", NORM),
    (r"(?P<k>[qkv])", r"attn/to_\g<k>", POINTWISE),
    (r"proj_out", "attn/to_out", POINTWISE),
)


def _read(path: str | os.PathLike[str], *prefixes: str) -> FlatTensors:
    """The tensors of a file whose names begin with one of `prefixes`.

    Raises `UserError` also for a file of Stable Diffusion XL, by its text towers' biases.
    """
    wanted = "|".join(map(re.escape, prefixes))
    tensors = pretrained.read_torch(path, ignore=[rf"(?!{wanted}|{_XL}).*"])
    if any(re.fullmatch(_XL, name) for name in tensors):
        raise UserError(
            f"{path} is laid out as Stable Diffusion XL's, and such files are read here of "
            "versions 1 and 2 alone: for its autoencoder give the folder vae that diffusers saved, "
            "whose config.json tells the latents' scale"
        )
    return tensors


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> FlatTensors:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _lacks(path: str | os.PathLike[str], what: str, name: str) -> UserError:
    return UserError(
        f"{path} is no original checkpoint of Stable Diffusion 1 or 2 with {what} in it: it has no "
        f"{name}; for weights that diffusers saved, give the folder with their config.json"
    )


# --- the U-Net --------------------------------------------------------------------------------


def load_unet(
    path: str | os.PathLike[str], *, ema: bool = False, sample_size: int = 64
) -> tuple[unet.UNetSpec, dict]:
    """Spec and float32 parameters of the U-Net in an original checkpoint. No tensor tells its
    attention heads: they are 8, or as many of width 64 as there is room for where `proj_in` is a
    linear layer, as in versions 1 and 2.

    Args:
      path: the file, .safetensors, or .ckpt (read through torch).
      ema: the average over training in the place of the last parameters, where a file has both;
        "pruned" and "emaonly" files have one of them alone, under the plain names.
      sample_size: see `unet.UNetSpec`; 96 for version 2's pictures of 768.
    Raises:
      UserError: for a file that cannot be read or holds something else, with a diff where tensors
        do not fit.
    """
    tensors = _read(path, _UNET, *([_EMA] if ema else []))
    params = _under(tensors, _UNET)
    if ema:
        params = _averaged(params, _under(tensors, _EMA), path)
    levels, spec = _unet_spec(params, path, sample_size)
    expected = unet.param_shapes(spec)
    rules = _unet_rules(levels)
    return spec, pretrained.fill(expected, convert.split_gates(params), rules, source=path)


def _averaged(params: FlatTensors, ema: FlatTensors, path) -> FlatTensors:
    """The averages under the parameters' names, which a file has without their dots."""
    flat = {name: ("diffusion_model." + name).replace(".", "") for name in params}
    missing = [name for name in flat.values() if name not in ema]
    if missing:
        raise UserError(
            f"{path} holds no average of {len(missing)} of {len(params)} parameters, such as "
            f"{_EMA}{missing[0]}: convert it without --ema"
        )
    return {name: ema[key] for name, key in flat.items()}


class _Level(NamedTuple):
    width: int
    attention: bool
    blocks: int


def _unet_spec(params: FlatTensors, path, sample_size: int) -> tuple[list[_Level], unet.UNetSpec]:
    """What the names and shapes say."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in params:
            raise _lacks(path, "a U-Net", _UNET + name)
        return params[name].shape

    base, in_channels = shape("input_blocks.0.0.weight")[:2]
    levels, last = [], max(int(k.split(".")[1]) for k in params if k.startswith("input_blocks."))
    for n in range(1, last + 1):
        if f"input_blocks.{n}.0.op.weight" in params:
            levels.append(_Level(0, False, 0))
            continue
        width = shape(f"input_blocks.{n}.0.out_layers.3.weight")[0]
        attention = f"input_blocks.{n}.1.norm.weight" in params
        count = levels.pop().blocks if levels else 0
        levels.append(_Level(width, attention, count + 1))
    project_in = shape("middle_block.1.proj_in.weight")
    heads = 8 if len(project_in) == 4 else [w // _HEAD_WIDTH for w, *_ in levels]
    if len({level.blocks for level in levels}) != 1:
        raise UserError(f"{path}: its levels differ in their number of blocks: not supported")
    return levels, unet.UNetSpec(
        base,
        context_dim=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        channel_mults=tuple(level.width // base for level in levels),
        attention_levels=tuple(level.attention for level in levels),
        blocks_per_level=levels[0].blocks,
        heads=heads,
        in_channels=in_channels,
        out_channels=shape("out.2.weight")[0],
        sample_size=sample_size,
    )


def _unet_rules(levels: list[_Level]) -> list[Rule]:
    """The original counts blocks through all levels, down and then up."""
    rules = rules_of(r"time_embed\.0", "time_embedding_1", one(DENSE))
    rules += rules_of(r"time_embed\.2", "time_embedding_2", one(DENSE))
    rules += rules_of(r"input_blocks\.0\.0", "conv_in", one(CONV))
    rules += rules_of(r"middle_block\.0\.", "mid_res_0/", _RESNET)
    rules += rules_of(r"middle_block\.1\.", "mid_attn/", TRANSFORMER)
    rules += rules_of(r"middle_block\.2\.", "mid_res_1/", _RESNET)
    rules += rules_of(r"out\.0", "norm_out", one(NORM))
    rules += rules_of(r"out\.2", "conv_out", one(CONV))

    def block(there: str, here: str, j: int) -> list[Rule]:
        attention = rules_of(rf"{there}\.1\.", f"{here}_attn_{j}/", TRANSFORMER)
        return rules_of(rf"{there}\.0\.", f"{here}_res_{j}/", _RESNET) + attention

    n = 1
    for i, level in enumerate(levels):
        for j in range(level.blocks):
            rules += block(rf"input_blocks\.{n + j}", f"down_{i}", j)
        n += level.blocks
        rules += rules_of(rf"input_blocks\.{n}\.0\.op", f"down_{i}_downsample", one(CONV))
        n += 1
    n = 0
    for i, level in reversed(list(enumerate(levels))):
        for j in range(level.blocks + 1):
            rules += block(rf"output_blocks\.{n + j}", f"up_{i}", j)
        n += level.blocks + 1
        # After the transformer, or in its place.
        up = rf"output_blocks\.{n - 1}\.{2 if level.attention else 1}\.conv"
        rules = rules_of(up, f"up_{i}_upsample", one(CONV)) + rules
    return rules


# --- the autoencoder --------------------------------------------------------------------------


def load_autoencoder(
    path: str | os.PathLike[str],
) -> tuple[autoencoder.AutoencoderSpec, dict, float]:
    """Spec, float32 parameters and latent scale of the autoencoder in an original checkpoint, or in
    a file of an autoencoder alone (such as vae-ft-mse-840000-ema-pruned). Where the file does not
    tell the scale it is that of versions 1 and 2; of an autoencoder alone, which may be another's,
    a warning says so.

    Raises:
      UserError: as `load_unet`.
    """
    halves = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    tensors = _read(path, _AUTOENCODER, "scale_factor", *halves)
    told = tensors.pop("scale_factor", None)
    params = _under(tensors, _AUTOENCODER) or tensors
    alone = params is tensors
    # What its training compared pictures with, and averages.
    params = {k: t for k, t in params.items() if not k.startswith(("loss.", _EMA))}
    spec = _autoencoder_spec(params, path)
    expected = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    params = pretrained.fill(expected, params, _autoencoder_rules(spec), source=path)
    if told is None and alone:
        log.warning(
            "%s does not tell what its latents are multiplied by: %g is taken, as of Stable "
            "Diffusion 1 and 2. Of another, such as XL's (0.13025), give the folder that diffusers "
            "saved, whose config.json has its scaling_factor",
            path, convert.SCALE,
        )
    return spec, params, convert.SCALE if told is None else float(told)


def _autoencoder_spec(params: FlatTensors, path) -> autoencoder.AutoencoderSpec:
    def shape(name: str) -> tuple[int, ...]:
        if name not in params:
            raise _lacks(path, "an autoencoder", _AUTOENCODER + name)
        return params[name].shape

    base = shape("encoder.conv_in.weight")[0]
    places = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name) for name in params]
    blocks = {(int(m[1]), int(m[2])) for m in places if m}
    if not blocks:
        raise _lacks(path, "an autoencoder", f"{_AUTOENCODER}encoder.down.0.block.0")
    levels, per_level = (1 + max(numbers) for numbers in zip(*blocks))
    widths = [shape(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    return autoencoder.AutoencoderSpec(
        base,
        channel_mults=tuple(width // base for width in widths),
        blocks_per_level=per_level,
        latent_channels=shape("post_quant_conv.weight")[0],
        mid_attention="encoder.mid.attn_1.norm.weight" in params,
    )


def _autoencoder_rules(spec: autoencoder.AutoencoderSpec) -> list[Rule]:
    rules = rules_of(r"quant_conv", "encoder/quant_conv", one(CONV))
    rules += rules_of(r"post_quant_conv", "decoder/post_quant_conv", one(CONV))
    for half, way in (("encoder", "down"), ("decoder", "up")):
        there, here = rf"{half}\.", f"{half}/"
        rules += rules_of(there + r"conv_(?P<k>in|out)", here + r"conv_\g<k>", one(CONV))
        rules += rules_of(there + r"norm_out", here + "norm_out", one(NORM))
        rules += rules_of(there + r"mid\.attn_1\.", here + "mid/", _ATTENTION)
        for j in (0, 1):
            rules += rules_of(
                there + rf"mid\.block_{j + 1}\.", here + f"mid/res_{j}/", _AUTOENCODER_RESNET
            )
        for i in range(len(spec.channel_mults)):
            stem, name = there + rf"{way}\.{i}\.", here + f"{way}_{i}"
            rules += rules_of(
                stem + r"block\.(?P<j>\d+)\.", name + r"_res_\g<j>/", _AUTOENCODER_RESNET
            )
            rules += rules_of(stem + rf"{way}sample\.conv", f"{name}_{way}sample", one(CONV))
    return rules


# --- the text tower ---------------------------------------------------------------------------


def load_text(path: str | os.PathLike[str]) -> tuple[TextSpec, dict, str]:
    """Spec and float32 parameters of the text tower in an original checkpoint, and which of its
    states (`clip_text.LAYERS`) condition the U-Net.

    Raises:
      UserError: as `load_unet`.
    """
    tensors = _read(path, *_TOWERS)
    found = [prefix for prefix in _TOWERS if any(k.startswith(prefix) for k in tensors)]
    if not found:
        raise _lacks(path, "a text tower", " or ".join(f"{prefix}*" for prefix in _TOWERS))
    activation, layer = _TOWERS[found[0]]
    params = clip_checkpoint.split_products(_under(tensors, found[0]))
    spec = _text_spec(params, path, activation)
    params = pretrained.fill(
        clip_text.abstract_params(spec), params, clip_text.RULES, source=path,
        ignore=(*clip_text.IGNORE, "attn_mask"),
    )
    return spec, params, layer


def _text_spec(params: FlatTensors, path, activation: str) -> TextSpec:
    def shape(pattern: str) -> tuple[int, ...]:
        named = [t.shape for name, t in params.items() if re.fullmatch(pattern, name)]
        if not named:
            raise _lacks(path, "a text tower", pattern)
        return named[0]

    vocabulary, width = shape(r"(?:.*\.)?token_embedding\.weight")
    numbers = [re.search(r"(?:layers|resblocks)\.(\d+)\.", name) for name in params]
    projection = params.get("text_projection")
    return TextSpec(
        width,
        layers=1 + max((int(m[1]) for m in numbers if m), default=0),
        heads=max(1, width // _HEAD_WIDTH),
        hidden=shape(r".*\.mlp\.(?:fc1|c_fc)\.bias")[0],
        activation=activation,
        projection=None if projection is None else projection.shape[1],
        vocabulary=vocabulary,
        positions=shape(r"(?:.*\.)?position_embedding\.weight|positional_embedding")[0],
    )
