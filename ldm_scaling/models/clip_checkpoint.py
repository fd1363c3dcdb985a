"""CLIP's files: tensors as transformers names them or as OpenAI and OpenCLIP do, and configs.

The tensors' names tell which layout a file has; neither torch nor any peer is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained
from ldm_scaling.models.clip import PUBLISHED, ImageSpec, TextSpec
from ldm_scaling.models.pretrained import FlatTensors

# In the order in which they are looked for in a folder; in parts too where transformers wrote it.
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_FILES = (*pretrained.TRANSFORMERS, *OPEN_CLIP)
_PROJECTIONS = {
    "text": {"text_projection.weight", "text_projection"},
    "image": {"visual_projection.weight", "visual.proj"},
}


class Checkpoint(NamedTuple):
    """A tower's tensors and where they came from; `layout` is "transformers" or "open_clip"."""

    path: Path
    layout: str
    tensors: FlatTensors

    @property
    def folder(self) -> Path:
        """Where configs and vocabularies lie."""
        return self.path if self.path.is_dir() else self.path.parent


def read(
    path: str | os.PathLike[str], tower: str, ignore: Sequence[str], model: str | None = None
) -> Checkpoint:
    """The tensors of the tower "text" or "image" in a file or folder.

    Args:
      path: a file of weights, or the folder of one.
      tower: for words.
      ignore: patterns of whole names: what the file holds beside the tower.
      model: one of `PUBLISHED`, for words too.

    Raises:
      UserError: for a file that is missing, cannot be read, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        found = pretrained.present(path, _FILES)
        if found and found[0].startswith("open_clip"):
            path = path / found[0]
    else:
        found = [path] if path.is_file() else []
    names = [model] if model in PUBLISHED else PUBLISHED
    places = ", ".join(f"{PUBLISHED[name].repository} ({name})" for name in names)
    remedy = (
        "fetch model.safetensors and config.json, and for texts tokenizer.json, from "
        f"https://huggingface.co, repository {places}, and give the folder that they are in"
    )
    if not found:
        raise UserError(f"there are no CLIP weights at {path}: {remedy}")
    tensors = pretrained.read_weights(path, ignore)
    if any(".resblocks." in name for name in tensors):
        return Checkpoint(path, "open_clip", split_products(tensors))
    if any("encoder.layers." in name for name in tensors):
        return Checkpoint(path, "transformers", tensors)
    holds = f", but {', '.join(list(tensors)[:3])}, ..." if tensors else ""
    raise UserError(f"{path} holds no CLIP {tower} tower{holds}: {remedy}")


def split_products(tensors: FlatTensors) -> FlatTensors:
    """OpenCLIP keeps the three products before attention in one tensor: three, each by name."""
    split = {}
    for name, t in tensors.items():
        stem, packed, leaf = name.partition("in_proj_")
        if packed and t.shape[0] % 3 == 0:
            for kind, part in zip(("query", "key", "value"), np.split(t, 3)):
                split[f"{stem}{kind}.{leaf}"] = part
        else:
            split[name] = t
    return split


def read_json(file: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises `UserError`."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file} ({e}): fetch it again") from e
    if not isinstance(table, dict):
        raise UserError(f"{file} holds no table: fetch it again")
    return table


def spec_of(checkpoint: Checkpoint, tower: str, model: str | None = None) -> TextSpec | ImageSpec:
    """The spec of the tower "text" or "image": that of the config beside the weights, or that of
    `model`, one of `clip.PUBLISHED`; without a projection where no tensor holds it.

    Raises:
      UserError: for an unknown name, a config that is missing, or one that contradicts the name.
    """
    if model is not None and model not in PUBLISHED:
        raise UserError(f"no CLIP is called {model!r}; these are: {', '.join(PUBLISHED)}")
    config, reader = {
        "transformers": ("config.json", transformers_spec),
        "open_clip": ("open_clip_config.json", open_clip_spec),
    }[checkpoint.layout]
    file = checkpoint.folder / config
    named = model and getattr(PUBLISHED[model], tower)
    spec = reader(read_json(file), tower, file) if file.is_file() else named
    if spec is None:
        raise UserError(
            f"{checkpoint.path} does not tell its sizes: put the {config} of its repository "
            f"beside it, or name the model, one of {', '.join(PUBLISHED)}"
        )
    described, wanted = (dataclasses.asdict(s or spec) | {"eot": None} for s in (spec, named))
    if described != wanted:
        raise UserError(f"{file} describes {spec}, while {model} is {named}: leave out the name")
    if _PROJECTIONS[tower].isdisjoint(checkpoint.tensors):
        spec = dataclasses.replace(spec, projection=None)
    return spec


# --- configs ----------------------------------------------------------------------------------

# transformers' own, for what a config.json leaves out.
_DEFAULTS = {
    "text": {
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "intermediate_size": 2048, "hidden_act": "quick_gelu", "projection_dim": 512,
        "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
    "image": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "quick_gelu", "projection_dim": 512,
        "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
    },
}  # fmt: skip


def transformers_spec(
    config: Mapping[str, Any], tower: str, source: str | os.PathLike[str] = "config"
) -> TextSpec | ImageSpec:
    """The spec of the tower "text" or "image" in a config.json of that tower or of both.

    Raises:
      UserError: for a config of something else, or of what the towers here do not have.
    """
    name, c = {"text": "text", "image": "vision"}[tower], dict(_DEFAULTS[tower])
    if config.get("model_type") == f"clip_{name}_model":
        c |= config
    elif config.get("model_type") == "clip":
        c |= config.get(f"{name}_config") or {}
        if (older := config.get(f"{name}_config_dict")) is not None:  # wins, defaults and all
            c |= {**_DEFAULTS[tower], **older}
        c["projection_dim"] = config.get("projection_dim", 512)
    else:
        raise UserError(
            f"{source} describes no CLIP {tower} tower: model_type={config.get('model_type')!r}"
        )
    shared = {
        "width": c["hidden_size"], "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "hidden": c["intermediate_size"],
        "activation": c["hidden_act"], "projection": c["projection_dim"],
        "eps": c["layer_norm_eps"],
    }  # fmt: skip
    if tower == "image":
        if c["num_channels"] != 3:
            raise UserError(f"{source}: num_channels={c['num_channels']} is not supported: 3 is")
        return ImageSpec(side=c["image_size"], patch=c["patch_size"], **shared)
    eot = c["eos_token_id"]
    if type(eot) is not int:
        raise UserError(f"{source}: eos_token_id={eot!r} is not supported: one whole number is")
    # Old configs say 2, which is no such token: transformers then reads at the highest id.
    eot = None if eot == 2 else eot
    vocabulary, positions = c["vocab_size"], c["max_position_embeddings"]
    return TextSpec(eot=eot, vocabulary=vocabulary, positions=positions, **shared)


_OPTIONS = {
    "model": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
    "image": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size",
              "patch_dropout"},
}  # fmt: skip


def open_clip_spec(
    config: Mapping[str, Any], tower: str, source: str | os.PathLike[str] = "config"
) -> TextSpec | ImageSpec:
    """The spec of the tower "text" or "image" in an open_clip_config.json.

    Raises:
      UserError: for options that the towers here do not have.
    """
    model = config.get("model_cfg", config)
    c = model.get({"text": "text_cfg", "image": "vision_cfg"}[tower], {})
    for options, known in ((model, _OPTIONS["model"]), (c, _OPTIONS[tower])):
        if unknown := {k: v for k, v in options.items() if k not in known and v}:
            raise UserError(f"{source}: {unknown} is not supported in a CLIP {tower} tower")
    try:
        shared = {
            "width": c["width"], "layers": c["layers"], "projection": model["embed_dim"],
            "hidden": int(c["width"] * c.get("mlp_ratio", 4.0)),
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        }  # fmt: skip
        if tower == "image":
            heads = c["width"] // c.get("head_width", 64)
            return ImageSpec(side=c["image_size"], patch=c["patch_size"], heads=heads, **shared)
        vocabulary, positions = c.get("vocab_size", 49408), c.get("context_length", 77)
        return TextSpec(heads=c["heads"], vocabulary=vocabulary, positions=positions, **shared)
    except (KeyError, TypeError) as e:
        raise UserError(f"{source} does not describe a CLIP {tower} tower: {e!r}") from e
