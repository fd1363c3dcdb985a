"""A sheet: small pictures in labelled rows and columns, pixel for pixel, under a title."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ldm_scaling.study.plot_style import GRID, INK, SOFT, STYLE

# Small pictures are shown at a whole multiple of their size: up to _SHOWN pixels, and not under
# _LEAST, to keep a sheet within _WIDTH if that can be.
_SHOWN, _LEAST, _WIDTH = 128, 64, 1600
_LABEL_LINES, _HEAD_LINES, _TITLE_LINES, _ABOUT_LINES = 5, 5, 3, 6


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of cells.

    Attributes:
      cells: the pictures of each cell, uint8 (S, H, W, 3).
      labels: to the left of the cells, of several the first in bold; may be empty.
      heads: above the cells, one a cell; may be empty.
      apart: whether a gap parts the row from the one before.
    """

    cells: Sequence[np.ndarray]
    labels: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    apart: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sheet:
    """What `draw` draws.

    Attributes:
      title: in bold, over everything.
      about: a line or more under it.
      rows: of the sheet; pictures all of one size, cells all of one count.
    """

    title: str
    about: str
    rows: Sequence[Row]


@functools.cache
def _own(bold: bool) -> str:
    """File of the plots' own font: it comes with matplotlib, and knows Greek and Cyrillic."""
    weight = "bold" if bold else "normal"
    return font_manager.findfont(
        font_manager.FontProperties(family=STYLE["font.family"], weight=weight))


@functools.cache
def _signs(path: str) -> frozenset[int]:
    """What a font's file has; nothing of one that is not drawn at every size, as bitmaps are."""
    try:
        ImageFont.truetype(path, 20)
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _file(sign: str, bold: bool) -> str | None:
    """File of a font that has a sign, the plots' own before others that are installed."""
    # The last resort has a box for everything.
    others = {f.fname for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name}
    files = (_own(bold), _own(False), *sorted(others))
    return next((path for path in files if ord(sign) in _signs(path)), None)


@dataclasses.dataclass(frozen=True)
class _Font:
    """The plots' own font at a size, and others for signs that it lacks."""

    size: int
    bold: bool

    def spelt(self, text: str) -> str:
        """A text with the numbers of signs that no font has."""
        return "".join(
            sign if sign.isspace() or _file(sign, self.bold) else f"[U+{ord(sign):04X}]"
            for sign in text
        )

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """Parts of a text, each with its font."""
        runs = itertools.groupby(text, lambda sign: _file(sign, self.bold) or _own(self.bold))
        return [(_font(path, self.size), "".join(part)) for path, part in runs]

    def getlength(self, text: str) -> float:
        """Its width in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, canvas: ImageDraw.ImageDraw, x: float, y: int, text: str, fill: str) -> None:
        """Draws a line whose top is at y; all its fonts stand on one base."""
        base = y + _font(_own(self.bold), self.size).getmetrics()[0]
        for font, part in self._runs(text):
            canvas.text((x, base), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@dataclasses.dataclass(frozen=True)
class _Text:
    """Lines of text of one look, broken to a width."""

    lines: tuple[str, ...]
    size: int
    bold: bool
    colour: str

    @classmethod
    def of(
        cls, text: str, width: float, most: int, size: int, bold: bool = False, colour: str = INK
    ) -> _Text:
        """Breaks at spaces, or inside a word that is too long; what does not fit ends in …"""
        font, lines = _Font(size, bold), [""]
        for word in font.spelt(text).split():
            whole = f"{lines[-1]} {word}".strip()
            if font.getlength(whole) <= width:
                lines[-1] = whole
                continue
            lines.append("")
            for character in word:
                if lines[-1] and font.getlength(lines[-1] + character) > width:
                    lines.append("")
                lines[-1] += character
        lines = [line for line in lines if line]
        if len(lines) > most:
            last = lines[most - 1]
            while last and font.getlength(f"{last} …") > width:
                last = last[:-1].rstrip()
            lines = [*lines[: most - 1], f"{last} …"]
        return cls(tuple(lines), size, bold, colour)

    @property
    def line_height(self) -> int:
        return round(1.35 * self.size)

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height

    @property
    def width(self) -> int:
        font = _Font(self.size, self.bold)
        return math.ceil(max((font.getlength(line) for line in self.lines), default=0))

    def draw(self, canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for i, line in enumerate(self.lines):
            top = y + i * self.line_height
            _Font(self.size, self.bold).draw(canvas, x, top, line, self.colour)


def side_by_side(samples: int, columns: int, side: int) -> int:
    """How many of a cell's pictures stand side by side: all, if the sheet is not too wide then;
    otherwise they make a block about as wide as high.

    Args:
      samples: pictures a cell.
      columns: cells a row.
      side: of a picture, in pixels.
    """
    if samples * columns * max(side, _LEAST) <= max(_WIDTH, 8 * side):
        return samples
    return math.ceil(samples / math.isqrt(samples))


def _zoom(side: int, across: int) -> int:
    zoom = max(1, _SHOWN // side)
    while zoom > 1 and across * side * zoom > _WIDTH and side * (zoom - 1) >= _LEAST:
        zoom -= 1
    return zoom


def draw(sheet: Sheet) -> Image.Image:
    """The picture of a sheet; every picture in it keeps its pixels, at a whole multiple."""
    samples, height, width, _ = sheet.rows[0].cells[0].shape
    columns = max(len(row.cells) for row in sheet.rows)
    across = side_by_side(samples, columns, max(height, width))
    zoom = _zoom(max(height, width), columns * across)
    h, w = zoom * height, zoom * width
    gap = max(4, w // 32)
    cell_h, cell_w = -(-samples // across) * (h + gap) - gap, across * (w + gap) - gap

    # Text grows with what it stands beside: a wide sheet is looked at from further away.
    size = round(min(48, max(15, w / 22, columns * cell_w / 110)))
    margin, apart = size, gap if samples == 1 else max(2 * gap, size)
    labels_R = [_labels(row, size) for row in sheet.rows]
    labels_w = max((text.width for texts in labels_R for text in texts), default=0)
    font = _Font(size, bold=False)
    words = [word for row in sheet.rows for head in row.heads for word in font.spelt(head).split()]
    longest = math.ceil(max(map(font.getlength, words), default=0))
    column_w = max(cell_w, min(longest, 10 * size))
    heads_R = [
        [_Text.of(head, column_w, _HEAD_LINES, size) for head in row.heads] for row in sheet.rows
    ]
    left = margin + (labels_w + size if labels_w else 0)
    lines = max((len(text.lines) for texts in heads_R for text in texts), default=0)
    pitch = column_w + max(apart, min(lines, 2) * size // 2)
    total_w = max(left + columns * pitch - (pitch - column_w) + margin, 50 * size)
    text_w = total_w - 2 * margin
    title = _Text.of(sheet.title, text_w, _TITLE_LINES, round(1.25 * size), bold=True)
    about = _Text.of(sheet.about, text_w, _ABOUT_LINES, size, colour=SOFT)

    tops, y = [], margin + title.height + about.height + round(0.75 * size)
    for row, labels, heads in zip(sheet.rows, labels_R, heads_R, strict=True):
        if tops:
            y += pitch - column_w + (size if row.apart or heads else 0)
        y += max((text.height + gap // 2 for text in heads), default=0)
        tops.append(y)
        y += max(cell_h, _height(labels))
    canvas = Image.new("RGB", (total_w, y + margin), "white")
    pen = ImageDraw.Draw(canvas)
    title.draw(pen, margin, margin)
    about.draw(pen, margin, margin + title.height)
    for row, labels, heads, top in zip(sheet.rows, labels_R, heads_R, tops, strict=True):
        y = top + max(0, cell_h - _height(labels)) // 2
        for text in labels:
            text.draw(pen, margin, y)
            y += text.height
        for i, text in enumerate(heads):  # They stand on their pictures.
            text.draw(pen, left + i * pitch, top - gap // 2 - text.height)
        for i, cell in enumerate(row.cells):
            for j, image in enumerate(cell):
                x = left + i * pitch + j % across * (w + gap)
                y = top + j // across * (h + gap)
                pen.rectangle((x - 1, y - 1, x + w, y + h), outline=GRID)
                large = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
                canvas.paste(Image.fromarray(large), (x, y))
    return canvas


def _labels(row: Row, size: int) -> list[_Text]:
    bold = len(row.labels) > 1
    return [
        _Text.of(text, 15 * size, _LABEL_LINES, size, bold and not i, SOFT if i else INK)
        for i, text in enumerate(row.labels)
    ]


def _height(texts: Sequence[_Text]) -> int:
    return sum(text.height for text in texts)
