"""Facts about the blocks and the U-Net that no peer is needed for."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, blocks, unet
from tests.models.peers import FAST

TINY = unet.UNetSpec(
    8, context_dim=6, channel_mults=(1, 2), attention_levels=(True, False), blocks_per_level=1,
    heads=2, groups=4, sample_size=4, context_length=3,
)


def run(f, *args):
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args)


def tiny_inputs(batch=2, height=4, width=4):
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((batch, height, width, 4), (batch,), (batch, 3, 6))
    ]


def random_params(spec):
    """Random everywhere, biases and scales too."""
    shapes = jax.eval_shape(lambda: unet.init(spec, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: (0.3 * rng.standard_normal(s.shape) + (len(s.shape) == 1)).astype(np.float32),
        shapes,
    )


@pytest.fixture(scope="module")
def tiny_params():
    return random_params(TINY)


def test_upsampling_is_nearest():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    want = jax.image.resize(x, (2, 6, 10, 4), "nearest")
    np.testing.assert_array_equal(blocks.upsample(x), want)


def test_timestep_embedding():
    t = jnp.array([0.0, 1.0, 500.5, 999.0])
    e = blocks.timestep_embedding(t, 32)
    assert e.dtype == jnp.float32 and e.shape == (4, 32)
    e = np.asarray(e, np.float64)
    # Cosines come first.
    np.testing.assert_array_equal(e[0], [1.0] * 16 + [0.0] * 16)
    # Points on a torus: every (cos, sin) has length 1.
    np.testing.assert_allclose(e[:, :16] ** 2 + e[:, 16:] ** 2, 1.0, atol=1e-6)
    # Frequencies fall from 1 by a constant ratio, on towards 1 / 10000.
    angles = np.arctan2(e[1, 16:], e[1, :16])
    np.testing.assert_allclose(angles[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(angles[1:] / angles[:-1], 10_000 ** (-1 / 16), rtol=1e-5)


def test_timestep_embeddings_inner_product_depends_on_the_difference_alone():
    t = jnp.arange(0.0, 1000.0, 37.0)
    a, b = (np.asarray(blocks.timestep_embedding(s, 64), np.float64) for s in (t, t + 12.5))
    products = np.sum(a * b, axis=1)
    np.testing.assert_allclose(products, products[0], atol=1e-3)


def test_group_norm_equals_flaxs():
    x = 2 * jax.random.normal(jax.random.key(0), (3, 8, 6, 32)) + 5
    peer, ours = nn.GroupNorm(8, epsilon=1e-5), blocks.GroupNorm(8, 1e-5)
    params = jax.tree.map(
        lambda v: v + 0.3 * jax.random.normal(jax.random.key(1), v.shape),
        peer.init(jax.random.key(2), x),
    )

    def loss(network):
        value = jax.value_and_grad(lambda *a: jnp.mean(jnp.sin(network.apply(*a))), (0, 1))
        return value(params, x)

    for got, want in zip(
        jax.tree.leaves(loss(ours)), jax.tree.leaves(loss(peer)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    # One value everywhere: no variance, and nothing that is not finite.
    out = ours.apply(params, jnp.full_like(x, 3.0))
    np.testing.assert_allclose(out[0, 0, 0], params["params"]["bias"], atol=1e-2)


@pytest.mark.parametrize("ours, flaxs", [
    (lambda x, y: y * blocks.silu(x), lambda x, y: y * nn.silu(x)),
    (blocks.geglu, lambda x, y: x * nn.gelu(y, approximate=False)),
])
def test_activations_and_their_gradients_are_flaxs(ours, flaxs):
    ends = np.array([0.0, -1e-3, 5.0, -5.0, 12.0, -12.0, 200.0, -200.0], np.float32)
    x = np.concatenate([ends, 3 * np.random.default_rng(0).standard_normal(500)]).astype("f4")
    x, y = np.meshgrid(x, x)

    def value_and_gradients(f):
        value, backward = jax.vjp(f, x, y)
        return value, *backward(np.sin(x + 2 * y))

    for mine, theirs in zip(value_and_gradients(ours), value_and_gradients(flaxs), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6 * 200)


def test_remat_changes_neither_output_nor_gradient():
    spec = dataclasses.replace(TINY, channel_mults=(1,), attention_levels=(True,))
    inputs, params = tiny_inputs(), random_params(spec)
    results = {}
    for remat in ("none", "block"):
        network = unet.UNet(spec, remat=remat)

        def loss(params, network=network):
            out = network.apply({"params": params}, *inputs)
            return jnp.sum(jnp.sin(out)), out

        results[remat] = run(jax.value_and_grad(loss, has_aux=True), params)
    (_, out), grads = results["none"]
    (_, out_remat), grads_remat = results["block"]
    assert out.shape == (2, 4, 4, 4) and np.std(out) > 0.1
    np.testing.assert_allclose(out_remat, out, rtol=1e-5, atol=1e-5)
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
        grads_remat, grads,
    )
    with pytest.raises(UserError, match="remat='all'"):
        jax.eval_shape(unet.UNet(spec, remat="all").apply, {"params": params}, *inputs)


def test_a_network_that_begins_with_zeros():
    """Those of the published code's `zero_module` alone; all others are drawn as without."""
    plain = dataclasses.replace(TINY, channel_mults=(1,), attention_levels=(True,))
    spec, key = dataclasses.replace(plain, zero_init=True), jax.random.key(0, impl="rbg")
    params, others = run(lambda key: [unet.init(s, key) for s in (spec, plain)], key)
    drawn, others = (flatten_dict(tree, sep="/") for tree in (params, others))
    assert list(drawn) == list(others)
    for name, leaf in drawn.items():
        last = re.search(r"/(conv2|proj_out)/kernel$|^conv_out/kernel$", name)
        assert not np.any(leaf) if last else np.array_equal(leaf, others[name]), name
        assert np.any(others[name]) == name.endswith(("kernel", "scale")), name

    def loss(conv_out):
        out = unet.UNet(spec).apply({"params": params | {"conv_out": conv_out}}, *tiny_inputs())
        return jnp.sum((out - 1.0) ** 2), out

    (_, out), grads = run(jax.value_and_grad(loss, has_aux=True), params["conv_out"])
    assert not np.any(out) and np.abs(grads["kernel"]).max() > 0.1


def test_every_input_matters_and_examples_stay_apart(tiny_params):
    apply = jax.jit(lambda *a: unet.UNet(TINY).apply({"params": tiny_params}, *a))
    inputs = tiny_inputs()
    base = apply(*inputs)
    for i in range(3):
        changed = [a.copy() for a in inputs]
        changed[i][1] += 0.5
        out = apply(*changed)
        np.testing.assert_array_equal(out[0], base[0])
        assert np.max(np.abs(out[1] - base[1])) > 1e-3


def test_the_order_of_context_tokens_does_not_matter(tiny_params):
    """Cross-attention is a mean over tokens: the positions are in the states, not in the U-Net."""
    x, t, ctx = tiny_inputs()
    apply = jax.jit(unet.UNet(TINY).apply)
    got = apply({"params": tiny_params}, x, t, ctx[:, [2, 0, 1]])
    np.testing.assert_allclose(got, apply({"params": tiny_params}, x, t, ctx), atol=1e-5)


def test_bfloat16_returns_float32_nearby(tiny_params):
    inputs = tiny_inputs()
    exact, rough = (
        run(unet.denoise_fn(TINY, dtype), tiny_params, *inputs[:2], {"context": inputs[2]})
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.float32
    difference = np.asarray(rough - exact)
    assert 0 < np.std(difference) < 0.05 * np.std(exact)


@pytest.mark.parametrize("change, says", [
    ({"x": (2, 7, 8, 4)}, "latents of 7 x 8: give sides that are multiples of 2"),
    ({"x": (2, 8, 8, 5)}, "latents.* of width 5: the network's in_channels is 4"),
    ({"condition": (2, 8, 8, 2)}, "latents.* of width 6: the network's in_channels is 4"),
    ({"context": (2, 3, 5)}, "text tokens of width 5: the network's context_dim is 6"),
    ({"guidance_dim": 4}, "guidance_dim=4 needs each sample's guidance rate"),
])
def test_inputs_that_do_not_fit(change, says):
    spec = dataclasses.replace(TINY, guidance_dim=change.pop("guidance_dim", 0))
    cond = {name: jnp.zeros(shape) for name, shape in {"context": (2, 3, 6), **change}.items()}
    x_BHWC = cond.pop("x", jnp.zeros((2, 8, 8, 4)))
    with pytest.raises(UserError, match=says):
        jax.eval_shape(unet.denoise_fn(spec), unet.param_shapes(spec), x_BHWC, jnp.zeros(2), cond)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"base_channels": 0}, "base_channels=0"),
        ({"base_channels": 7}, "must be even|multiple"),
        ({"base_channels": 8.0}, "base_channels=8.0"),
        ({"heads": 3}, "width 8 .* multiple of .*heads=3"),
        ({"groups": 16}, "multiple of groups=16"),
        ({"attention_levels": (True,)}, "same number of levels"),
        ({"channel_mults": (), "attention_levels": ()}, "same number of levels, at least 1"),
        ({"sample_size": 5}, "sample_size=5 must halve 1"),
    ],
)
def test_a_spec_that_cannot_be_built(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **change)


def test_specs_hash_alike_from_lists_and_tuples():
    spec = dataclasses.replace(TINY, channel_mults=[1, 2], attention_levels=[True, False])
    assert spec == TINY and hash(spec) == hash(TINY)


def test_autoencoder_specs():
    assert autoencoder.AutoencoderSpec().downsampling == 8
    with pytest.raises(UserError, match="width 24 is not a multiple of groups=16"):
        autoencoder.AutoencoderSpec(24, groups=16)
    with pytest.raises(UserError, match="channel_mults"):
        autoencoder.AutoencoderSpec(channel_mults=())


def test_posterior():
    shape = (2, 4, 4, 3)
    standard = autoencoder.Posterior(jnp.zeros(shape), jnp.zeros(shape))
    np.testing.assert_array_equal(standard.kl(), 0.0)
    mean, logvar = jnp.full(shape, 0.5), jnp.full(shape, -0.7)
    posterior = autoencoder.Posterior(mean, logvar)
    # KL = E_q[log q - log p], by sampling.
    draws = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 4096))
    log_q = jax.scipy.stats.norm.logpdf(draws, mean, jnp.exp(0.5 * logvar))
    log_p = jax.scipy.stats.norm.logpdf(draws)
    kl = jnp.mean(jnp.sum(log_q - log_p, axis=(2, 3, 4)), axis=0)
    np.testing.assert_allclose(posterior.kl(), kl, rtol=0.05)
    np.testing.assert_allclose(jnp.std(draws), jnp.exp(-0.35), rtol=0.01)
