"""Captions and scores as they are found, in any encoding and type: read, or refused with why."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm_scaling.data.collection import CAPTION_COLUMNS, SCORES
from ldm_scaling.data.sources.options import Options

# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_RAW = "raw"  # of the objects that Karpathy's splits of COCO and Flickr have for captions


class Unusable(ValueError):
    """Why one pair cannot be used, in one line; it becomes the pair's `error`."""

    def __init__(self, why: str):
        super().__init__(one_line(why))


def one_line(text: str) -> str:
    """A message that any file can hold: names may have line breaks and bytes that are no UTF-8."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return " ".join(text.splitlines())


def encoding_of(start: bytes, options: Options) -> str:
    """The encoding that a byte order mark names, else `caption_encoding`; never a guess."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), options.caption_encoding)


def decode(data: bytes, where: str, options: Options) -> str:
    """Bytes as text. Raises `Unusable` when they are not in their encoding."""
    encoding = encoding_of(data[:4], options)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        raise Unusable(_not_in(encoding, where, f"byte {e.start}: {e.reason}")) from e


def lines(text: str) -> list[str]:
    """The lines of a text file from any system; other separators of Unicode belong to the text."""
    return re.split(r"\r\n|\r|\n", text)


def parse(data: bytes, where: str, options: Options) -> dict[str, Any]:
    """The object in a JSON file. Raises `Unusable` for anything else."""
    try:
        value = json.loads(decode(data, where, options))
    except Unusable:
        raise
    except (ValueError, RecursionError) as e:
        raise Unusable(f"{where} is no JSON ({e})") from e
    if not isinstance(value, dict):
        raise Unusable(f"{where} holds no JSON object with a caption in it")
    return value


def columns_of(names: Iterable[str], options: Options) -> tuple[str, ...]:
    """Those of a table's columns that hold captions."""
    names = set(names)
    if options.caption_columns:
        return tuple(column for column in options.caption_columns if column in names)
    return next(((column,) for column in CAPTION_COLUMNS if column in names), ())


def captions_of(value: Any, where: str, options: Options) -> tuple[str, ...]:
    """The captions in a value: a text, bytes, a list of them, an object that holds one of these
    in the columns that are named, else in one of the usual names.

    None and NaN, pandas' word for it, are no captions. Raises `Unusable` for other types and for
    text that is not Unicode.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, bytes):
        value = decode(value, where, options)
    if isinstance(value, str):
        _check(value, where, options)
        text = value.strip()
        return (text,) if text else ()
    if isinstance(value, Mapping):
        usual = ((column,) for column in (*CAPTION_COLUMNS, _RAW) if column in value)
        columns = columns_of(value, options) or next(usual, ())
        if not columns:
            raise Unusable(f"{where}: its caption is an object of {', '.join(map(str, value))}")
        value = [value[column] for column in columns]
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise Unusable(f"{where}: its caption is no text but {_short(value)}")
    return tuple(text for item in value for text in captions_of(item, where, options))


def row_captions(row: Mapping[str, Any], where: str, options: Options) -> tuple[str, ...]:
    """The captions in an object's columns that are not null. Raises `Unusable` as above."""
    filled = [column for column, value in row.items() if value is not None]
    return captions_of([row[c] for c in columns_of(filled, options)], where, options)


def row_scores(row: Mapping[str, Any], where: str, options: Options) -> dict[str, float]:
    """The scores in an object; those that are null, empty or NaN are left out.

    Raises `Unusable` for what is no finite number.
    """
    scores = {}
    for name in SCORES:
        for column in options.names_of(name):
            value = row.get(column)
            if value is None or value == "":
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.inf
            if math.isinf(number):
                raise Unusable(f"{where}: its {column} is no number but {_short(value)}")
            if not math.isnan(number):
                scores[name] = number
                break
    return scores


def _check(text: str, where: str, options: Options) -> None:
    if "\0" in text:
        raise Unusable(_not_in(options.caption_encoding, where, "it holds zero bytes"))
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as e:
        if "\udc80" <= text[e.start] <= "\udcff":  # what `surrogateescape` makes of a stray byte
            raise Unusable(_not_in(options.caption_encoding, where, f"character {e.start}")) from e
        raise Unusable(f"{where}: its caption holds half of a surrogate pair") from e


def _not_in(encoding: str, where: str, why: str) -> str:
    return (
        f"{where} is not in {encoding} ({why}): name its encoding by "
        "data.prepare.caption_encoding (latin-1, cp1252, utf-16-le, ...)"
    )


def _short(value: Any) -> str:
    # Python refuses to print integers of more than 4,300 digits.
    big = isinstance(value, int) and value.bit_length() > 256
    text = "a number of hundreds of digits" if big else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
