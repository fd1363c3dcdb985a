"""What DiT, U-ViT and MM-DiT have in common, and no peer is needed for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention, blocks, dit, lora, mmdit, tokens, uvit
from ldm_scaling.parallel import gathering, rules
from ldm_scaling.parallel import mesh as mesh_lib
from tests.models.peers import FAST

SIZES = {"context_dim": 6, "context_length": 3, "sample_size": 8}
SPECS = {
    "dit": (dit, dit.DiTSpec(16, 2, 2, **SIZES)),
    "pooled": (dit, dit.DiTSpec(16, 2, 2, "pooled", **SIZES)),
    "uvit": (uvit, uvit.UViTSpec(16, 3, 2, **SIZES)),
    "mmdit": (mmdit, mmdit.MMDiTSpec(2, 8, **SIZES)),
}
NETWORKS = {dit: dit.DiT, uvit: uvit.UViT, mmdit: mmdit.MMDiT}
each = pytest.mark.parametrize("module, spec", SPECS.values(), ids=SPECS)
each_module = pytest.mark.parametrize(
    "module, spec", [SPECS[name] for name in ("dit", "uvit", "mmdit")], ids=["dit", "uvit", "mmdit"]
)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)


def run(f, *args):
    return jax.tree.map(np.asarray, compiled(f, *args)(*args))


@functools.cache
def parameters(module, spec):
    """Random everywhere, biases and scales too, without compiling what draws a network's own."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32) / 3,
        module.param_shapes(spec),
    )


def inputs(height=8, width=8, batch=4, channels=4, length=3):
    rng = np.random.default_rng(1)
    x_BHWC, ctx_BLD = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((batch, height, width, channels), (batch, length, 6))
    )
    return x_BHWC, np.linspace(990.0, 5.0, batch, dtype=np.float32), ctx_BLD


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@each
def test_every_input_matters_and_examples_stay_apart(module, spec):
    """And the order of text tokens to U-ViT alone, which has places for them."""
    params, args = parameters(module, spec), inputs()

    def denoise(p, x, t, ctx):
        return module.denoise_fn(spec)(p, x, t, {"context": ctx})

    denoise = compiled(denoise, params, *args)
    base = np.asarray(denoise(params, *args))
    assert base.shape == (4, 8, 8, 4) and base.dtype == np.float32 and np.std(base) > 0.1
    for i in range(3):
        changed = [a.copy() for a in args]
        changed[i][1] += 0.5
        out = denoise(params, *changed)
        close(out[0], base[0], 1e-6)
        assert np.max(np.abs(out[1] - base[1])) > 1e-3
    x, t, ctx = args
    other = denoise(params, x, t, ctx[:, ::-1].copy())
    assert (np.abs(other - base).max() > 1e-3 * np.abs(base).max()) == (module is uvit)
    # Places are known: a picture rolled by a patch is another one.
    other = denoise(params, np.roll(x, spec.patch, axis=1), t, ctx)
    assert np.abs(np.roll(base, spec.patch, axis=1) - other).max() > 1e-3 * np.abs(base).max()


@each
def test_sides_that_no_patches_make(module, spec):
    params, (x, t, ctx) = parameters(module, spec), inputs(4, 12)
    denoise, cond = module.denoise_fn(spec), {"context": ctx}
    assert jax.eval_shape(denoise, params, x, t, cond).shape == x.shape
    with pytest.raises(UserError, match="latents of 4 x 7 do not split into patches of 2 x 2"):
        jax.eval_shape(denoise, params, x[:, :, :7], t, cond)


def test_learned_places_are_resampled_for_other_sides():
    """Places that do not differ stay what they are, at any side."""
    module, spec = SPECS["uvit"]
    params, (x, t, ctx) = parameters(module, spec), inputs(4, 12)
    even = params["positions"].at[4:].set(params["positions"][4])
    wide = dataclasses.replace(spec, sample_size=4)  # has 4 places
    outs = []
    for one, places in ((spec, even), (wide, even[:8])):
        denoise = module.denoise_fn(one)
        outs.append(run(denoise, {**params, "positions": places}, x, t, {"context": ctx}))
    close(outs[0], outs[1])
    assert outs[0].shape == x.shape and np.std(outs[0]) > 0.1


@each
def test_what_is_grown_gives_what_it_gave_until_it_learns(module, spec):
    params, (x, t, ctx) = parameters(module, spec), inputs()
    want = run(module.denoise_fn(spec), params, x, t, {"context": ctx})
    more = dataclasses.replace(spec.grown(3), guidance_dim=12)
    grown = module.grow_guidance(module.grow_input(params, 3), 12)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), grown)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), module.param_shapes(more))
    cond = {
        "context": ctx, "condition": inputs(channels=3)[0],
        "guidance": np.array([1.0, 2.0, 7.5, 14.0], np.float32),
    }
    close(run(module.denoise_fn(more), grown, x, t, cond), want, 1e-6)
    assert np.abs(want).max() > 0.1
    network = NETWORKS[module]
    with pytest.raises(UserError, match="guidance_dim=12 needs each sample's"):
        jax.eval_shape(network(more).apply, {"params": grown}, x, t, ctx)
    with pytest.raises(UserError, match="guidance_dim=0 knows no"):
        jax.eval_shape(network(spec).apply, {"params": params}, x, t, ctx, t)


@each_module
def test_remat_changes_neither_output_nor_gradient(module, spec):
    params, (x, t, ctx) = parameters(module, spec), inputs(4, 4, batch=2)
    results = []
    for remat in ("none", "block"):
        denoise = module.denoise_fn(spec, remat=remat)

        def loss(params, denoise=denoise):
            out = denoise(params, x, t, {"context": ctx})
            return jnp.sum(jnp.sin(out)), out

        text = str(jax.make_jaxpr(jax.grad(lambda p, loss=loss: loss(p)[0]))(params))
        assert ("remat" in text or "checkpoint" in text) == (remat == "block")
        results.append(run(jax.value_and_grad(loss, has_aux=True), params))
    ((_, out), grads), ((_, out_remat), grads_remat) = results
    close(out_remat, out)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))  # nothing is idle
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
        grads_remat, grads,
    )
    with pytest.raises(UserError, match="remat='all'"):
        jax.eval_shape(module.denoise_fn(spec, remat="all"), params, x, t, {"context": ctx})


@each_module
def test_shards_and_forms_of_attention_give_the_same(module, spec):
    """Over data and fsdp, with weights gathered where they are used; over tensor; and chunked."""
    params, (x, t, ctx) = parameters(module, spec), inputs()
    cond = {"context": ctx}
    want = run(module.denoise_fn(spec), params, x, t, cond)

    def make(gather, apart):
        return module.denoise_fn(spec, attention=attention.chunked, gather=gather)

    shapes = module.param_shapes(spec)
    for sizes in ((2, 2, 1), (1, 2, 2)):
        mesh = mesh_lib.make(*sizes, devices=jax.devices()[:4])
        shardings = rules.shardings(shapes, mesh)
        shared = jax.device_put(params, shardings)
        got = run(gathering.spread(make, shapes, mesh), shared, x, t, cond)
        close(got, want)
    split = {
        rules.path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
        if "tensor" in leaf.spec
    }
    assert any("to_q" in name for name in split) and any("ff_out" in name for name in split)
    held = sum(
        leaf.size for leaf, sharding in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        ) if sharding.is_fully_replicated
    )
    assert held < 0.15 * sum(leaf.size for leaf in jax.tree.leaves(shapes))


@each_module
def test_bfloat16_returns_float32_nearby(module, spec):
    params, (x, t, ctx) = parameters(module, spec), inputs()
    exact, rough = (
        run(module.denoise_fn(spec, dtype), params, x, t, {"context": ctx})
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == np.float32
    assert 0 < np.std(rough - exact) < 0.05 * np.std(exact)


@each
def test_drawn_parameters(module, spec):
    """DiTs and MM-DiTs begin at 0, as their papers say, and so do PixArt-alpha's cross-attentions;
    weights are drawn as the one layer they are in the papers' code."""
    params = run(functools.partial(module.init, spec), jax.random.key(0))
    assert np.any(params["proj_out"]["kernel"]) == (module is uvit)
    if spec is SPECS["dit"][1]:
        assert not np.any(params["block_1"]["attn2"]["to_out"]["kernel"])
    if spec is SPECS["pooled"][1]:
        assert not np.any(params["block_1"]["modulation"]["kernel"])
        bound = np.sqrt(6 / (16 + 3 * 16))
        drawn = np.abs(params["block_0"]["attn1"]["to_q"]["kernel"]).max()
        assert 0.95 * bound < drawn <= bound


@pytest.mark.parametrize("name", ["dit", "uvit", "mmdit"])
def test_lora_knows_the_attention(name, tmp_path):
    """All its projections: of MM-DiT both streams', but two of the last block's text, which asks
    nothing. A file has them by our names."""
    module, spec = SPECS[name]
    shapes = module.param_shapes(spec)
    found = lora.layers(shapes, lora.NETWORK_TARGETS)
    each = {"dit": 8, "uvit": 4, "mmdit": 8}[name]
    assert len(found) == each * spec.depth - (2 if name == "mmdit" else 0)
    adapters = {"unet": lora.init(shapes, 2, jax.random.key(0))}
    lora.save(tmp_path / "lora.safetensors", adapters, None)
    tensors = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    own = traverse_util.flatten_dict(adapters["unet"], sep=".")
    assert {n: t.shape for n, t in tensors.items()} == {
        f"denoiser.{layer.replace('/', '.')}.lora_{end}.weight":
            own[f"{layer.replace('/', '.')}.{kernel}.kernel"].T.shape
        for layer in found for end, kernel in (("A", "down"), ("B", "up"))
    }


def test_fewer_tokens_of_text_than_places():
    module, spec = SPECS["uvit"]
    params, (x, t, ctx) = parameters(module, spec), inputs()
    denoise = module.denoise_fn(spec)
    out = run(denoise, params, x, t, {"context": ctx[:, :2]})
    # The places of tokens that are not there do not matter.
    other = {**params, "positions": params["positions"].at[3].set(9.0)}
    np.testing.assert_array_equal(run(denoise, other, x, t, {"context": ctx[:, :2]}), out)
    longer = jnp.zeros((4, 4, 6))
    with pytest.raises(UserError, match="context_length=3 knows no place for 4 text tokens"):
        jax.eval_shape(denoise, params, x, t, {"context": longer})


def test_patches_and_back():
    """With an identity for a kernel: each patch's channels are one token's, and back."""
    spec = dit.DiTSpec(16, 1, 2, **SIZES)
    x_BHWC = inputs(4, 6)[0]

    class Patches(tokens.nn.Module):
        @tokens.nn.compact
        def __call__(self, x):
            return tokens.patches(spec, x, jnp.float32, None)

    kernel = np.eye(16, dtype=np.float32).reshape(2, 2, 4, 16)
    layer = {"conv_in": {"kernel": kernel, "bias": np.zeros(16, np.float32)}}
    x_BhwD = Patches().apply({"params": layer}, x_BHWC)
    np.testing.assert_array_equal(x_BhwD[1, 0, 2], x_BHWC[1, :2, 4:].reshape(-1))
    x_BLD = x_BhwD.reshape(4, 6, 16)
    np.testing.assert_array_equal(tokens.picture(x_BLD, 4, 6, 2), x_BHWC)


def test_places():
    """Each place is a point on a torus, half of it the column's; products of two places depend on
    their distance alone."""
    e = tokens.sincos(np.arange(5), np.arange(7) / 2, 32).astype(np.float64)
    assert e.shape == (5, 7, 32)
    np.testing.assert_array_equal(e[0, :, :16], e[4, :, :16])
    np.testing.assert_array_equal(e[:, 0, 16:], e[:, 6, 16:])
    np.testing.assert_allclose(np.sum(e**2, axis=-1), 16.0, rtol=1e-6)
    products = np.sum(e[:-1, :-2] * e[1:, 2:], axis=-1)
    np.testing.assert_allclose(products, products[0, 0], rtol=1e-6)
    # The row's half is a timestep's embedding, sines first.
    t = np.asarray(blocks.timestep_embedding(jnp.arange(5.0), 16))
    np.testing.assert_allclose(e[:, 0, 16:], np.roll(t, 8, axis=1), atol=1e-6)


@pytest.mark.parametrize("make, says", [
    (lambda: dit.DiTSpec(16, 0, 2), "DiT depth=0: give a whole number"),
    (lambda: dit.DiTSpec(16, 2, 3), "width 16 must be a multiple of 4 and of heads=3"),
    (lambda: dit.DiTSpec(16, 2, 2, "class"), "conditioning='class' is not one of cross, pooled"),
    (lambda: dit.DiTSpec(16, 2, 2, sample_size=9), "sample_size=9 must be a multiple of patch=2"),
    (lambda: dit.DiTSpec(16, 2, 2, guidance_dim=2), "DiT guidance_dim=2"),
    (lambda: uvit.UViTSpec(16, 4, 2), "U-ViT depth=4 must be odd"),
    (lambda: uvit.UViTSpec(18, 3, 2), "width 18 must be a multiple of 4"),
    (lambda: mmdit.MMDiTSpec(2, 8.0), "MM-DiT head_width=8.0"),
])
def test_a_spec_that_cannot_be_built(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_what_specs_tell():
    spec = mmdit.MMDiTSpec(24)
    assert (spec.base_channels, spec.heads, spec.downsampling) == (1536, 24, 2)
    assert spec.grown(4).in_channels == 8 and spec.grown(4).latent_shape == (32, 32, 4)
    assert spec.grown(4).base_channels == 1536
