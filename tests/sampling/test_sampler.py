"""The jitted loop: one trace for all, images that do not depend on their batch, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, sampler, solvers
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


def test_sixty_tables_and_four_guidance_rates_are_one_trace():
    traces = []

    def counted(*args):
        traces.append(1)
        return network(*args)

    function = sampler.make_sampler(counted, SHAPE)
    outcomes = set()
    first = None
    for name in solvers.SOLVERS:
        for spacing in grid.SPACINGS:
            for steps in (1, 2, 5, 12):
                table = solvers.make(name, SD, steps, "v", spacing)
                out = sample(table, (1.5, 3, 5, 8)[steps % 4], [0, 1], function)
                assert np.all(np.isfinite(out))
                outcomes.add(out.tobytes())
                first = first or len(traces)
    assert len(traces) == first
    assert function._cache_size() == 1
    # DDIM, DPM++1 and DDPM coincide on a few grids, above all at a single step.
    assert len(outcomes) > 40


@pytest.mark.parametrize("name", ["ddim", "ddpm_large", "dpmpp_2m"])
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
        np.testing.assert_allclose(outcome, SD.alpha[999] * start, rtol=1e-6)


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
    both = sampler.with_unconditional({"context": CONTEXT[:4]}, EMPTY)
    x_BHWC = sampler.initial_noise(KEY, jnp.arange(4), SHAPE)
    t_B = jnp.full(4, 300.0)
    F_c = network(PARAMS, x_BHWC, t_B, {"context": CONTEXT[:4]})
    F_u = network(PARAMS, x_BHWC, t_B, {"context": jnp.zeros((4, 7, 5))})
    w_B = jnp.array([0.0, 1.0, 2.0, 7.5])
    got = sampler.guided(network, PARAMS, x_BHWC, jnp.float32(300), both, w_B)
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
    both = sampler.with_unconditional(cond, {**EMPTY, "low": cond["low"]})
    assert both["low"].ravel().tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(both["context"][::2], CONTEXT[:3])
    assert not both["context"][1::2].any()


def test_update_is_the_row_equation_in_any_precision():
    row = dict(zip(COLUMNS, (0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0), strict=True))
    units = np.eye(5)
    # Coefficient by coefficient, from unit inputs (x, F, m1, m2, noise).
    got = [sampler.update(row, *unit) for unit in units]
    assert [m0 for _, m0 in got] == [2, 3, 0, 0, 0]
    assert [x for x, _ in got] == [5 + 7 * 2, 7 * 3, 11, 13, 17]
    assert sampler.update(row, *units.astype(np.float64))[0].dtype == np.float64


def test_the_loop_remembers_the_two_x0_before():
    # A network that predicts its timestep as x0, and rows that return one x0 of the history.
    def tell(params, x_BHWC, t_B, cond):
        return jnp.zeros_like(x_BHWC) + t_B[:, None, None, None]

    function = sampler.make_sampler(tell, SHAPE)
    zeros, ones = np.zeros(4), np.ones(4)
    for column, x0 in (("b0", 10), ("b1", 20), ("b2", 30)):
        columns = {"p": zeros, "q": ones, "a": zeros, "b0": zeros, "b1": zeros, "b2": zeros,
                   "c": zeros} | {column: ones}
        table = SamplerTable(
            "history", t=[40, 30, 20, 10], **columns, alpha=np.ones(5), sigma=np.zeros(5)
        )
        assert np.all(sample(table, None, [0, 1], function) == x0)


def test_user_errors():
    arrays = solvers.make("ddim", SD, 3).padded()
    index, cond = jnp.arange(2), {"context": CONTEXT[:2]}
    w_B = jnp.ones(2)
    for args, message in (
        ((w_B, cond, None, KEY, index), "both guidance_B and uncond"),
        ((None, cond, EMPTY, KEY, index), "both guidance_B and uncond"),
        ((jnp.ones(3), cond, EMPTY, KEY, index), r"guidance_B \(3,\)"),
        ((w_B, {"context": CONTEXT[:3]}, EMPTY, KEY, index), r"cond\['context'\] \(3, 7, 5\)"),
        ((w_B, cond, {"context": jnp.zeros((1, 6, 5))}, KEY, index), r"give \(1, 7, 5\)"),
    ):
        with pytest.raises(UserError, match=message):
            SAMPLE(PARAMS, arrays, *args)
