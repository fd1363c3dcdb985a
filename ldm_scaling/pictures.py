"""Pictures as arrays: conversion, tiling, PNG. uint8 (N, H, W, 3) outside, [-1, 1] inside."""

from __future__ import annotations

import io
import math

import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling import files


def to_uint8(x_BHWC, xp=np):
    """[-1, 1] to 0..255, rounded; what lies outside is clipped.

    Args:
      x_BHWC: pictures, an array of `xp`.
      xp: numpy, or jax.numpy for what stays on its device.
    """
    x = xp.asarray(x_BHWC, np.float32)
    return xp.clip(xp.rint((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(x_BHWC) -> np.ndarray:
    """0..255 to [-1, 1], float32."""
    return np.asarray(x_BHWC, np.float32) / 127.5 - 1.0


def tile(images_NHWC: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """One picture of many, row by row on white, about square unless `columns` says otherwise."""
    n, h, w, c = images_NHWC.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images_NHWC):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        out[y : y + h, x : x + w] = image
    return out


def save_png(path: epath.PathLike, image_HWC: np.ndarray) -> None:
    """Writes a uint8 picture as PNG by atomic rename."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="png")
    files.atomic_write_bytes(path, buffer.getvalue())


def load_png(path: epath.PathLike) -> np.ndarray:
    """Reads a picture as uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(epath.Path(path).read_bytes())) as image:
        return np.asarray(image.convert("RGB"))
