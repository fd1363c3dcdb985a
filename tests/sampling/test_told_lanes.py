"""Lanes of a network that is told its guidance rate: one call a row, each lane its own rate."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.diffusion import schedule
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import packing, sampler, solvers
from ldm_scaling.sampling.lanes import Lanes
from ldm_scaling.sampling.packing import Configuration

SD = schedule.get("sd")
SHAPE = (2, 2, 3)
CONTEXT = np.random.default_rng(0).standard_normal((9, 3)).astype("f4")
KEY = jax.random.key(3)


def denoise(params, x_BHWC, t_B, cond):
    w_B111 = cond["guidance"][:, None, None, None]
    return jnp.tanh(x_BHWC @ params + w_B111 * cond["context"][:, None, None] / 4)


PARAMS = jax.random.normal(jax.random.key(0), (3, 3)) / 2


def configurations():
    out = []
    for k, (name, steps, rate) in enumerate(
        [("lcm", 4, 7.5), ("codi", 2, 1.0), ("lcm", 1, 1.0), ("ddim", 6, 3.0),
         ("ddim:rescale=0.7", 3, 2.0)]
    ):
        own = name in ("lcm", "codi")
        table = solvers.make(name, SD, steps, "v", None if own else "trailing")
        out.append(Configuration(table, rate, k + np.arange(5)))
    return out


def lanes(devices=1):
    mesh = mesh_lib.make(devices=jax.devices()[:devices])
    return Lanes(denoise, SHAPE, 4, mesh, max_rows=5, told=True)


def drawn(devices, some):
    out = [np.full((5, *SHAPE), np.nan, "f4") for _ in some]
    rows = lanes(devices).run(
        PARAMS, some, lambda prompt_M: {"context": CONTEXT[prompt_M % 9]}, None, KEY
    )
    for finished in rows:
        assert not finished.guided
        for i, j, z in zip(finished.configuration, finished.position, finished.latents_JHWC):
            out[i][j] = z
    return out


def test_each_sample_is_the_plain_samplers_with_its_rate():
    """No empty prompt is needed, and no second evaluation."""
    some, plain = configurations(), sampler.make_sampler(denoise, SHAPE)
    for devices in (1, 2):
        for c, got in zip(some, drawn(devices, some)):
            cond = {"context": CONTEXT[c.prompt_N % 9], "guidance": np.full(5, c.guidance, "f4")}
            want = plain(PARAMS, c.table.padded(6), None, cond, None, KEY, c.index_N)
            np.testing.assert_allclose(got, want, atol=2e-6)


def test_all_rates_share_a_program():
    some = configurations()
    assert [guided for guided, _ in packing.split(some, told=True)] == [False]
    assert len(lanes().plans(some)) == 1 and len(packing.split(some)) == 3


def test_rows_that_take_no_guidance_are_told_none():
    table = solvers.make("ddim", SD, 4, "v", "trailing").with_guidance(np.zeros(4))
    off, one = drawn(1, [Configuration(table, 9.0, np.arange(5)),
                         Configuration(table, 1.0, np.arange(5))])
    np.testing.assert_array_equal(off, one)
