"""Thumbnails: the first pictures of a record, small enough to travel inside the report."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling.study.figures import beside

SIDE = 64
"""The most pixels of a side."""

_KINDS = {"png": {"optimize": True}, "webp": {"quality": 82, "method": 4}}


def encode(image_HWC: np.ndarray) -> str:
    """One uint8 picture as a data URI, no side above `SIDE`; PNG or WebP, whichever is smaller."""
    picture = Image.fromarray(image_HWC)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in _KINDS.items():
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda k: len(encoded[k]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def read(strips: Sequence[epath.PathLike], keys: Iterable[str]) -> dict[str, list[str]]:
    """Data URIs of the pictures that a sweep kept, by record key; records without any are left
    out.

    Args:
      strips: folders of strips, each a workdir's.
      keys: of records.
    """
    found = {key: beside.first_strip(strips, key) for key in keys}
    return {
        key: [encode(image) for image in images_NHWC]
        for key, images_NHWC in found.items() if images_NHWC is not None
    }


def thinned(found: Mapping[str, list[str]], most: int) -> dict[str, list[str]]:
    """The first few pictures of every record, as many as `most` bytes of JSON hold; the same number
    of each, so that all still show the same prompts. Empty where not even one fits."""
    for count in range(max(map(len, found.values()), default=0), 0, -1):
        some = {key: uris[:count] for key, uris in found.items()}
        if len(json.dumps(some).encode()) <= most:
            return some
    return {}
