"""Published weights as Orbax checkpoints: `ldm-scaling convert` writes them, `load` reads them.

    PATH/manifest.json    kind, sizes, source and its SHA-256, shapes and types, a hash of values
    PATH/params/          the parameters, float32, as an Orbax checkpoint
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_scaling import __version__, files
from ldm_scaling.errors import UserError, first_line, read_error
from ldm_scaling.models import (
    autoencoder,
    clip,
    clip_checkpoint,
    clip_image,
    clip_text,
    convert,
    convert_compvis,
    dino,
    dino_vit,
    pretrained,
    t5,
    tiny_decoder,
    unet,
)

MANIFEST = "manifest.json"
_PARAMS = "params"
_FORMAT = 1


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
      about: what is read, for the help text.
      spec: the class of its sizes.
      load: `load(path, **options) -> (spec, params, settings)`; settings are what else belongs to
        the weights.
      options: that `load` takes.
    """

    about: str
    spec: type
    load: Callable[..., tuple[Any, Any, dict[str, Any]]]
    options: tuple[str, ...] = ()


def _sd_unet(path: Path, ema: bool = False, side: int | None = None):
    if not path.is_dir():
        return *convert_compvis.load_unet(path, ema=ema, sample_size=side or 64), {}
    if ema:
        raise UserError(f"{path} is a folder of diffusers, which holds one set of weights: leave "
                        "out --ema")
    if side:
        raise UserError(f"{path} is a folder of diffusers, whose config.json tells the side of "
                        "latents: leave out --side")
    return *convert.load_unet(path), {}


def _sd_autoencoder(path: Path):
    load = convert.load_autoencoder if path.is_dir() else convert_compvis.load_autoencoder
    spec, params, scale = load(path)
    return spec, params, {"scale": scale}


def _tiny_decoder(path: Path):
    spec, params, scale = tiny_decoder.load(path)
    return spec, params, {"scale": scale}


def _sd_text(path: Path):
    if path.is_dir():
        spec, params, _ = _clip("text", clip_text, path)
        return spec, params, {"layer": "last"}
    spec, params, layer = convert_compvis.load_text(path)
    return spec, params, {"layer": layer}


def _clip(tower: str, module: Any, path: Path, model: str | None = None):
    checkpoint = clip_checkpoint.read(path, tower, module.IGNORE, model)
    spec = clip_checkpoint.spec_of(checkpoint, tower, model)
    expected, source = module.abstract_params(spec), checkpoint.path
    return spec, pretrained.fill(expected, checkpoint.tensors, module.RULES, source=source), {}


def _t5(path: Path):
    spec = t5.spec_of(convert.read_config(path), path / "config.json")
    return spec, t5.params_of(spec, pretrained.read_weights(path, t5.IGNORE), path), {}


def _dino(path: Path, model: str | None = None):
    if model not in (None, *dino.PRESETS):
        raise UserError(f"no DINO is called {model!r}; these are: {', '.join(dino.PRESETS)}")
    if model is None and not path.is_dir():
        raise UserError(
            f"{path} does not tell its sizes: name the model with --model, one of "
            f"{', '.join(dino.PRESETS)}"
        )
    if model is None:
        spec = dino_vit.spec_of(convert.read_config(path), path / "config.json")
    else:
        spec = dino.PRESETS[model]
    return spec, dino_vit.params_of(spec, pretrained.read_weights(path), path), {}


KINDS = {
    "sd_unet": Kind(
        "U-Net of Stable Diffusion 1 or 2: a folder `unet` of diffusers, or an original checkpoint",
        unet.UNetSpec, _sd_unet, ("ema", "side"),
    ),
    "sd_autoencoder": Kind(
        "its autoencoder: a folder `vae`, or an original checkpoint",
        autoencoder.AutoencoderSpec, _sd_autoencoder,
    ),
    "sd_text": Kind(
        "its text tower: a folder `text_encoder`, or an original checkpoint",
        clip.TextSpec, _sd_text,
    ),
    "tiny_decoder": Kind(
        "TAESD's decoder: taesd_decoder.safetensors, or a folder of diffusers",
        tiny_decoder.TinyDecoderSpec, _tiny_decoder,
    ),
    "clip_text": Kind(
        "CLIP's text tower: a folder of transformers or OpenCLIP",
        clip.TextSpec, functools.partial(_clip, "text", clip_text), ("model",),
    ),
    "clip_image": Kind(
        "CLIP's image tower: a folder of transformers or OpenCLIP",
        clip.ImageSpec, functools.partial(_clip, "image", clip_image), ("model",),
    ),
    "t5": Kind("T5's encoder: a folder of transformers", t5.T5Spec, _t5),
    "dino": Kind(
        "DINO or DINOv2: a folder of transformers, or the authors' .pth with --model",
        dino_vit.VitSpec, _dino, ("model",),
    ),
}  # fmt: skip


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises `UserError` that lists all."""
    if name in KINDS:
        return KINDS[name]
    near = difflib.get_close_matches(str(name), KINDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"no kind of network is called {name!r}: {hint}there are {', '.join(KINDS)}")


# --- writing ----------------------------------------------------------------------------------


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """What a network is read from: the file itself, or a folder's tables and weights.

    Raises:
      UserError: when there is nothing to read.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    names = (*pretrained.DIFFUSERS, *pretrained.TRANSFORMERS, *clip_checkpoint.OPEN_CLIP)
    return sorted({*path.glob("*.json"), *pretrained.weights_files(path, names)})


def write(
    kind: str, source: str | os.PathLike[str], target: str | os.PathLike[str], **options: Any
) -> Path:
    """Converts published weights; returns the folder written.

    Args:
      kind: one of `KINDS`.
      source: the published file or folder.
      target: a folder that is not there yet; it appears whole or not at all.
      **options: those of the kind; of a U-Net in an original checkpoint `ema` takes the average
        over training, and `side` is that of the latents, which no tensor tells: 64 if not given,
        96 of a version 2 for pictures of 768; `model` names the network where the weights do not
        tell its sizes.
    Raises:
      UserError: for an unknown kind or option, files that are missing, broken or of something else
        (with a diff where tensors do not fit), or a target that is there or cannot be written.
    """
    made, source, target = kind_of(kind), Path(source), Path(target)
    source, target = (path.expanduser().absolute() for path in (source, target))
    given = {name: value for name, value in options.items() if value}
    if extra := [name for name in given if name not in made.options]:
        raise UserError(f"{kind} takes no --{extra[0]}")
    if not source.exists():
        raise UserError(f"there is nothing at {source}: {kind} is made from this: {made.about}")
    with files.atomic_folder(target) as folder:  # First, so that a bad target is told early.
        spec, params, settings = made.load(source, **given)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(os.fspath(folder / _PARAMS), params)
        manifest = {
            "format": _FORMAT,
            "kind": kind,
            "version": __version__,
            "source": os.fspath(source),
            "options": given,
            "sha256": {
                file.relative_to(source.parent).as_posix(): files.sha256_of_file(file)
                for file in source_files(source)
            },
            "spec": dataclasses.asdict(spec),
            "settings": settings,
            "hash": pretrained.hash_of(params),
            "tensors": {
                jax.tree_util.keystr(path, simple=True, separator="/"): [
                    str(leaf.dtype), *leaf.shape
                ]
                for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            },
        }
        files.write_json(folder / MANIFEST, manifest)
    return target


# --- reading ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A network as `write` left it.

    Attributes:
      kind: one of `KINDS`.
      spec: its sizes.
      params: numpy parameters.
      settings: what else belongs to the weights: an autoencoder's `scale`, a text tower's `layer`.
      manifest: all that was written about it.
    """

    kind: str
    spec: Any
    params: Any
    settings: dict[str, Any]
    manifest: dict[str, Any]


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `write` made."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest alone. Raises `UserError` when there is none, or one of another format."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        known = manifest["format"] == _FORMAT and manifest["kind"] in KINDS
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} holds no converted weights ({e!r}): write them with  ldm-scaling convert"
        ) from e
    if not known:
        raise UserError(
            f"{file} is of format {manifest['format']}, kind {manifest['kind']!r}, which this "
            "version does not read: convert the weights again"
        )
    return manifest


def spec_of(manifest: dict[str, Any]) -> Any:
    """The sizes that a manifest tells."""
    return KINDS[manifest["kind"]].spec(**manifest["spec"])


def load(path: str | os.PathLike[str], kind: str | None = None) -> Converted:
    """Converted weights. Any process may read them by itself: none is waited for.

    Args:
      path: the folder.
      kind: what they must be, if given.
    Raises:
      UserError: for another kind, or weights that are damaged: not the shapes, or not the values,
        that the manifest tells.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path)
    if kind not in (None, manifest["kind"]):
        raise UserError(f"{path} holds a {manifest['kind']}, not a {kind}")
    expected: dict[str, Any] = {}
    for name, (dtype, *shape) in manifest["tensors"].items():
        *parents, leaf = name.split("/")
        node = expected
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.empty(shape, dtype)
    # Orbax would wait for all processes when it has read.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            params = checkpointer.restore(os.fspath(path / _PARAMS), expected)
        found = pretrained.hash_of(params)
    except Exception as e:
        cause = read_error(e)
        if not isinstance(cause, (OSError, ValueError, KeyError, TypeError)):
            raise
        raise UserError(
            f"{path} is damaged ({first_line(cause)}): convert the weights again") from e
    if found != manifest["hash"]:
        raise UserError(
            f"{path} is damaged: its values have the hash {found}, not {manifest['hash']}: convert "
            "the weights again"
        )
    return Converted(manifest["kind"], spec_of(manifest), params, manifest["settings"], manifest)
