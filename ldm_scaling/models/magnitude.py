"""Layers that keep the magnitude of what goes through them (Karras et al. 2024, arXiv 2312.02696).

The magnitude of an array is the root mean square of its elements. Equations are that paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_scaling.models import blocks

Dtype = Any
_EPSILON = 1e-4
_SILU_MAGNITUDE = 0.596  # of the SiLU of normal numbers
# The paper draws weights of magnitude 1. Drawn over the root of what they sum over they are used as
# the same, and are of the size of other networks' weights; for their steps see `edm2.rates`.
_DRAWN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _root_mean(square: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(square, 1e-12))  # which has a slope at 0 too


def normalise(x: jax.Array) -> jax.Array:
    """Each pixel's or token's channels at magnitude 1, taken in float32."""
    y = x.astype(jnp.float32)
    magnitude = _root_mean(jnp.mean(y * y, axis=-1, keepdims=True))
    return (y / (_EPSILON + magnitude)).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """SiLU of unit magnitude (eq. 81)."""
    return blocks.silu(x) / _SILU_MAGNITUDE


def mix(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """The sum of (1 - t) a and t b, at the magnitude that they have (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def join(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """Channels of a, then of b, which weigh as 1 - t to t whatever their numbers (eq. 103)."""
    m, n = a.shape[-1], b.shape[-1]
    scale = math.sqrt((m + n) / ((1 - t) ** 2 + t**2))
    a, b = a * ((1 - t) * scale / math.sqrt(m)), b * (t * scale / math.sqrt(n))
    return jnp.concatenate([a, b], axis=-1)


def unit(kernel: jax.Array) -> jax.Array:
    """A kernel (..., in, out) at unit norm over all but out, taken in float32."""
    w = kernel.astype(jnp.float32)
    square = jnp.sum(w * w, axis=tuple(range(w.ndim - 1)), keepdims=True)
    return (w / (_EPSILON + _root_mean(square))).astype(kernel.dtype)


def of_unit_norm(product: Callable) -> Callable:
    """A product with kernels (..., in, out), brought to unit norm (eq. 47)."""
    return lambda x, kernel, *args, **kw: product(x, unit(kernel), *args, **kw)


def _kernel(product: Callable, gather: Callable | None, name: str) -> tuple[Callable, dict]:
    product = of_unit_norm(product)
    if gather is not None:
        product = gather.at(name)(product)
    return product, {"sharded": gather is not None, "use_bias": False, "kernel_init": _DRAWN}


def dense(features: int, dtype: Dtype, name: str, gather: Callable | None = None) -> nn.Dense:
    """A linear layer over the last axis, without biases. See `blocks.dense`."""
    product, kw = _kernel(jax.lax.dot_general, gather, name)
    return blocks.Dense(features, dtype=dtype, name=name, dot_general=product, **kw)


def conv(
    features: int, size: int, dtype: Dtype, name: str, gather: Callable | None = None
) -> nn.Conv:
    """A square convolution at stride 1, without biases. See `blocks.conv`."""
    product, kw = _kernel(jax.lax.conv_general_dilated, gather, name)
    return blocks.conv(features, size, dtype, name, conv_general_dilated=product, **kw)


def downsample(x_BHWC: jax.Array) -> jax.Array:
    """Means of squares of 2 x 2."""
    b, h, w, c = x_BHWC.shape
    return jnp.mean(x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))
