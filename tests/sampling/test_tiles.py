"""Tiles cover a canvas, leave alone what is local, and show no seams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import unet
from ldm_scaling.sampling import sampler, solvers, tiles
from ldm_scaling.sampling.tiles import Tiles

CANVAS = Tiles((13, 22), (8, 8), 3)


def _normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("canvas, overlap", [
    ((8, 8), 3), ((9, 8), 3), ((13, 22), 3), ((100, 31), 0), ((64, 64), 7),
])  # fmt: skip
def test_tiles_cover_the_canvas_and_overlap(canvas, overlap):
    made = Tiles(canvas, (8, 8), overlap)
    seen = np.zeros(canvas, int)
    for place in made.slices():
        assert seen[place].shape == (8, 8)
        seen[place] += 1
    assert seen.min() >= 1 and made.total().min() > 0
    for axis in (0, 1):
        starts = np.unique(made.corners[:, axis])
        assert (np.diff(starts) <= 8 - overlap).all() and starts[-1] + 8 == canvas[axis]
        if len(starts) > 1:  # No more tiles than it takes.
            assert 8 + (len(starts) - 2) * (8 - overlap) < canvas[axis]


def test_weights_are_gaussian():
    """Standard deviation a tenth of the side, as Mixture of Diffusers and StableSR have it."""
    weights_HW = CANVAS.weights()[..., 0].astype(float)
    x = (np.arange(8) - 3.5) / 8
    wanted = np.exp(-(x[:, None] ** 2 + x**2) / 0.02)
    np.testing.assert_allclose(weights_HW, wanted, rtol=1e-6)


def _pointwise(params, x_BHWC, t_B, cond):
    """Of a pixel's own value, its condition, the time and the context."""
    told = cond["context"].sum((1, 2))[:, None, None, None] + t_B[:, None, None, None]
    return jnp.sin(params * x_BHWC + cond["condition"][..., :2] + told)


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_a_pointwise_network_is_left_as_it_is(batch):
    x = _normal((2, 13, 22, 2))
    cond = {"condition": _normal((2, 13, 22, 3), 1), "context": _normal((2, 4, 5), 2)}
    t_B = np.array([0.3, 0.9], np.float32)
    run = jax.jit(tiles.tiled(_pointwise, CANVAS, batch))
    np.testing.assert_allclose(
        run(0.7, x, t_B, cond), _pointwise(0.7, x, t_B, cond), atol=1e-6
    )


def test_the_network_never_sees_more_than_a_batch():
    sizes = []

    def denoise(params, x_BHWC, t_B, cond):
        assert x_BHWC.shape[1:3] == cond["condition"].shape[1:3] == (8, 8)
        assert len(x_BHWC) == len(t_B) == len(cond["context"])
        sizes.append(len(x_BHWC))
        return x_BHWC

    cond = {"condition": np.zeros((2, 13, 22, 3)), "context": np.zeros((2, 4, 5))}
    run = jax.jit(tiles.tiled(denoise, CANVAS, 3))
    run(None, np.zeros((2, 13, 22, 2), np.float32), np.zeros(2), cond)
    assert sizes == [3]  # One program for all groups.


def test_constants_stay_and_means_are_weighted():
    constant = tiles.tiled(lambda p, x, t, c: jnp.full_like(x, 3.0), CANVAS, 4)
    out = constant(None, np.zeros((1, 13, 22, 2), np.float32), np.zeros(1), {})
    np.testing.assert_allclose(out, 3.0, rtol=1e-6)
    # A network that says which tile it sees: between two of them the weights decide.
    two = Tiles((8, 13), (8, 8), 3)
    names = tiles.tiled(lambda p, x, t, c: jnp.zeros_like(x) + x[:, :1, :1], two, 2)
    x = np.zeros((1, 8, 13, 1), np.float32)
    x[0, 0, 5] = 1.0  # The second's corner.
    out = np.asarray(names(None, x, np.zeros(1), {}))[0, 3, :, 0]
    first, second = (np.exp(-((np.arange(13) - s - 3.5) / 8) ** 2 / 0.02) for s in (0, 5))
    np.testing.assert_allclose(out[5:8], (second / (first + second))[5:8], rtol=1e-5)
    assert (out[:5] == 0).all() and (out[8:] == 1).all()


SPEC = unet.UNetSpec(
    base_channels=8, channel_mults=(1,), attention_levels=(True,), blocks_per_level=1,
    heads=2, groups=4, context_dim=8, in_channels=4, out_channels=2, sample_size=16,
    context_length=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """A small U-Net with random weights, the last layer's too."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key == "scale":
            return np.ones(shape.shape, np.float32)
        fan = max(np.prod(shape.shape[:-1]), 1) if len(shape.shape) > 1 else 100
        return (rng.normal(size=shape.shape) / fan**0.5).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, unet.param_shapes(SPEC))
    return unet.denoise_fn(SPEC), params


def _smooth(height, width):
    y, x = np.mgrid[:height, :width] / 16
    return np.stack([np.sin(3 * x + y), np.cos(2 * y - x)], axis=-1)[None].astype(np.float32)


def _cond(height, width):
    return {"condition": _smooth(height, width), "context": _normal((1, 3, 8), 3)}


def _sampled(denoise, params, height, width):
    table = solvers.make("ddim", schedule_lib.get("sd"), 4, "v").padded()
    sample = sampler.make_sampler(denoise, (height, width, 2))
    key, index_B = jax.random.key(5), jnp.arange(1)
    return np.asarray(sample(params, table, None, _cond(height, width), None, key, index_B))


def test_one_tile_is_the_plain_network(network):
    denoise, params = network
    alone = tiles.tiled(denoise, Tiles((16, 16), (16, 16), 4), 8)
    assert alone is denoise
    assert _sampled(alone, params, 16, 16).shape == (1, 16, 16, 2)


def _seams(x_HWC, places):
    """Mean squared step across the borders at `places`, less that elsewhere, over the standard
    error of the two: what noise makes is a few, at most."""
    steps = [np.diff(x_HWC, axis=0), np.diff(x_HWC, axis=1).swapaxes(0, 1)]
    energy_N = np.concatenate([np.square(d).mean((1, 2)) for d in steps])
    at = np.concatenate([places - 1, places - 1 + len(steps[0])])
    across, rest = energy_N[at], np.delete(energy_N, at)
    error = np.hypot(across.std() / len(across) ** 0.5, rest.std() / len(rest) ** 0.5)
    return (across.mean() - rest.mean()) / error, across.mean() / rest.mean()


def test_there_are_no_seams(network):
    """Of a picture that four steps of the sampler make of noise, and of one call of the network on
    a smooth canvas; there, tiles without overlap have seams that are seen at once."""
    denoise, params = network
    made, apart = (Tiles((64, 64), (16, 16), overlap) for overlap in (8, 0))
    borders = np.setdiff1d(np.union1d(made.corners[:, 1], made.corners[:, 1] + 16), (0, 64))
    picture_HWC = _sampled(tiles.tiled(denoise, made, 8), params, 64, 64)[0]
    assert _seams(picture_HWC, borders)[0] < 3

    def once(which):
        run = jax.jit(tiles.tiled(denoise, which, 8))
        return np.asarray(run(params, _smooth(64, 64), np.full(1, 0.5, np.float32), _cond(64, 64)))

    sigmas, ratio = _seams(once(made)[0], borders)
    assert sigmas < 3 and ratio < 1.5
    sigmas, ratio = _seams(once(apart)[0], np.array([16, 32, 48]))
    assert sigmas > 3 and ratio > 3


def test_a_function_of_tiles_on_the_host():
    x = np.random.default_rng(0).random((26, 44, 3)).astype(np.float32)
    sizes, done = [], []

    def doubled(tiles_BHWC):  # (B, 16, 16, 3) to (B, 32, 32, 3)
        sizes.append(len(tiles_BHWC))
        return tiles_BHWC.repeat(2, axis=1).repeat(2, axis=2) ** 2

    out = tiles.blended(doubled, x, CANVAS, 4, inner=2, outer=4, on_tiles=done.append)
    np.testing.assert_allclose(out, x.repeat(2, axis=0).repeat(2, axis=1) ** 2, atol=1e-6)
    assert set(sizes) == {4} and sum(done) == len(CANVAS)
    one = tiles.blended(doubled, x[:16, :16], Tiles((8, 8), (8, 8), 3), 1, inner=2, outer=4)
    np.testing.assert_array_equal(one, doubled(x[None, :16, :16])[0])


def test_what_cannot_be_tiled():
    with pytest.raises(UserError, match="a canvas of 7x22 is smaller than a tile of 8x8"):
        Tiles((7, 22), (8, 8), 3)
    with pytest.raises(UserError, match="tiles of 8 cannot overlap by 8: give 0 to 7"):
        Tiles((9, 22), (8, 8), 8)
    assert len(Tiles((5, 30), (5, 8), 6)) == 12  # A side that is one tile needs no overlap.
