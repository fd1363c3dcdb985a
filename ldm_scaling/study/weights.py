"""The published weights of the feature networks: their files, and where each is to be had."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_scaling.errors import UserError
from ldm_scaling.models import clip, dino, inception, lpips

VARIABLE = "LDM_SCALING_WEIGHTS"


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights of others, to be put in the folder of weights.

    Attributes:
      label: what they are of.
      names: files or folders that are looked for, the first is the one to make.
      url: where to get it.
      folder: whether it is a folder with the files of a repository.
    """

    label: str
    names: tuple[str, ...]
    url: str
    folder: bool = False

    @property
    def remedy(self) -> str:
        """How to get them, in words that end in the name to save them under."""
        if self.folder:
            files = "model.safetensors, the .json and the .txt files"
            return f"{files} of {self.url} in a folder {self.names[0]}"
        return f"{self.url} as {self.names[0]}"


def _file(label: str, url: str, *more: str) -> Published:
    name = url.rsplit("/", 1)[1]
    return Published(label, (name, *more, f"{Path(name).stem}.safetensors"), url)


def _clip(model: str, *names: str) -> Published:
    repository = clip.PUBLISHED[model].repository
    names = (*names, repository.rsplit("/", 1)[1])
    return Published(f"CLIP {model}", names, f"https://huggingface.co/{repository}", folder=True)


def _dino(label: str, model: str) -> Published:
    file, folder = dino.SOURCES[model]
    return _file(label, f"https://dl.fbaipublicfiles.com/{file}", folder)


_fidelity, _pytorch_fid = inception.URLS
PUBLISHED = {
    "inception": _file("Inception-2015-12-05", _pytorch_fid, _fidelity.rsplit("/", 1)[1]),
    "clip_b32": _clip("ViT-B/32", "ViT-B-32"),
    "clip_l14": _clip("ViT-L/14", "ViT-L-14"),
    "clip_l14_336": _clip("ViT-L/14@336", "ViT-L-14-336"),
    "clip_g14": _clip("ViT-g/14", "ViT-g-14"),
    "dinov2_l14": _dino("DINOv2 ViT-L/14", "dinov2_vitl14"),
    "dino_s16": _dino("DINO ViT-S/16", "dino_vits16"),
    "alexnet": _file("AlexNet (LPIPS)", lpips.NETS["alex"].source),
    "vgg16": _file("VGG16 (LPIPS)", lpips.NETS["vgg"].source),
}


def folder(given: str | os.PathLike[str] | None) -> Path | None:
    """The folder of weights: the one given, else that of `LDM_SCALING_WEIGHTS`, else None.

    Raises `UserError` when it is not there.
    """
    named = given or os.environ.get(VARIABLE)
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        said = f"--weights={given}" if given else f"{VARIABLE}={named}"
        raise UserError(f"{said}: there is no such folder")
    return path


def find(folder: Path | None, name: str) -> Path | None:
    """Where the weights of a name in `PUBLISHED` lie, None where they do not."""
    places = [folder / n for n in PUBLISHED[name].names] if folder else []
    return next((place for place in places if place.exists()), None)


def require(
    folder: Path | None, needed: Mapping[str, Sequence[str]], free: Sequence[str],
    named: str = f"--weights=DIR or the variable {VARIABLE}",
) -> dict[str, Path]:
    """The paths of weights that scores need.

    Args:
      folder: of weights.
      needed: name in `PUBLISHED` to the scores that need it.
      free: scores that need none, for the message.
      named: by what the folder is named, for the message.

    Raises:
      UserError: naming every file that is missing, where to get it and where to put it.
    """
    found = {name: find(folder, name) for name in needed}
    missing = [
        f"{', '.join(needed[name])} need{'s' if len(needed[name]) == 1 else ''} "
        f"{PUBLISHED[name].label}: save {PUBLISHED[name].remedy}"
        for name, path in found.items() if path is None
    ]
    if missing:
        where = f"in {folder}" if folder else (
            f"in a folder, and name it with {named}"
        )
        raise UserError(
            f"{'; '.join(missing)}; put it {where} ({', '.join(free)} need no download)"
        )
    return found
