"""Parameters in the types that a network uses them in: the same outputs, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.models import backbone, dit, edm2, mmdit, narrowing, unet, uvit
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.tasks import drawing

BF16 = jnp.dtype(jnp.bfloat16)
SIZES = {"context_dim": 6, "context_length": 3, "sample_size": 8}
LEVELS = {"channel_mults": (1, 2), "attention_levels": (False, True), "blocks_per_level": 1}
SPECS = {
    "unet": unet.UNetSpec(8, heads=2, groups=4, **LEVELS, **SIZES),
    "told": unet.UNetSpec(8, heads=2, groups=4, guidance_dim=8, **LEVELS, **SIZES),
    "dit": dit.DiTSpec(16, 2, 2, "pooled", **SIZES),
    "uvit": uvit.UViTSpec(16, 3, 2, **SIZES),
    "mmdit": mmdit.MMDiTSpec(2, 8, **SIZES),
    "edm2": edm2.EDM2Spec(8, head_channels=4, **LEVELS, **SIZES),
}
# Quick to compile, and what is rounded stays rounded.
EXACT = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


def _given(spec):
    x, t, ctx, *told = backbone.example_inputs(spec, 2)
    rng = np.random.default_rng(0)
    x, ctx = (rng.standard_normal(a.shape, np.float32) for a in (x, ctx))
    cond = {"context": ctx} | ({"guidance": told[0] + 3.0} if told else {})
    params = jax.tree.map(
        lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), backbone.param_shapes(spec)
    )
    return params, x, t + 500.0, cond


@pytest.mark.parametrize("name", SPECS)
def test_the_network_is_the_same_to_the_bit(name):
    spec = SPECS[name]
    params, *given = _given(spec)
    run = jax.jit(backbone.denoise_fn(spec, BF16), compiler_options=EXACT)
    narrow = jax.jit(narrowing.of(spec, BF16))(params)
    np.testing.assert_array_equal(run(params, *given), run(narrow, *given))
    kernels = [
        leaf.dtype for path, leaf in jax.tree_util.tree_flatten_with_path(narrow)[0]
        if path[-1].key == "kernel"
    ]
    assert set(kernels) == {BF16}


def test_norms_stay_wide_and_float32_is_left_alone():
    spec = SPECS["unet"]
    found = narrowing.types(spec, BF16)
    assert found["norm_out"] == {"scale": jnp.float32, "bias": jnp.float32}
    assert found["conv_in"] == {"kernel": BF16, "bias": BF16}
    params = _given(spec)[0]
    assert narrowing.of(spec, jnp.float32)(params) is params


def _twice(x):
    return x.astype(BF16).astype(jnp.float32) + x


@pytest.mark.parametrize(
    "use, found",
    [
        (lambda x: x.astype(BF16) * 2, BF16),
        (lambda x: jax.jit(lambda y: y.astype(BF16) * 2)(x), BF16),
        (jax.checkpoint(lambda x: x.astype(BF16) * 2), BF16),
        (_twice, jnp.float32),  # as it is, too
        (lambda x: (x.astype(BF16), x.astype(jnp.float16)), jnp.float32),
        (lambda x: (x.astype(BF16), x), jnp.float32),
        (lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y + x.astype(BF16), x), jnp.float32),
        (lambda x: 0.0, jnp.float32),
    ],
)  # fmt: skip
def test_only_what_is_converted_everywhere(use, found):
    traced = jax.make_jaxpr(use)(jnp.zeros(3)).jaxpr
    assert narrowing._type_of(traced, traced.invars[0], jnp.dtype(jnp.float32)) == found


def test_a_sampler_converts_before_its_loop():
    """In the program's text the loop holds no conversion of a whole kernel."""
    spec = SPECS["unet"]
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    params, x, t, cond = _given(spec)
    table = solvers.make("ddim", schedule.get("sd"), 4).padded()
    draw = sampler.make_sampler(
        drawing.denoiser(spec, mesh, "bfloat16"), spec.latent_shape,
        narrowed=drawing.narrowed(spec, mesh, "bfloat16"),
    )
    given = (params, table, None, cond, None, jax.random.key(0), jnp.arange(2))
    before, loop = draw.lower(*given).as_text().split("stablehlo.while", 1)
    kernel = "tensor<3x3x16x16xf32>) -> tensor<3x3x16x16xbf16>"
    assert kernel in before and kernel not in loop
    assert np.isfinite(draw(*given)).all()
