"""The frozen encoders in one shape: what makes latents of pictures, and states of captions.

They are the study's own (its trained autoencoder, MiniLM) or published ones, read from the files
that their libraries write or that `ldm-scaling convert` wrote.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import (
    autoencoder,
    clip_checkpoint,
    clip_text,
    clip_tokenizer,
    convert,
    convert_compvis,
    converted,
    pretrained,
    spread,
    t5,
    text_encoder,
    text_network,
    tokenizing,
)
from ldm_scaling.parallel import hosts, placing
from ldm_scaling.parallel import mesh as mesh_lib

# --- pictures ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LatentEncoder:
    """An autoencoder whose encoder is frozen.

    Attributes:
      spec: the network.
      params: of both halves, so that its decoder serves too.
      scale: what its publisher multiplies latents by; None where their deviation decides.
      dtype: of the computation; float32 is so in every product too.
      hash: of all that decides a latent: sizes and values of the encoder, type. The decoder does
        not count.
    """

    spec: autoencoder.AutoencoderSpec
    params: Any
    scale: float | None
    dtype: Any
    hash: str

    def encode(self, params: Any, x_BHWC: jax.Array) -> autoencoder.Posterior:
        """The posterior of pictures in [-1, 1]; `params` as the attribute, placed as needed."""
        # By default a TPU multiplies in bfloat16, a GPU in TF32.
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            return autoencoder.encode(self.spec, params, x_BHWC, self.dtype)

    def half(self, mesh: jax.sharding.Mesh) -> Any:
        """The encoder's half of `params`, all that `encode` takes, whole on each of some devices.
        """
        return placing.replicate(mesh, placing.fetch({"encoder": self.params["encoder"]}))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of pictures. Raises `UserError` for sides that do not divide."""
        f = self.spec.downsampling
        if height % f or width % f:
            raise UserError(
                f"pictures of {height}x{width} are not whole multiples of the autoencoder's "
                f"downsampling {f}: choose another side"
            )
        return (height // f, width // f, self.spec.latent_channels)


def latent_dtype(compute_dtype: str) -> jnp.dtype:
    """What pictures are encoded in: `auto` is float32 on every device, for latents are made but
    once, and in bfloat16 their noise is 36 dB below them (measured at random weights), where the
    least that Stable Diffusion's schedule trains at is 31 dB below."""
    return hosts.compute_dtype("float32" if compute_dtype == "auto" else compute_dtype)


def latent_encoder(
    spec: autoencoder.AutoencoderSpec, params: Any, scale: float | None = None,
    compute_dtype: str = "auto",
) -> LatentEncoder:
    """The encoder of an autoencoder in memory, such as the one that a study trained.

    Args:
      spec, params, scale: see `LatentEncoder`.
      compute_dtype: see `latent_dtype`.
    """
    dtype = latent_dtype(compute_dtype)
    decides = [spec, pretrained.hash_of(params["encoder"]), jnp.dtype(dtype).name]
    return LatentEncoder(spec, params, scale, dtype, sha256_of(decides))


def latent_encoder_from(
    path: str | os.PathLike[str], compute_dtype: str = "auto"
) -> LatentEncoder:
    """A published autoencoder.

    Args:
      path: a folder of diffusers' `AutoencoderKL` or its file of weights, a Stable Diffusion folder
        with such a `vae` in it, an original checkpoint (one file, of a whole Stable Diffusion or an
        autoencoder alone), or what `ldm-scaling convert --kind=sd_autoencoder` wrote.
      compute_dtype: see `latent_dtype`.

    Raises:
      UserError: for files that are missing, broken or of something else.
    """
    path = check_encodes(path)
    if converted.is_converted(path):
        found = converted.load(path, "sd_autoencoder")
        loaded = found.spec, found.params, found.settings["scale"]
    elif path.is_dir():
        loaded = convert.load_autoencoder(path)
    else:
        loaded = convert_compvis.load_autoencoder(path)
    return latent_encoder(*loaded, compute_dtype)


def check_encodes(path: str | os.PathLike[str]) -> Path:
    """Where a published autoencoder's files are; no weights are read.

    Args:
      path: see `latent_encoder_from`.

    Raises:
      UserError: where there is none, or a tiny one, by which nothing can be trained.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"there is no autoencoder at {path}: give a folder of diffusers' AutoencoderKL (such "
            "as that of https://huggingface.co/stabilityai/sd-vae-ft-mse), an original checkpoint, "
            "or what  ldm-scaling convert --kind=sd_autoencoder  wrote"
        )
    if path.is_file() and path.name in pretrained.DIFFUSERS:
        path = path.parent
    if (path / "vae").is_dir():
        path = path / "vae"
    if converted.is_converted(path):
        tiny = converted.read_manifest(path)["kind"] == "tiny_decoder"
    else:
        tiny = path.is_dir() and convert.read_config(path).get("_class_name") == "AutoencoderTiny"
    if tiny:
        raise UserError(
            f"{path} holds a tiny autoencoder, whose latents have no variance and are only "
            "decoded here: give the AutoencoderKL that it imitates"
        )
    return path


# --- captions ---------------------------------------------------------------------------------

_Encoder = text_encoder.TextEncoder | clip_text.ClipText | t5.T5TextEncoder


@dataclasses.dataclass(frozen=True, eq=False)
class TextStates:
    """A frozen text encoder; make one with `text_encoder_from`.

    Attributes:
      name: for messages.
      hash: of all that decides the states.
      length: tokens of a caption, L.
      width: of a state, D.
      zero_padding: whether the states of padding are zeros, which compress.
    """

    name: str
    hash: str
    length: int
    width: int
    zero_padding: bool
    _encoder: _Encoder = dataclasses.field(repr=False)

    @property
    def spec(self) -> Any:
        """The network's sizes; None for MiniLM, which has no others."""
        return getattr(self._encoder, "spec", None)

    @property
    def longest(self) -> int | None:
        """The most that `length` may be; None of a T5, which takes any."""
        return getattr(self.spec or text_encoder.BertSpec(), "positions", None)

    @property
    def network(self) -> text_network.TextNetwork:
        """The encoder as it can be trained. Raises `UserError` for a T5."""
        return text_network.of(self._encoder)

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """ctx_BLD float32. Raises `UserError` for what is no list of Unicode texts."""
        return self._encoder.states(texts)[0]

    def states_and_embeddings(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ctx_BLD as `states`, and sentence embeddings e_BE of unit length, of one pass.

        Raises:
          UserError: for a T5, which has none.
        """
        if not hasattr(self._encoder, "encode"):
            raise UserError(f"{self.name} makes no sentence embeddings: a MiniLM or a CLIP does")
        ctx_BLD, _, e_BE = self._encoder.encode(texts)
        return ctx_BLD, e_BE

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones among them; those beyond `length` are cut off."""
        if isinstance(self._encoder, clip_text.ClipText):
            return self._encoder.tokenizer.lengths(texts)
        return tokenizing.lengths(self._encoder._tokenizer, texts)

    def on(self, mesh: jax.sharding.Mesh, batch: int = 64) -> TextStates:
        """The same with its passes split over a mesh's devices, parameters whole on each.

        Args:
          mesh: of this process's devices.
          batch: captions a pass, rounded up to a multiple of the devices.
        """
        batch = -(-batch // mesh.devices.size) * mesh.devices.size
        encoder = self._encoder
        if isinstance(encoder, clip_text.ClipText):
            over = spread.over(list(mesh.devices.flat), batch, cpu=1, accelerator=1)
            changes = {"spread": over, "_params": over.everywhere(encoder._params)}
        else:
            placed = jax.device_put(encoder._params, mesh_lib.replicated(mesh))

            def split(params, *arrays):
                return encoder._encode(params, *placing.put_batch(mesh, list(arrays)))

            changes = {"batch": batch, "_params": placed, "_encode": split}
        return dataclasses.replace(self, _encoder=dataclasses.replace(encoder, **changes))


def text_states(encoder: _Encoder, name: str) -> TextStates:
    """A text encoder in memory as `TextStates`."""
    zero = not isinstance(encoder, clip_text.ClipText)
    return TextStates(name, encoder.hash, encoder.max_length, encoder.width, zero, encoder)


def text_encoder_from(path: str | os.PathLike[str], length: int) -> TextStates:
    """A frozen text encoder, which computes in float32 whatever `train.compute_dtype` is.

    Args:
      path: empty for MiniLM, which comes with the package; else a folder of transformers' CLIP (its
        text tower or the whole), of OpenCLIP, of T5 (its encoder or the whole), a Stable Diffusion
        folder with `text_encoder` and `tokenizer` in it, or a text tower that `ldm-scaling convert`
        wrote. The vocabulary lies in the folder, or in one called `tokenizer` beside it.
      length: tokens of a caption, special ones among them; longer captions are cut. CLIP's states
        up to it do not depend on it, for its attention is causal. They are of the layer that the
        weights say, else of the last.

    Raises:
      UserError: for files that are missing, broken or of something else, or a length that the
        encoder does not take.
    """
    if not os.fspath(path):
        return text_states(text_encoder.load(length), text_encoder.NAME)
    path = Path(path).expanduser()
    place = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    if not place.is_dir():
        raise UserError(
            f"there is no text encoder at {place}: give the folder of a CLIP or a T5, with its "
            "config.json, weights and vocabulary"
        )
    if converted.is_converted(place):
        if (kind := converted.read_manifest(place)["kind"]) not in ("sd_text", "clip_text"):
            wanted = "folder of transformers" if kind == "t5" else "CLIP or a T5"
            raise UserError(f"{place} holds a converted {kind}: give the {wanted} itself")
        found = converted.load(place)
        return _clip(path, place, found.spec, found.params, found.settings, length)
    config = place / "config.json"
    if config.is_file() and clip_checkpoint.read_json(config).get("model_type") == "t5":
        own = any((place / name).is_file() for name in ("tokenizer.json", "spiece.model"))
        words = None if own else place.parent / "tokenizer"
        encoder = t5.load(place, length, tokenizer=words)
        return text_states(encoder, f"T5 in {path}")
    loaded = converted.KINDS["clip_text"].load(place)
    return _clip(path, place, *loaded, length)


def _clip(path, place, spec, params, settings, length) -> TextStates:
    if not 2 <= length <= spec.positions:
        raise UserError(
            f"the CLIP text tower in {place} takes 2 to {spec.positions} tokens, start and end "
            f"among them, not {length}"
        )
    # OpenCLIP's own folders may hold transformers' config too; where they do not, texts are read
    # as OpenCLIP does.
    theirs = not any((place / name).is_file() for name in ("config.json", converted.MANIFEST))
    behaviour = "open_clip" if theirs else "transformers"
    tokenizer = clip_tokenizer.load(_vocabulary(place), behaviour, length)
    encoder = clip_text.assemble(spec, params, tokenizer, **settings)
    return text_states(encoder, f"CLIP in {path}")


def _vocabulary(place: Path) -> Path:
    for folder in (place, place.parent / "tokenizer"):
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return folder
        if (folder / clip_tokenizer.FILE).is_file():
            return folder / clip_tokenizer.FILE
    return place
