"""Sheets of pictures with a text under each, for the report of a preparation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from ldm_scaling import pictures

_CELL, _GAP, _LINES = 176, 12, 4  # pixels of a picture's square and around it; lines of text
_TEXT, _TITLE = 12, 18  # pixels of the letters
_LINE = 15
_INK, _SOFT, _GROUND = "#1a1a1a", "#d9d9d9", "#ffffff"


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture of any size, uint8 [H, W, 3], and the text under it."""

    image_HWC: np.ndarray
    label: str


def draw(
    path: epath.PathLike, title: str, groups: Sequence[Sequence[Picture]], columns: int
) -> None:
    """Writes a sheet as PNG by atomic rename.

    Args:
      path: of the file.
      title: over everything.
      groups: pictures that stand side by side in a frame; all of as many.
      columns: groups in a row.
    """
    each = len(groups[0])
    columns = min(columns, len(groups))
    rows = math.ceil(len(groups) / columns)
    wide = each * (_CELL + _GAP) + _GAP
    tall = _CELL + _LINES * _LINE + 2 * _GAP
    top = _TITLE + 3 * _GAP
    size = (columns * wide + _GAP, top + rows * tall + _GAP)
    lines = _broken(title, _font(_TITLE), size[0] - 2 * _GAP, 2)
    sheet = Image.new("RGB", (size[0], size[1] + (len(lines) - 1) * _TITLE), _GROUND)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        pen.text((_GAP, _GAP + i * (_TITLE + 2)), line, _INK, _font(_TITLE))
    top += (len(lines) - 1) * _TITLE
    for number, group in enumerate(groups):
        x0, y0 = _GAP + number % columns * wide, top + number // columns * tall
        if each > 1:
            pen.rectangle((x0, y0, x0 + wide - _GAP, y0 + tall - _GAP), outline=_SOFT)
        for i, picture in enumerate(group):
            x, y = x0 + _GAP // 2 + i * (_CELL + _GAP), y0 + _GAP // 2
            small = _small(picture.image_HWC)
            sheet.paste(small, (x + (_CELL - small.width) // 2, y + _CELL - small.height))
            text = _broken(picture.label, _font(_TEXT), _CELL, _LINES)
            for row, line in enumerate(text):
                pen.text((x, y + _CELL + 3 + row * _LINE), line, _INK, _font(_TEXT))
    pictures.save_png(path, np.asarray(sheet))


def _small(image_HWC: np.ndarray) -> Image.Image:
    """Within a cell; a picture that is much smaller is shown in large pixels."""
    image = Image.fromarray(image_HWC)
    scale = _CELL / max(image.size)
    if scale >= 2:
        scale = int(scale)
    size = [max(1, round(side * scale)) for side in image.size]
    kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize(size, kind)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # here, for the sake of workers that draw no sheet

    # The plots' own font: it comes with matplotlib, and knows Greek and Cyrillic.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _broken(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines within `width`, broken at spaces or within long words; a cut text ends in ..."""
    lines = [""]
    for word in text[:1000].split():
        whole = f"{lines[-1]} {word}".strip()
        if font.getlength(whole) <= width:
            lines[-1] = whole
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last}…"]
