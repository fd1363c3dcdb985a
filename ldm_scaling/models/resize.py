"""The resizers of the Fréchet distance's three conventions: one picture, three sets of pixels.

They differ by several points of FID on the same pictures (arXiv 2104.11222), so a score names its
resizer. None of them rounds to whole numbers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_scaling.errors import UserError


class Taps(NamedTuple):
    """For each output pixel of an axis its two source pixels and the second's weight."""

    low: np.ndarray
    high: np.ndarray
    part: np.ndarray


def _taps(source: np.ndarray, n: int) -> Taps:
    low = source.astype(np.int32)
    return Taps(low, np.minimum(low + 1, n - 1), source - low.astype(np.float32))


def _tf1_taps(n: int, side: int) -> Taps:
    """Output i reads i * n / side: TensorFlow 1's resize_bilinear, align_corners=False."""
    return _taps(np.arange(side, dtype=np.float32) * np.float32(n / side), n)


def _torch_taps(n: int, side: int) -> Taps:
    """Pixel centres are mapped on each other: torch's interpolate, antialias=False."""
    scale = np.float64(np.float32(n) / np.float32(side))
    source = scale * (np.arange(side) + 0.5) - 0.5  # torch's fused multiply-add rounds once
    return _taps(np.maximum(source, 0).astype(np.float32), n)


def _bilinear_by(xp: Any, images_BHWC, side: int, taps: Callable[[int, int], Taps]):
    """By numpy or jax.numpy."""

    def along(x_BHWC, axis):
        low, high, part = taps(x_BHWC.shape[axis], side)
        low_BHWC = xp.take(x_BHWC, low, axis).astype(np.float32)
        high_BHWC = xp.take(x_BHWC, high, axis).astype(np.float32)
        return low_BHWC + (high_BHWC - low_BHWC) * np.expand_dims(part, tuple(range(1, 4 - axis)))

    return along(along(images_BHWC, 1), 2)


@functools.partial(jax.jit, static_argnames=("side", "taps"))
def _bilinear(images_BHWC: jax.Array, side: int, taps: Callable[[int, int], Taps]) -> jax.Array:
    return _bilinear_by(jnp, images_BHWC, side, taps)


def _one_bilinear(
    image_HWC: np.ndarray, side: int, taps: Callable[[int, int], Taps]
) -> np.ndarray:
    return _bilinear_by(np, image_HWC[None], side, taps)[0]


def _pillow_bicubic(image_HWC: np.ndarray, side: int) -> np.ndarray:
    planes = [Image.fromarray(image_HWC[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in planes]
    return np.stack(resized, axis=-1).clip(0, 255)


def _each(one: Callable[..., np.ndarray], images: Sequence[np.ndarray], side: int) -> np.ndarray:
    if not len(images):
        return np.zeros((0, side, side, 3), np.float32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # they let go of the interpreter's lock
        return np.stack(list(pool.map(lambda x: one(np.asarray(x), side=side), images)))


class Resizer(NamedTuple):
    """A way to resize: `on_host` ones take and give numpy arrays, others run where the input is;
    `one` does it with one picture, on the host.
    """

    function: Callable[..., np.ndarray | jax.Array]
    one: Callable[..., np.ndarray]
    on_host: bool
    text: str


RESIZERS = {
    "tf1_bilinear": Resizer(
        functools.partial(_bilinear, taps=_tf1_taps),
        functools.partial(_one_bilinear, taps=_tf1_taps), False,
        "bilinear as TensorFlow 1 (source = i * in / out, no half-pixel centres, no antialiasing)",
    ),
    "torch_bilinear": Resizer(
        functools.partial(_bilinear, taps=_torch_taps),
        functools.partial(_one_bilinear, taps=_torch_taps), False,
        "bilinear as torch (half-pixel centres, no antialiasing)",
    ),
    "clean_fid": Resizer(
        functools.partial(_each, _pillow_bicubic), _pillow_bicubic, True,
        "Pillow's bicubic on float channels (antialiased, clipped to 0..255, unrounded)",
    ),
}  # fmt: skip


def resize(
    images_BHWC: np.ndarray | jax.Array, name: str, side: int = 299
) -> np.ndarray | jax.Array:
    """Pictures [B, H, W, 3] in 0..255, uint8 or float, to [B, side, side, 3] float32 in 0..255.

    Args:
      name: "tf1_bilinear" (the graph of 2015-12-05; torch-fidelity's
        `interpolate_bilinear_2d_like_tensorflow1x`), "torch_bilinear" (pytorch-fid's
        `F.interpolate`) or "clean_fid" (clean-fid's `make_resizer("PIL", False, "bicubic")`, the
        only one that does not alias when it shrinks).

    The bilinear ones compile once for each picture size and keep a sharding of the batch.
    Raises `UserError` on another name or other shapes.
    """
    _check_name(name)
    if images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3 or 0 in images_BHWC.shape[1:]:
        raise UserError(f"resizers take pictures [B, H, W, 3], not {tuple(images_BHWC.shape)}")
    return RESIZERS[name].function(images_BHWC, side=side)


def resize_each(images: Sequence[np.ndarray], name: str, side: int = 299) -> np.ndarray:
    """`resize` of pictures [H, W, 3] that may differ in size, on the host and without compiling, to
    [B, side, side, 3]; equal to it but for the last digit.

    Raises `UserError` on another name.
    """
    _check_name(name)
    return _each(RESIZERS[name].one, images, side)


def _check_name(name: str) -> None:
    if name not in RESIZERS:
        raise UserError(f"there are the resizers {', '.join(RESIZERS)}, not {name!r}")
