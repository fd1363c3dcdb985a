"""A network that is told its guidance rate: diffusers' time_cond_proj, and how it is grown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import blocks, convert, unet
from tests.models.peers import run

SPEC = unet.UNetSpec(
    8, 12, (1,), (True,), 1, heads=2, groups=4, sample_size=4, context_length=3,
    guidance_dim=16,
)
PLAIN = unet.UNetSpec(
    8, 12, (1,), (True,), 1, heads=2, groups=4, sample_size=4, context_length=3
)


def parameters(spec, seed=0):
    """Normal ones, without compiling what draws a network's own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32) / 4,
        unet.param_shapes(spec),
    )


def inputs(batch=4):
    keys = jax.random.split(jax.random.key(1), 2)
    x, t, ctx = unet.example_inputs(PLAIN, batch)
    return jax.random.normal(keys[0], x.shape), t + 300.0, jax.random.normal(keys[1], ctx.shape)


def test_the_embedding_is_the_published_one():
    """Sines, then cosines, of 1000 (w - 1), the last of them slower by 10,000."""
    out = np.asarray(blocks.guidance_embedding(jnp.array([1.0, 1.25]), 256))
    np.testing.assert_array_equal(out[0], np.repeat([0.0, 1.0], 128))
    np.testing.assert_allclose(out[1, [0, 127]], np.sin([250.0, 0.025]), atol=1e-5)
    np.testing.assert_allclose(out[1, [128, 255]], np.cos([250.0, 0.025]), atol=1e-5)


def test_a_grown_network_gives_what_it_gave_until_it_learns():
    params = parameters(PLAIN)
    grown = unet.grow_guidance(params, SPEC.guidance_dim)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), grown)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), unet.param_shapes(SPEC))
    x, t, ctx = inputs()
    w_B = jnp.array([1.0, 2.0, 7.5, 14.0])
    want = run(unet.denoise_fn(PLAIN), params, x, t, {"context": ctx})
    cond = {"context": ctx, "guidance": w_B}
    got = run(unet.denoise_fn(SPEC), grown, x, t, cond)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert np.abs(want).max() > 0.1


def test_without_it_parameters_are_what_they_were():
    names = {jax.tree_util.keystr(p) for p, _ in
             jax.tree_util.tree_leaves_with_path(unet.param_shapes(PLAIN))}
    more = {jax.tree_util.keystr(p) for p, _ in
            jax.tree_util.tree_leaves_with_path(unet.param_shapes(SPEC))}
    assert more - names == {"['guidance_embedding']['kernel']"} and names < more


def test_a_rate_that_is_missing_or_not_known():
    x, t, ctx = inputs()
    params = jax.eval_shape(lambda: unet.init(SPEC, jax.random.key(0)))
    with pytest.raises(UserError, match="guidance_dim=16 needs each sample's"):
        jax.eval_shape(lambda p: unet.UNet(SPEC).apply({"params": p}, x, t, ctx), params)
    with pytest.raises(UserError, match="guidance_dim=0 knows no"):
        jax.eval_shape(lambda p: unet.UNet(PLAIN).apply({"params": p}, x, t, ctx, t), params)
    for dim in (-2, 2, 5, 1.0):
        with pytest.raises(UserError, match="guidance_dim="):
            unet.UNetSpec(8, guidance_dim=dim)


def test_it_equals_diffusers(tmp_path):
    why = "compares with diffusers: pip install -e '.[parity]'"
    diffusers = pytest.importorskip("diffusers", reason=why)
    torch = pytest.importorskip("torch", reason=why)
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), attention_head_dim=4, norm_num_groups=8,
        cross_attention_dim=12, layers_per_block=1, time_cond_proj_dim=256,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    with torch.no_grad():
        model.time_embedding.cond_proj.weight.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    spec, params = convert.load_unet(tmp_path)
    assert spec.guidance_dim == 256
    rng = np.random.default_rng(0)
    x_BHWC = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    ctx_BLD = rng.standard_normal((3, 5, 12)).astype(np.float32)
    t_B, rate_B = (np.array(a, np.float32) for a in ([981, 400, 19], [1.5, 3, 5]))
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    with torch.no_grad():
        want = model(
            torch.from_numpy(x_BHWC).permute(0, 3, 1, 2), torch.from_numpy(t_B),
            torch.from_numpy(ctx_BLD),
            # As its pipeline does: the scale less one.
            timestep_cond=embed(None, torch.from_numpy(rate_B - 1), 256),
        ).sample.permute(0, 2, 3, 1).numpy()
    cond = {"context": ctx_BLD, "guidance": rate_B}
    got = run(unet.denoise_fn(spec), params, x_BHWC, t_B, cond)
    with torch.no_grad():
        still = model(
            torch.from_numpy(x_BHWC).permute(0, 3, 1, 2), torch.from_numpy(t_B),
            torch.from_numpy(ctx_BLD), timestep_cond=embed(None, torch.zeros(3), 256),
        ).sample.permute(0, 2, 3, 1).numpy()
    assert np.abs(still - want).max() > 0.02
    # Angles up to 4,000 in float32: their sines are known to 2e-4 on both sides.
    np.testing.assert_allclose(got, want, atol=5e-4)
