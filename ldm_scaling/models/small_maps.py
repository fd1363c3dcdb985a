"""Convolutions of small maps, for feature networks on a CPU.

Not for networks that are compiled for another machine than this one: what is done is chosen by the
backend here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def _span(side: int, size: int, stride: int, padding: tuple[int, int], tap: int):
    """(where a tap meets the map, how many results it adds to, how many stand before and after)."""
    low, high = padding
    results = (side + low + high - size) // stride + 1
    first = max(0, -(-(low - tap) // stride))
    last = min(results - 1, (side - 1 + low - tap) // stride)
    start, end = tap - low + stride * first, tap - low + stride * last + 1
    return slice(start, end, stride), last - first + 1, (first, results - 1 - last)


def _tap_products(x_BHWC, kernel_HWIO, strides, padding, precision):
    """A convolution as one product for each tap, with those pixels that the tap meets."""
    batch, *sides, channels = x_BHWC.shape
    spans = [
        [_span(*axis, tap) for tap in range(axis[1])]
        for axis in zip(sides, kernel_HWIO.shape, strides, padding)
    ]
    parts = []
    for i, (rows, height, pad_h) in enumerate(spans[0]):
        for j, (columns, width, pad_w) in enumerate(spans[1]):
            if height > 0 and width > 0:
                pixels = x_BHWC[:, rows, columns].reshape(-1, channels)
                part = jnp.dot(pixels, kernel_HWIO[i, j], precision=precision)
                part_BHWC = part.reshape(batch, height, width, -1)
                parts.append(jnp.pad(part_BHWC, ((0, 0), pad_h, pad_w, (0, 0))))
    return functools.reduce(jnp.add, parts)


def _winograd(x_BHWC, kernel_HWIO, padding, precision):
    """A 3x3 convolution of stride 1 by F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308, section
    4.1): 16 products for each 2x2 results instead of 36, with the same float32 errors.
    """
    batch, *_, channels = x_BHWC.shape
    sides = [n + sum(pad) - 2 for n, pad in zip(x_BHWC.shape[1:3], padding)]
    (h, w), tiles = sides, [-(-n // 2) for n in sides]
    even = [(low, high + n % 2) for n, (low, high) in zip(sides, padding)]
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *even, (0, 0)))

    def of_kernel(a, b, c):  # G of the paper
        return a, (a + b + c) / 2, (a - b + c) / 2, c

    def of_map(x, axis):  # B^T
        tiles = (x.shape[axis] - 2) // 2
        a, b, c, d = (
            jax.lax.slice_in_dim(x, i, i + 2 * tiles - 1, 2, axis) for i in range(4)
        )
        return a - c, b + c, c - b, b - d

    def of_products(a, b, c, d):  # A^T
        return a + b + c, b - c - d

    kernel = [tap for row in of_kernel(*kernel_HWIO) for tap in of_kernel(*row[:])]
    pixels = [tile for row in of_map(x_BHWC, 1) for tile in of_map(row, 2)]
    products = jnp.matmul(
        jnp.stack(pixels).reshape(16, -1, channels), jnp.stack(kernel), precision=precision
    ).reshape(4, 4, batch, *tiles, -1)
    rows = of_products(*products)
    y = jnp.stack([jnp.stack(of_products(*row), 3) for row in rows], 2)
    return y.reshape(batch, 2 * tiles[0], 2 * tiles[1], -1)[:, :h, :w]


def convolve(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, *,
    precision: Any = None, **kw,
) -> jax.Array:  # fmt: skip
    """`jax.lax.conv_general_dilated` of NHWC maps, for `nn.Conv(conv_general_dilated=...)`.

    On a CPU XLA runs its convolutions of maps narrower than the kernel at about 1 GFLOP/s, 512
    channels at 2x2 150 times as slowly as products, and counts the taps on the padding in, half of
    all at 2x2 and a third at 4x4. There maps up to 4x4 go through plain products without those
    taps, a longer one that is narrow is padded first, and 3x3 kernels on somewhat larger maps of
    many channels take fewer products by Winograd's algorithm. Elsewhere nothing changes.

    Args: those of `jax.lax.conv_general_dilated`; padding as pairs below the kernel's size, neither
      groups nor dilation.
    """
    (height, width, channels), taps = lhs.shape[1:], rhs.shape[:2]
    if jax.default_backend() == "cpu":
        if height * width <= max(16, math.prod(taps)):
            return _tap_products(lhs, rhs, window_strides, padding, precision)
        if height < taps[0] or width < taps[1]:
            lhs = jax.lax.optimization_barrier(jnp.pad(lhs, ((0, 0), *padding, (0, 0))))
            padding = ((0, 0), (0, 0))
        # Larger maps would leave the caches four times as large as they are.
        elif taps == (3, 3) and tuple(window_strides) == (1, 1):
            if channels >= 64 and height * width <= (32 if channels >= 256 else 16) ** 2:
                return _winograd(lhs, rhs, padding, precision)
    return jax.lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, precision=precision, **kw
    )
