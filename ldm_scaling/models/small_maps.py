"""Convolutions of maps that are smaller than their kernel, for feature networks on a CPU.

Not for networks that are compiled for another machine than this one: what is done is chosen by the
backend here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def _pixel_products(x_BHWC, kernel_HWIO, strides, padding, precision):
    """A convolution as one product for each pixel it gives, over the taps inside the map only."""
    batch, *sides, _ = x_BHWC.shape
    spans = []  # along each axis, for each pixel: where its taps begin and end in map and kernel
    for side, size, stride, (low, high) in zip(sides, kernel_HWIO.shape, strides, padding):
        starts = range(-low, side + high - size + 1, stride)
        ends = [(max(s, 0), min(s + size, side), s) for s in starts]
        spans.append([(slice(a, b), slice(a - s, b - s)) for a, b, s in ends])
    pixels = [
        jnp.dot(
            x_BHWC[:, rows, columns].reshape(batch, -1),
            kernel_HWIO[taps_h, taps_w].reshape(-1, kernel_HWIO.shape[-1]),
            precision=precision,
        )
        for rows, taps_h in spans[0]
        for columns, taps_w in spans[1]
    ]
    return jnp.stack(pixels, 1).reshape(batch, *map(len, spans), kernel_HWIO.shape[-1])


def convolve(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, *,
    precision: Any = None, **kw,
) -> jax.Array:  # fmt: skip
    """`jax.lax.conv_general_dilated` of NHWC maps, for `nn.Conv(conv_general_dilated=...)`.

    XLA:CPU runs its convolutions of maps narrower than the kernel at about 1 GFLOP/s, 512 channels
    at 2x2 150 times as slowly as products. There a small map goes through plain products, whose
    FLOPs are the same (taps on the padding are in neither count), and a long one is padded first.

    Args: those of `jax.lax.conv_general_dilated`; padding as pairs below the kernel's size, neither
      groups nor dilation.
    """
    (height, width), taps = lhs.shape[1:3], rhs.shape[:2]
    if (height < taps[0] or width < taps[1]) and jax.default_backend() == "cpu":
        if height * width <= math.prod(taps):
            return _pixel_products(lhs, rhs, window_strides, padding, precision)
        lhs = jax.lax.optimization_barrier(jnp.pad(lhs, ((0, 0), *padding, (0, 0))))
        padding = ((0, 0), (0, 0))
    return jax.lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, precision=precision, **kw
    )
