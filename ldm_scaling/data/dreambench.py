"""DreamBench, the subjects and prompts of DreamBooth's evaluation (arXiv 2208.12242, section 4).

    DIR/prompts_and_classes.txt
    DIR/backpack/00.jpg ...

as in the folder `dataset` of https://github.com/google/dreambooth; generated images are

    IMAGES/backpack/07_2.png

the third image of subject `backpack` for its prompt 7, both counted from 0.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import NamedTuple

from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of

SUBJECTS, PROMPTS = 30, 25
FILE = "prompts_and_classes.txt"
URL = "https://github.com/google/dreambooth"
# The animals; all other subjects are objects.
LIVE_CLASSES = ("cat", "dog")
_HEADS = {"Object Prompts": False, "Live Subject Prompts": True}


@dataclasses.dataclass(frozen=True)
class DreamBench:
    """What the folder holds; make one with `read`.

    Attributes:
      images: all real images, by subject.
      subjects: the subject of each of them.
      classes: subject to its class, e.g. "backpack_dog" to "backpack".
      prompts: subject to its prompts, with {0} for the unique token and {1} for the class.
    """

    images: ImageFolder
    subjects: tuple[str, ...]
    classes: dict[str, str]
    prompts: dict[str, tuple[str, ...]]

    @property
    def hash(self) -> str:
        """Hash of subjects, classes and prompts."""
        return sha256_of([self.classes, {k: list(v) for k, v in self.prompts.items()}])

    def caption(self, subject: str, prompt: int) -> str:
        """A prompt with the class and without the unique token, as CLIP-T is measured."""
        return caption(self.prompts[subject][prompt], "", self.classes[subject])


def caption(prompt: str, identifier: str, kind: str) -> str:
    """A prompt with the identifier ("" for none) and the class in it."""
    return " ".join(prompt.format(identifier, kind).split())


class Generated(NamedTuple):
    """Generated images with what each was drawn for."""

    images: ImageFolder
    subjects: tuple[str, ...]
    captions: tuple[str, ...]


def read(root: str | os.PathLike[str]) -> DreamBench:
    """Reads prompts, classes and the folders of subjects.

    Raises `UserError` for a file or a folder that is missing or says something else.
    """
    root = Path(root).expanduser()
    remedy = f"get the folder dataset of {URL} again"
    try:
        text = (root / FILE).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read {root / FILE} ({e.strerror or e}): {remedy}") from e
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    prompts = {}
    for head, live in _HEADS.items():
        match = re.search(rf"^{head}\s+prompt_list = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        prompts[live] = tuple(re.findall(r"^\s*'(.*?)'\.format", match[1] if match else "", re.M))
    if not classes or not all(prompts.values()):
        raise UserError(f"{root / FILE} holds no classes or no prompts: {remedy}")
    absent = [subject for subject in classes if not (root / subject).is_dir()]
    if absent:
        raise UserError(f"{root} lacks the folders of {', '.join(absent)}: {remedy}")
    folders = {subject: image_folder.listing(root / subject) for subject in sorted(classes)}
    names = [(subject, f"{subject}/{name}") for subject, f in folders.items() for name in f.names]
    return DreamBench(
        images=ImageFolder(root, tuple(name for _, name in names)),
        subjects=tuple(subject for subject, _ in names),
        classes=classes,
        prompts={s: prompts[classes[s] in LIVE_CLASSES] for s in classes},
    )


def generated(
    root: str | os.PathLike[str], bench: DreamBench, limit: int | None = None
) -> Generated:
    """The images drawn for a bench, by name; with `limit` those of the first prompts only.

    Raises `UserError` for a name that says no subject and prompt of the bench, and when a prompt of
    a subject has no image or more than another.
    """
    images = image_folder.listing(root)
    names, subjects, captions, counts = [], [], [], {}
    for name in images.names:
        match = re.fullmatch(r"(\w+)/(\d+)(?:_\d+)?", Path(name).with_suffix("").as_posix())
        subject, prompt = (match[1], int(match[2])) if match else ("", 0)
        if prompt >= len(bench.prompts.get(subject, ())):
            raise UserError(
                f"{images.root / name} is of no subject and prompt of DreamBench: name it "
                "SUBJECT/PROMPT_K.png, prompts counted from 00, e.g. backpack/07_2.png"
            )
        if limit is not None and prompt >= limit:
            continue
        names.append(name)
        subjects.append(subject)
        captions.append(bench.caption(subject, prompt))
        counts[subject, prompt] = counts.get((subject, prompt), 0) + 1
    every = [(s, p) for s, all in bench.prompts.items() for p in range(len(all[:limit]))]
    most = max(counts.values(), default=1)
    uneven = [key for key in every if counts.get(key, 0) != most]
    if uneven:
        subject, prompt = uneven[0]
        raise UserError(
            f"{images.root} holds {counts.get(uneven[0], 0)} images of {subject}, prompt {prompt}, "
            f"and {most} of others: draw as many of each ({len(uneven)} differ)"
        )
    return Generated(ImageFolder(images.root, tuple(names)), tuple(subjects), tuple(captions))
