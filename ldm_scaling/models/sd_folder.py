"""A whole Stable Diffusion 1 or 2 on disk, in the layout of diffusers.

    unet/ vae/ text_encoder/    config.json and weights, or what `ldm-scaling convert` wrote
    tokenizer/                  vocab.json and merges.txt, or tokenizer.json
    scheduler/                  scheduler_config.json: the noise, and what the U-Net predicts
    model_index.json            which pipeline it is, if it is there

`vae` may also be a tiny decoder (diffusers' `AutoencoderTiny`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ldm_scaling.errors import UserError
from ldm_scaling.models import (
    autoencoder,
    clip_checkpoint,
    clip_text,
    clip_tokenizer,
    convert,
    converted,
    pretrained,
    tiny_decoder,
    unet,
)

REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_PIPELINE = "StableDiffusionPipeline"
# Part -> its files of weights, and the kinds that may stand there converted.
_NETWORKS = {
    "unet": (pretrained.DIFFUSERS, ("sd_unet",)),
    "vae": (pretrained.DIFFUSERS, ("sd_autoencoder", "tiny_decoder")),
    "text_encoder": (pretrained.TRANSFORMERS, ("sd_text", "clip_text")),
}
_VOCABULARY = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_SCHEDULER = "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """A folder of which the tables have been read; make one with `read`. Weights load when asked
    for.

    Attributes:
      folder: where it lies.
      unet_spec: the U-Net.
      decoder_spec: what makes pictures of latents.
      prediction: what the U-Net predicts: `epsilon`, `v` or `x0`.
      schedule: the noise's name: `sd` or `sd_zero_snr`.
    """

    folder: Path
    unet_spec: unet.UNetSpec
    decoder_spec: autoencoder.AutoencoderSpec | tiny_decoder.TinyDecoderSpec
    prediction: str
    schedule: str

    def unet_params(self) -> Any:
        """The U-Net's float32 parameters. Raises `UserError` where they do not fit."""
        part = self.folder / "unet"
        if converted.is_converted(part):
            return converted.load(part).params
        return convert.load_unet(part)[1]

    def decoder(self) -> tuple[Any, float]:
        """Parameters of the autoencoder or the tiny decoder, and the latents' scale: pictures are
        decoded from latents / scale. Raises `UserError` where they do not fit.
        """
        part = self.folder / "vae"
        if converted.is_converted(part):
            found = converted.load(part)
            return found.params, found.settings["scale"]
        tiny = isinstance(self.decoder_spec, tiny_decoder.TinyDecoderSpec)
        return (tiny_decoder.load if tiny else convert.load_autoencoder)(part)[1:]

    def text_encoder(self) -> clip_text.ClipText:
        """The text tower with its tokenizer. Raises `UserError` where they do not fit."""
        part, vocabulary = self.folder / "text_encoder", self.folder / "tokenizer"
        if not converted.is_converted(part):
            return clip_text.load_text(part, behaviour="transformers", vocabulary=vocabulary)
        found = converted.load(part)
        tokenizer = clip_tokenizer.load(vocabulary, "transformers", found.spec.positions)
        return clip_text.assemble(found.spec, found.params, tokenizer, **found.settings)


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files that a folder's networks are made from; of converted parts their manifests, which
    hold a hash of the values.

    Raises:
      UserError: naming all that is missing, with what to fetch and where to put it.
    """
    folder, found, missing = Path(folder), [], []
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is not there"
        raise UserError(f"{folder} {what}: a Stable Diffusion is a folder. {_remedy(folder)}")
    for part, (names, _) in _NETWORKS.items():
        place = folder / part
        if converted.is_converted(place):
            found.append(place / converted.MANIFEST)
            continue
        if not (place / "config.json").is_file():
            missing.append(f"{part}/config.json")
        try:
            found += [place / "config.json", *pretrained.weights_files(place, names)]
        except UserError:
            if place.is_dir() and any(place.glob("*.index*.json")):
                raise  # Not missing but broken.
            missing.append(f"{part}/{names[0]}")
    words = [folder / "tokenizer" / name for name in _VOCABULARY]
    found += [file for file in words if file.is_file()]
    if not words[0].is_file():
        missing += [f"tokenizer/{file.name}" for file in words[1:3] if not file.is_file()]
    scheduler = folder / "scheduler" / _SCHEDULER
    found.append(scheduler)
    if not scheduler.is_file():
        missing.append(f"scheduler/{_SCHEDULER}")
    if missing:
        raise UserError(
            f"{folder} is no whole Stable Diffusion, it lacks {', '.join(missing)}. "
            f"{_remedy(folder)}"
        )
    return found


def _remedy(folder: Path) -> str:
    place = folder.parent if folder.is_file() else folder
    return (
        "Fetch a Stable Diffusion 1 or 2 in diffusers' layout, e.g. of "
        f"https://huggingface.co/{REPOSITORY} config.json and the *model.safetensors of unet, vae "
        f"and text_encoder and the folders tokenizer and scheduler, into {place}; of an original "
        "checkpoint (one file for all)  ldm-scaling convert  makes unet (--kind=sd_unet), vae "
        "(sd_autoencoder) and text_encoder (sd_text)"
    )


def read(folder: str | os.PathLike[str]) -> StableDiffusion:
    """Reads a folder's tables, and no weights.

    Raises:
      UserError: naming what is missing and what to fetch, an option that is not supported, or parts
        that do not belong together.
    """
    folder = Path(folder).expanduser()
    files(folder)
    index = folder / "model_index.json"
    pipeline = clip_checkpoint.read_json(index).get("_class_name") if index.is_file() else _PIPELINE
    if pipeline != _PIPELINE:
        raise UserError(
            f"{index} describes a {pipeline}; Stable Diffusion 1 and 2 ({_PIPELINE}) are supported"
        )
    specs = {part: _spec(folder, part) for part in _NETWORKS}
    network, decoder, text = specs.values()
    if network.context_dim != text.width:
        raise UserError(
            f"{folder}: the U-Net takes text states of width {network.context_dim}, but the text "
            f"tower's are {text.width} wide: the parts are of different models"
        )
    if not network.in_channels == network.out_channels == decoder.latent_channels:
        raise UserError(
            f"{folder}: the U-Net takes {network.in_channels} channels and gives "
            f"{network.out_channels}, but latents have {decoder.latent_channels}: models for "
            "inpainting and the like are not supported"
        )
    network = dataclasses.replace(network, context_length=text.positions)
    return StableDiffusion(folder, network, decoder, *_noise(folder / "scheduler"))


def _spec(folder: Path, part: str) -> Any:
    place = folder / part
    if converted.is_converted(place):
        manifest = converted.read_manifest(place)
        if manifest["kind"] not in (kinds := _NETWORKS[part][1]):
            raise UserError(f"{place} holds a {manifest['kind']}, not a {' or a '.join(kinds)}")
        return converted.spec_of(manifest)
    config, file = convert.read_config(place), place / "config.json"
    if part == "unet":
        return convert.unet_spec(config, source=file)
    if part == "text_encoder":
        return clip_checkpoint.transformers_spec(config, "text", file)
    if config.get("_class_name") == "AutoencoderTiny":
        return tiny_decoder.spec_of(config, file)
    return convert.autoencoder_spec(config, source=file)


# --- the noise --------------------------------------------------------------------------------

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
# Every published Stable Diffusion 1 and 2 was trained with these.
_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "trained_betas": None,
}  # fmt: skip


def _noise(folder: Path) -> tuple[str, str]:
    """Prediction and schedule. The sampler that a file also names is not looked at."""
    file = folder / _SCHEDULER
    config = clip_checkpoint.read_json(file)
    for key, wanted in _BETAS.items():
        if config.get(key) != wanted:
            raise UserError(
                f"{file}: {key}={config.get(key)!r} is not supported: Stable Diffusion's noise has "
                f"{key}={wanted!r}"
            )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UserError(
            f"{file}: prediction_type={prediction!r} is not supported: {', '.join(_PREDICTIONS)} "
            "are"
        )
    zero = config.get("rescale_betas_zero_snr", False)
    return _PREDICTIONS[prediction], "sd_zero_snr" if zero else "sd"
