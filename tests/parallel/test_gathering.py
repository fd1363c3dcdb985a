"""Weights gathered by hand: gradients are those of one device, in every type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.parallel import gathering, rules
from ldm_scaling.parallel import mesh as mesh_lib


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_gradients_in_bfloat16(sizes):
    """Small whole numbers, of which every sum is exact. XLA:CPU aborts the process where it is
    given a sum in bfloat16 with axes left to it."""
    shapes = {"layer": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((8, 4), (4, 8)))

    def make(gather, apart):
        product = gather.at("layer")(jax.lax.dot) if gather else jax.lax.dot

        def denoise(params, x, t_B, cond):
            kernel = params["layer"]["kernel"].astype(jnp.bfloat16)
            return product(x.astype(jnp.bfloat16), kernel).astype(jnp.float32)

        return denoise

    mesh = mesh_lib.make(*sizes, devices=jax.devices()[:4])
    denoise = gathering.spread(make, shapes, mesh)
    shardings = rules.shardings(shapes, mesh)
    slope = jax.jit(
        jax.grad(lambda params, *rest: denoise(params, *rest).sum()), out_shardings=shardings
    )
    got = slope(jax.device_put({"layer": {"kernel": w}}, shardings), x, np.zeros(8), {})
    np.testing.assert_array_equal(got["layer"]["kernel"], np.tile(x.sum(0)[:, None], 8))
