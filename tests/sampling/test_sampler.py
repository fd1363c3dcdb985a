"""The jitted loop: one trace for all, images that do not depend on their batch, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import guidance as guidance_lib
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.guidance import Correction
from ldm_scaling.sampling.sampler import State
from ldm_scaling.sampling.table import COLUMNS, SamplerTable

SD = schedule.get("sd")
SHAPE = (8, 8, 4)
KEY = jax.random.key(0)


def conv(x_BHWC, w_HWIO):
    return jax.lax.conv_general_dilated(
        x_BHWC, w_HWIO, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(params, x_BHWC, t_B, cond):
    """A small convolutional network that hears its timestep and its context."""
    shift_BC = cond["context"].mean(1) @ params["text"] + jnp.sin(t_B / 100)[:, None]
    h_BHWC = jnp.tanh(conv(x_BHWC, params["first"]) + shift_BC[:, None, None])
    return conv(h_BHWC, params["last"])


def random_params():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "first": jax.random.normal(keys[0], (3, 3, 4, 16)) / 6,
        "last": jax.random.normal(keys[1], (3, 3, 16, 4)) / 12,
        "text": jax.random.normal(keys[2], (5, 16)),
    }


PARAMS = random_params()
SAMPLE = sampler.make_sampler(network, SHAPE)
CONTEXT = jax.random.normal(jax.random.key(2), (64, 7, 5))
EMPTY = {"context": jnp.zeros((1, 7, 5))}


def sample(table, guidance, index, function=SAMPLE, key=KEY):
    index = np.asarray(index)
    cond = {"context": CONTEXT[index % 64]}
    if guidance is None:
        return np.asarray(function(PARAMS, table.padded(), None, cond, None, key, index))
    w_B = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), index.shape)
    return np.asarray(function(PARAMS, table.padded(), w_B, cond, EMPTY, key, index))


def test_all_tables_and_four_guidance_rates_are_one_trace():
    traces = []

    def counted(*args):
        traces.append(1)
        return network(*args)

    function = sampler.make_sampler(counted, SHAPE)
    outcomes = set()
    first = None
    for name in solvers.SOLVERS:
        for spacing in ("leading", "trailing", "karras"):
            for steps in (1, 2, 5, 12):
                table = solvers.make(name, SD, steps, "v", spacing)
                out = sample(table, (1.5, 3, 5, 8)[steps % 4], [0, 1], function)
                assert np.all(np.isfinite(out))
                outcomes.add(out.tobytes())
                first = first or len(traces)
    assert len(traces) == first
    assert function._cache_size() == 1
    # Many coincide on a few grids, above all at a single step.
    assert len(outcomes) > 80


@pytest.mark.parametrize("name", ["ddim", "ddpm_large", "dpmpp_2m", "heun", "unipc"])
def test_an_image_does_not_depend_on_its_batch(name):
    table = solvers.make(name, SD, 6, "v")
    together = sample(table, 4.0, np.arange(8))
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3], [3, 60, 11, 5]):
        apart = sample(table, 4.0, order)
        for image, index in zip(apart, order, strict=True):
            if index < 8:
                np.testing.assert_allclose(image, together[index], rtol=1e-5, atol=1e-5)


def test_noise_is_a_function_of_key_index_and_row():
    index = jnp.arange(5)
    noise = np.asarray(sampler.row_noise(KEY, index, 3, SHAPE))
    np.testing.assert_array_equal(sampler.row_noise(KEY, index[2:3], 3, SHAPE)[0], noise[2])
    streams = [sampler.initial_noise(KEY, index, SHAPE)]
    streams += [sampler.row_noise(KEY, index, r, SHAPE) for r in range(3)]
    streams += [sampler.row_noise(jax.random.key(9), index, 0, SHAPE), noise]
    flat = np.concatenate([np.asarray(s).reshape(5, -1) for s in streams])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 5 / flat.shape[1] ** 0.5
    np.testing.assert_allclose([flat.mean(), flat.std()], [0, 1], atol=0.05)


def test_samplers_start_from_the_same_noise_at_one_key():
    # One step to no noise returns p x + q F: with F = 0 and v, alpha times the initial noise.
    silent = sampler.make_sampler(lambda params, x, t, cond: 0 * x, SHAPE)
    outcomes = [
        sample(solvers.make(name, SD, 1, "v", "trailing", final="zero"), None, [4, 9], silent)
        for name in solvers.SOLVERS
    ]
    start = sampler.initial_noise(KEY, jnp.array([4, 9]), SHAPE)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome, SD.alpha[999] * start, rtol=1e-6, atol=1e-7)


def test_guidance_of_one_is_none_and_zero_is_the_empty_prompt():
    table = solvers.make("dpmpp_2m", SD, 5, "v")
    index = np.arange(4)  # as many as elsewhere, to compile once
    plain = sample(table, None, index)
    np.testing.assert_allclose(sample(table, 1.0, index), plain, atol=2e-5)
    empty = {"context": jnp.broadcast_to(EMPTY["context"], (4, 7, 5))}
    unconditional = SAMPLE(PARAMS, table.padded(), None, empty, None, KEY, index)
    np.testing.assert_allclose(sample(table, 0.0, index), unconditional, atol=2e-5)
    assert np.abs(sample(table, 3.0, index) - plain).max() > 0.1


def test_guidance_extrapolates_the_output():
    both = guidance_lib.with_unconditional({"context": CONTEXT[:4]}, EMPTY)
    x_BHWC = sampler.initial_noise(KEY, jnp.arange(4), SHAPE)
    t_B = jnp.full(4, 300.0)
    F_c = network(PARAMS, x_BHWC, t_B, {"context": CONTEXT[:4]})
    F_u = network(PARAMS, x_BHWC, t_B, {"context": jnp.zeros((4, 7, 5))})
    w_B = jnp.array([0.0, 1.0, 2.0, 7.5])
    got = guidance_lib.guided(network, PARAMS, x_BHWC, t_B, both, w_B)
    for b, w in enumerate([0, 1, 2, 7.5]):
        np.testing.assert_allclose(got[b], (1 - w) * F_u[b] + w * F_c[b], atol=2e-5)


def test_each_sample_has_its_own_guidance():
    table = solvers.make("ddpm", SD, 5, "v")
    rates = np.array([1.0, 2.0, 5.0, 8.0])
    together = sample(table, rates, np.arange(4))
    for b, w in enumerate(rates):
        np.testing.assert_allclose(sample(table, w, np.arange(4))[b], together[b], atol=2e-5)


def test_guided_rows_call_the_network_once_on_both():
    batches = []

    def counted(params, x_BHWC, t_B, cond):
        batches.append((x_BHWC.shape[0], t_B.shape, cond["context"].shape[0]))
        return x_BHWC

    function = sampler.make_sampler(counted, SHAPE)
    sample(solvers.make("ddim", SD, 3), 2.0, np.arange(3), function)
    assert set(batches) == {(6, (6,), 6)}
    batches.clear()
    sample(solvers.make("ddim", SD, 3), None, np.arange(3), function)
    assert set(batches) == {(3, (3,), 3)}


def test_rows_outside_an_interval_evaluate_the_network_once():
    """What runs, not what is traced."""
    ran = []

    def counted(params, x_BHWC, t_B, cond):
        jax.debug.callback(lambda: ran.append(x_BHWC.shape[0]))
        return network(params, x_BHWC, t_B, cond)

    function = sampler.make_sampler(counted, SHAPE)
    limits = {"guidance_low": 0.4, "guidance_high": 4.0}
    for limit, pairs in (({}, 6), (limits, 4), ({"guidance_low": 100.0}, 0)):
        table = solvers.make("ddim", SD, 6, "v", "trailing", **limit)
        ran.clear()
        jax.block_until_ready(sample(table, 3.0, np.arange(4), function))
        jax.effects_barrier()
        assert (ran.count(8), ran.count(4)) == (pairs, 6 - pairs), limit
        assert table.partly == (pairs == 4)
    assert function._cache_size() == 2


ZERO = schedule.get("sd_zero_snr")
KNOWN = 0.8


def network_of_a_known_image(params, x_BHWC, t_B, cond):
    def node(scale_T):
        return jnp.asarray(scale_T, jnp.float32)[t_B.astype(int)][:, None, None, None]

    alpha, sigma = node(ZERO.alpha), node(ZERO.sigma)
    return alpha * (x_BHWC - alpha * KNOWN) / sigma - sigma * KNOWN


SAMPLE_KNOWN = sampler.make_sampler(network_of_a_known_image, SHAPE)


@pytest.mark.parametrize("name", ["ddim_eta", *solvers.SOLVERS])
def test_marginal_of_a_known_image(name):
    """With the exact v network of a single image the samples at abar_0 are alpha x0 + sigma eps:
    mean and variance within 5 standard errors, but for DDPM's larger variance."""
    # Where the schedule ends in pure noise, the start N(0, 1) is the exact marginal.
    options = {"eta": 0.7} if name == "ddim_eta" else {}
    table = solvers.make(
        name.removesuffix("_eta"), ZERO, 7, "v", "trailing", final="abar_0", **options
    )
    x = sample(table, None, np.arange(64), SAMPLE_KNOWN).ravel()
    assert abs(x.mean() - ZERO.alpha[0] * KNOWN) < 5 * (x.var() / x.size) ** 0.5
    ratio = x.var() / ZERO.sigma[0] ** 2
    if name == "ddpm_large":
        assert ratio > 1.1
    else:
        assert abs(ratio - 1) < 5 * (2 / x.size) ** 0.5


def test_the_loop_carries_float32_whatever_the_network_returns():
    def low(params, x_BHWC, t_B, cond):
        assert x_BHWC.dtype == jnp.float32
        return network(params, x_BHWC, t_B, cond).astype(jnp.bfloat16)

    function = sampler.make_sampler(low, SHAPE)
    out = sample(solvers.make("ddim", SD, 3), 2.0, np.arange(2), function)
    assert out.dtype == np.float32


def test_other_conditioning_rides_along():
    # For instance low-resolution latents: one leaf has an empty counterpart, one its own.
    cond = {"context": CONTEXT[:3], "low": jnp.arange(3.0).reshape(3, 1)}
    both = guidance_lib.with_unconditional(cond, {**EMPTY, "low": cond["low"]})
    assert both["low"].ravel().tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(both["context"][::2], CONTEXT[:3])
    assert not both["context"][1::2].any()


def test_update_is_the_row_equation_in_any_precision():
    row = {column: 2.0 + i for i, column in enumerate(COLUMNS)}
    units = np.eye(7)
    # Coefficient by coefficient, from unit inputs (x, y1, m1, m2, m3, F, noise).
    got = [sampler.update(row, State(*unit[:5]), *unit[5:]) for unit in units]
    p, q, a = row["p"], row["q"], row["a"]
    m0 = [p, 0, 0, 0, 0, q, 0]
    y = [row["kx"] + row["k0"] * p, *(row[k] for k in ("ky", "k1", "k2", "k3")), row["k0"] * q, 0]
    plus = [row["b0"] * p, 0, row["b1"], row["b2"], 0, row["b0"] * q, row["c"]]
    assert [state.m1 for state in got] == m0
    assert [state.y for state in got] == y
    assert [state.x for state in got] == [a * y_i + b for y_i, b in zip(y, plus, strict=True)]
    assert [(state.m2, state.m3) for state in got] == [(u[2], u[3]) for u in units]
    assert got[0].x.dtype == np.float64
    rows = solvers.make("ddim", SD, 3).rows(np.float64)
    of_numpy, of_jax = sampler.columns(rows[0]), sampler.columns(jnp.asarray(rows)[0])
    assert of_numpy == {name: pytest.approx(value) for name, value in of_jax.items()}
    assert sampler.columns(rows, ndim=3)["t"].shape == (3, 1, 1, 1)


def test_the_loop_remembers_what_went_before():
    # A network that predicts its timestep as x0, and rows that return one thing of the history.
    def tell(params, x_BHWC, t_B, cond):
        return jnp.zeros_like(x_BHWC) + t_B[:, None, None, None]

    function = sampler.make_sampler(tell, SHAPE)
    returns = {"a": 0.0, "b0": 0.0, "kx": 0.0, "keeps_signal": False, "keeps_noise": False}
    for columns, wanted in (
        ({"b0": 1.0}, 10), ({"b1": 1.0}, 20), ({"b2": 1.0}, 30), ({"a": 1.0, "k0": 1.0}, 10),
        ({"a": 1.0, "k1": 1.0}, 20), ({"a": 1.0, "k2": 1.0}, 30), ({"a": 1.0, "k3": 1.0}, 40),
        ({"a": 1.0, "ky": 1.0, "k0": [1, 0, 0, 0]}, 40),  # the first y, handed on
    ):
        columns = {
            name: np.broadcast_to(value, 4) if name not in ("keeps_signal", "keeps_noise")
            else value for name, value in {**returns, **columns}.items()
        }
        table = SamplerTable(
            name="history", t=[40, 30, 20, 10], p=np.zeros(4), q=np.ones(4), **columns,
            alpha=np.ones(5), sigma=np.zeros(5),
        )
        assert np.all(sample(table, None, [0, 1], function) == wanted), columns


def by_hand(table, rates_R, index):
    """Row by row outside of the loop, each at its own guidance rate."""
    index = jnp.asarray(index)
    state = State.start(sampler.initial_noise(KEY, index, SHAPE))
    for r in range(table.calls):
        row = {column: np.float32(getattr(table, column)[r]) for column in COLUMNS}
        t_B = jnp.full(len(index), row["t"])
        F_c = network(PARAMS, state.x, t_B, {"context": CONTEXT[index]})
        F_u = network(PARAMS, state.x, t_B, {"context": jnp.zeros((len(index), 7, 5))})
        noise = sampler.row_noise(KEY, index, r, SHAPE)
        state = sampler.update(row, state, F_u + rates_R[r] * (F_c - F_u), noise)
    return np.asarray(state.x)


@pytest.mark.parametrize("spec", ["ddim", "heun", "dpmpp_2s:midpoints=true", "dpmpp_3m_sde"])
def test_guidance_interval(spec):
    """Guidance between two noise levels is guidance in those rows and none in the others."""
    index, low, high = np.arange(4), 0.4, 4.0
    plain = solvers.make(spec, SD, 6, "v", "trailing")
    table = solvers.make(
        spec, SD, 6, "v", "trailing", guidance_low=low, guidance_high=high
    )
    noise_R = plain.sigma[:-1] / plain.alpha[:-1]
    inside_R = (noise_R >= low) & (noise_R <= high)
    assert 0 < inside_R.sum() < plain.calls
    wanted = by_hand(plain, np.where(inside_R, 5.0, 1.0), index)
    np.testing.assert_allclose(sample(table, 5.0, index), wanted, atol=1e-4)
    assert np.abs(sample(plain, 5.0, index) - wanted).max() > 0.1


def test_each_row_may_have_its_own_share_of_the_guidance():
    table = solvers.make("dpmpp_2m", SD, 5, "v")
    weights_R = np.array([0.0, 0.5, 1.0, 2.0, -1.0])
    wanted = by_hand(table, 1 + weights_R * 3.0, np.arange(4))
    got = sample(table.with_guidance(weights_R), 4.0, np.arange(4))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_rescaled_guidance_has_the_conditional_outputs_spread():
    rng = np.random.default_rng(0)
    guided, conditional = rng.normal(size=(2, 3, 8, 8, 4)) * [[[[[2.0]]]], [[[[0.5]]]]]

    def spread(F):
        return F.std(axis=(1, 2, 3))

    full = Correction(rescale=1.0).output(guided, conditional)
    np.testing.assert_allclose(spread(full), spread(conditional), rtol=1e-5)
    half = Correction(rescale=0.5).output(guided, conditional)
    np.testing.assert_allclose(half, (guided + full) / 2, rtol=1e-5, atol=1e-6)
    assert guidance_lib.NONE.output(guided, conditional) is guided


def test_an_output_without_spread_is_not_rescaled():
    """As a network's is whose last layer is still zero: neither it nor its slope is NaN."""
    zero, some = np.zeros((4, 4, 3), "f4"), np.random.default_rng(1).normal(size=(4, 4, 3))
    guided, conditional = np.stack([zero, zero, some]), np.stack([zero, some, zero])

    def total(*F):
        out = Correction(rescale=0.5).output(*F)
        return out.sum(), out

    slopes, out = jax.grad(total, (0, 1), has_aux=True)(guided, conditional)
    np.testing.assert_allclose(out, np.stack([zero, zero, some / 2]), rtol=1e-6)
    assert np.isfinite(slopes).all()


def test_thresholding_clips_each_sample_at_its_own_quantile():
    x0 = np.random.default_rng(0).normal(size=(3, 8, 8, 4)) * [[[[0.1]]], [[[2.0]]], [[[9.0]]]]
    got = np.asarray(Correction(threshold=0.9, threshold_max=5.0).x0(x0))
    assert np.abs(got).max() <= 1 + 1e-6
    np.testing.assert_allclose(got[0], x0[0], rtol=1e-6)  # within [-1, 1] it stays
    s = np.quantile(np.abs(x0[1]), 0.9)
    np.testing.assert_allclose(got[1], np.clip(x0[1], -s, s) / s, rtol=1e-5)
    np.testing.assert_allclose(got[2], np.clip(x0[2], -5, 5) / 5, rtol=1e-5)


def test_corrections_act_in_the_loop():
    """A table brings its own: one sampler runs them all, each as it says."""
    index = np.arange(4)
    plain = sample(solvers.make("ddim", SD, 3, "v"), 6.0, index)
    for spec in ("ddim:rescale=0.7", "ddim:threshold=0.9"):
        table = solvers.make(spec, SD, 3, "v")
        assert np.abs(sample(table, 6.0, index) - plain).max() > 0.01
    assert np.abs(sample(solvers.make("ddim", SD, 3, "v"), 6.0, index) - plain).max() == 0
    # A step to no noise is x0; clipped to [-1, 1] where the bound is 1, whatever the quantile.
    function = sampler.make_sampler(lambda params, x, t, cond: 9 * x, SHAPE)

    def x0(spec):
        table = solvers.make(spec, SD, 1, "x0", "trailing", final="zero")
        return np.abs(sample(table, None, index, function))

    assert x0("ddim").max() > 20
    for spec, clipped in (("ddim:threshold=0.5", 0.5), ("ddim:threshold=0.5,threshold_max=1", 0.9)):
        assert x0(spec).max() == 1 and np.mean(x0(spec) == 1) == pytest.approx(clipped, abs=0.03)
    for option, message in (
        ({"rescale": 1.5}, "rescale=1.5"), ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": 0.9, "threshold_max": 0.5}, "threshold_max=0.5: give 1 or more"),
        ({"threshold_max": 2.0}, "does nothing without threshold"),
    ):
        with pytest.raises(UserError, match=message):
            solvers.make("ddim", SD, 3, "v", **option)


def test_lists_of_numbers_and_rates_are_arrays():
    table = solvers.make("ddim", SD, 3).padded()
    args = {"context": CONTEXT[:2]}, EMPTY, KEY
    wanted = SAMPLE(PARAMS, table, jnp.array([3.0, 2.0]), *args, jnp.array([4, 9]))
    np.testing.assert_array_equal(SAMPLE(PARAMS, table, [3.0, 2.0], *args, [4, 9]), wanted)


@pytest.mark.parametrize("guided", [False, True])
def test_an_output_that_would_be_broadcast_is_refused(guided):
    def denoise(params, x_BHWC, t_B, cond):
        return x_BHWC[:, :1, :1, :1]

    cond, table = {"context": CONTEXT[:2]}, solvers.make("ddim", SD, 3)
    more = (jnp.ones(2), EMPTY) if guided else (None, None)
    rows = 4 if guided else 2
    told = rf"gives \({rows}, 1, 1, 1\) for x_BHWC of shape \({rows}, 8, 8, 4\)"
    with pytest.raises(UserError, match=told):
        sampler.make_sampler(denoise, SHAPE)(
            None, table.padded(), more[0], cond, more[1], KEY, jnp.arange(2)
        )
    with pytest.raises(UserError, match=told):
        sampler.trajectory(denoise, None, table, jnp.ones((2, *SHAPE)), cond, *more)


def test_user_errors():
    arrays = solvers.make("ddim", SD, 3).padded()
    index, cond = jnp.arange(2), {"context": CONTEXT[:2]}
    w_B = jnp.ones(2)
    for args, message in (
        ((w_B, cond, None, KEY, index), "both guidance_B and uncond"),
        ((None, cond, EMPTY, KEY, index), "both guidance_B and uncond"),
        ((jnp.ones(3), cond, EMPTY, KEY, index), r"guidance_B \(3,\)"),
        ((1.0, cond, EMPTY, KEY, index), r"guidance_B \(\)"),
        ((w_B, {"context": 3.0}, EMPTY, KEY, index), r"cond\['context'\] \(\)"),
        ((w_B, cond, {"context": 0.0}, KEY, index), r"uncond's has \(\): give \(1, 7, 5\)"),
        ((w_B, {"context": CONTEXT[:3]}, EMPTY, KEY, index), r"cond\['context'\] \(3, 7, 5\)"),
        ((w_B, cond, {"context": jnp.zeros((1, 6, 5))}, KEY, index), r"give \(1, 7, 5\)"),
        ((w_B, cond, {}, KEY, index), "uncond is empty, .* or a weaker network"),
        ((w_B, cond, {"contxt": EMPTY["context"]}, KEY, index),
         "cond holds .*'context'.*, but uncond .*'contxt'"),
    ):
        with pytest.raises(UserError, match=message):
            SAMPLE(PARAMS, arrays, *args)
    with pytest.raises(UserError, match=r"a SamplerTable, not a Padded: give table.padded\(\)"):
        SAMPLE(PARAMS, solvers.make("ddim", SD, 3), w_B, cond, EMPTY, KEY, index)
