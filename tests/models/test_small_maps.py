"""Convolutions of small maps against sums in float64 and XLA's own gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.models import small_maps


@pytest.mark.parametrize(
    "height,width,size,stride,pad",
    [(1, 1, 3, 1, 1), (2, 2, 3, 1, 1), (2, 2, 3, 2, 1), (2, 3, 3, 1, 1), (1, 12, 3, 1, 1),
     (1, 20, 3, 1, 1), (7, 2, 3, 2, 1), (4, 4, 5, 1, 2), (3, 3, 3, 1, 1), (2, 7, 3, 2, 1),
     (4, 4, 3, 3, 1), (4, 4, 3, 1, 0)],
)  # fmt: skip
def test_convolutions_of_small_maps(height, width, size, stride, pad):
    # float64 sums over every pixel and tap, and the same gradients as XLA's own convolution.
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, height, width, 5)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 5, 7)).astype(np.float32)
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    want = np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)
    how = {
        "window_strides": (stride, stride), "padding": ((pad, pad), (pad, pad)),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }  # fmt: skip
    ours = jax.jit(lambda *a: small_maps.convolve(*a, **how))(x, kernel)
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)

    def gradients(convolve):
        return jax.jit(jax.grad(lambda *a: jnp.sum(convolve(*a, **how) ** 2), (0, 1)))(x, kernel)

    theirs_too = gradients(jax.lax.conv_general_dilated)
    for ours, theirs in zip(gradients(small_maps.convolve), theirs_too):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    if height * width <= 16:  # XLA does not count taps on the padding either
        flops = jax.jit(lambda *a: jax.lax.conv_general_dilated(*a, **how)).lower(x, kernel)
        steps = jax.make_jaxpr(lambda *a: small_maps.convolve(*a, **how))(x, kernel).eqns
        products = [e for e in steps if e.primitive.name == "dot_general"]
        sizes = [(*(v.aval.shape[0] for v in e.invars), 7) for e in products]
        assert sum(2 * math.prod(size) for size in sizes) == flops.cost_analysis()["flops"]


@pytest.mark.parametrize("height,width,pad", [(5, 5, 1), (8, 6, 1), (9, 16, 0), (7, 12, 2)])
def test_many_channels_take_fewer_products(height, width, pad):
    # 16 products for four results instead of 36, about as exact as XLA's own convolution.
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, height, width, 64)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 64, 96)).astype(np.float32)
    how = {
        "window_strides": (1, 1), "padding": ((pad, pad), (pad, pad)), "precision": "highest",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }  # fmt: skip
    with jax.enable_x64(True):
        wide = (jnp.asarray(a, jnp.float64) for a in (x, kernel))
        want = np.asarray(jax.lax.conv_general_dilated(*wide, **how))
    program = jax.jit(lambda *a: small_maps.convolve(*a, **how)).lower(x, kernel)
    found = program.compile()(x, kernel)
    assert found.shape == want.shape and found.dtype == jnp.float32
    plain = jax.lax.conv_general_dilated(x, kernel, **how)
    error, usual = (np.sqrt(np.mean((a - want) ** 2)) for a in (found, plain))
    assert error < 2 * usual and error < 1e-6 * want.std()
    text = program.as_text()
    assert "convolution" not in text and text.count("dot_general") == 1

    def gradients(convolve):
        return jax.jit(jax.grad(lambda *a: jnp.sum(convolve(*a, **how) ** 2), (0, 1)))(x, kernel)

    theirs_too = gradients(jax.lax.conv_general_dilated)
    for ours, theirs in zip(gradients(small_maps.convolve), theirs_too):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
