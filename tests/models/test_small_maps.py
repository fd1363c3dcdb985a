"""Convolutions of small maps against sums in float64 and XLA's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.models import small_maps


@pytest.mark.parametrize(
    "height,width,size,stride,pad",
    [(1, 1, 3, 1, 1), (2, 2, 3, 1, 1), (2, 2, 3, 2, 1), (2, 3, 3, 1, 1), (1, 12, 3, 1, 1),
     (7, 2, 3, 2, 1), (4, 4, 5, 1, 2), (3, 3, 3, 1, 1)],
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
    np.testing.assert_allclose(small_maps.convolve(x, kernel, **how), want, rtol=1e-4, atol=1e-4)

    def gradients(convolve):
        return jax.grad(lambda *a: jnp.sum(convolve(*a, **how) ** 2), (0, 1))(x, kernel)

    theirs_too = gradients(jax.lax.conv_general_dilated)
    for ours, theirs in zip(gradients(small_maps.convolve), theirs_too):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    def flops(convolve):
        lowered = jax.jit(lambda *a: convolve(*a, **how)).lower(x, kernel)
        return lowered.cost_analysis()["flops"]

    if height * width <= size**2:
        assert flops(small_maps.convolve) == flops(jax.lax.conv_general_dilated)
