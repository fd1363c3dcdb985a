"""Attention's forms agree with JAX's own, forward and backward, and each place gets one that it can
take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention, unet


def inputs(queries=5, keys=7, width=8, dtype=jnp.float32, size=1.0, batch=2, heads=3):
    seeds = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, heads, n, width) for n in (queries, keys, keys)]
    return [size * jax.random.normal(k, s, dtype) for k, s in zip(seeds, shapes, strict=True)]


def peer(q, k, v):
    return jax.nn.dot_product_attention(*(a.swapaxes(1, 2) for a in (q, k, v))).swapaxes(1, 2)


def gradients(form, operands):
    return jax.grad(lambda qkv: jnp.sum(jnp.sin(3 * form(*qkv))))(operands)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("form", [attention.plain, attention.textbook, attention.chunked])
def test_forms_equal_jaxs_own(form, size):
    operands = inputs(size=size)
    np.testing.assert_allclose(form(*operands), peer(*operands), rtol=1e-5, atol=1e-5 * size)
    for got, want in zip(gradients(form, operands), gradients(peer, operands), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * size)


def test_chunks_of_few_queries_equal_all_at_once(monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_LOGITS", 4 * 2 * 3 * 7 * 2)  # two queries at a time
    operands = inputs(queries=12)
    text = str(jax.make_jaxpr(attention.chunked)(*operands))
    assert "scan" in text and "length=6" in text
    np.testing.assert_allclose(attention.chunked(*operands), peer(*operands), atol=1e-5)
    for got, want in zip(
        gradients(attention.chunked, operands), gradients(peer, operands), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    "queries, keys, width", [(256, 256, 40), (128, 256, 8), (128, 77, 16), (128, 130, 8)]
)
def test_the_tpu_kernel_step_by_step_equals_jaxs_own(queries, keys, width):
    operands = inputs(queries, keys, width, batch=1, heads=2)

    def form(q, k, v):
        return attention.splash(q, k, v, interpret=True)

    np.testing.assert_allclose(form(*operands), peer(*operands), atol=2e-5)
    for got, want in zip(gradients(form, operands), gradients(peer, operands), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_plain_in_bfloat16_keeps_its_type_and_sums_in_float32():
    operands = inputs(dtype=jnp.bfloat16)
    got = attention.plain(*operands)
    want = attention.plain(*(a.astype(jnp.float32) for a in operands))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


def choice(how, platform, queries, keys, width, dtype=jnp.bfloat16, batch=8):
    shapes = (jax.ShapeDtypeStruct((batch, 8, n, width), dtype) for n in (queries, keys))
    return attention.Attention(how, platform).choice(*shapes)


@pytest.mark.parametrize("width", [8, 40, 64, 96, 160, 320, 384])
def test_auto_on_a_tpu_fuses_self_attention_at_every_width_of_the_family(width):
    assert choice("auto", "tpu", 4096, 4096, width) == "splash"
    assert choice("auto", "tpu", 1024, 1024, width) == "splash"
    assert choice("auto", "tpu", 4096, 77, width) == "splash"
    assert choice("auto", "tpu", 64, 64, width) == "plain"


def test_auto_on_a_gpu_knows_cudnns_limits():
    assert choice("auto", "gpu", 4096, 4096, 40) == "cudnn"
    assert choice("auto", "gpu", 4096, 77, 256) == "cudnn"
    assert choice("auto", "gpu", 64, 64, 264) == "plain"
    assert choice("auto", "gpu", 64, 64, 12) == "cudnn"  # Filled up to 16.
    assert choice("auto", "gpu", 64, 64, 40, jnp.float32) == "plain"
    assert choice("auto", "gpu", 4096, 4096, 384) == "chunked"
    ampere = attention.Attention("auto", "gpu", cudnn_width=128)
    wide = jax.ShapeDtypeStruct((8, 8, 256, 160), jnp.bfloat16)
    assert ampere.choice(wide, wide) == "plain"


def test_auto_elsewhere_chunks_what_is_too_large():
    assert choice("auto", "cpu", 1024, 1024, 40, batch=1) == "plain"
    assert choice("auto", "cpu", 4096, 4096, 40, batch=8) == "chunked"


def test_a_forced_form_holds_wherever_shapes_allow_it():
    assert choice("plain", "tpu", 4096, 4096, 40) == "plain"
    assert choice("chunked", "cpu", 64, 64, 40) == "chunked"
    assert choice("splash", "tpu", 128, 128, 40) == "splash"
    assert choice("splash", "tpu", 64, 64, 40) == "plain"
    assert choice("cudnn", "gpu", 4096, 4096, 384) == "chunked"


def test_what_there_is_not_is_refused():
    with pytest.raises(UserError, match="attention='flash': choose one of auto, plain"):
        attention.Attention("flash")
    with pytest.raises(UserError, match="attention=cudnn runs on GPUs, and this is for a tpu"):
        attention.Attention("cudnn", "tpu")
    with pytest.raises(UserError, match="multiples of 128 queries, not 100"):
        attention.splash_blocks(100, 64, 40)


def test_a_network_is_the_same_through_every_form():
    spec = unet.UNetSpec(
        16, context_dim=8, channel_mults=(1,), attention_levels=(True,), blocks_per_level=1,
        heads=2, groups=4, sample_size=16, context_length=7,
    )
    x = jax.random.normal(jax.random.key(1), (1, *spec.latent_shape))
    ctx = jax.random.normal(jax.random.key(2), (1, 7, 8))
    params = jax.jit(lambda: unet.init(spec, jax.random.key(0)))()
    outs = {}
    for how in ("plain", "chunked", "splash"):
        form = attention.Attention(how)
        denoise = jax.jit(unet.denoise_fn(spec, attention=form))
        outs[how] = denoise(params, x, jnp.array([300.0]), {"context": ctx})
    places = dataclasses.replace(spec, sample_size=16)
    assert attention.Attention("splash").choice(
        *(jax.ShapeDtypeStruct((1, 2, places.sample_size**2, 8), jnp.float32),) * 2
    ) == "splash"
    assert np.std(outs["plain"]) > 0
    for how in ("chunked", "splash"):
        np.testing.assert_allclose(outs[how], outs["plain"], atol=1e-5)


@pytest.mark.parametrize(
    "queries, keys, width", [(6, 4, 8), (6, 7, 8), (5, 8, 8), (5, 7, 8), (6, 4, 12), (5, 7, 3)]
)
def test_cudnn_is_given_what_its_kernel_takes(queries, keys, width, monkeypatch):
    """Even numbers of tokens and widths of multiples of 8; what fills them up changes nothing."""
    own, given = jax.nn.dot_product_attention, []

    def instead(q, k, v, *, implementation, **kw):
        given.append((q.shape[1], k.shape[1]))
        assert implementation == "cudnn" and q.shape[3] == -(-width // 8) * 8
        return own(q, k, v, **kw)

    operands = inputs(queries, keys, width)
    wanted = peer(*operands), gradients(peer, operands)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    np.testing.assert_allclose(attention.cudnn(*operands), wanted[0], atol=1e-5)
    for got, want in zip(gradients(attention.cudnn, operands), wanted[1], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert all(n % 2 == 0 for pair in given for n in pair)
