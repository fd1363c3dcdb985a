"""Every solver on interpolants that are not variance-preserving: only the SNR decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, sampler, solvers
from tests.sampling import analytic
from tests.sampling.analytic import MIXTURE, QUANTILES, prediction_of, run
from tests.sampling.test_solvers import DISTILLED, SPECS

SD, FLOW = schedule.get("sd"), schedule.get("flow")


def rescaled(name, given, scale):
    return schedule.Schedule(name, scale * given.alpha, scale * given.sigma)


OTHERS = (
    rescaled("exploding", SD, 1 / SD.alpha), rescaled("straight", SD, 1 / (SD.alpha + SD.sigma)),
    rescaled("waves", SD, np.exp(np.sin(np.arange(1000) / 90))),
)
# Flow matching's noise levels, variance preserving.
ROUND = rescaled("round", FLOW, 1 / np.hypot(FLOW.alpha, FLOW.sigma))
# LCM and CoDi mix x itself into x0, so they are of one scale.
SPECS = [spec for spec in SPECS if spec not in DISTILLED]


def assert_same_ends(one, other, prediction="x0"):
    """From the same noise on, up to the scale of the last node."""
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal(9), rng.standard_normal((one.calls, 9))
    network = prediction_of(prediction, MIXTURE.x0)
    ends = [
        run(table, network, table.s[0] * z, lambda r: noise[r]).x
        / np.hypot(table.alpha[-1], table.sigma[-1])
        for table in (one, other)
    ]
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9, atol=1e-9, err_msg=other.name)


@pytest.mark.parametrize("spec", SPECS)
def test_a_rescaled_schedule_has_the_rescaled_trajectory(spec):
    for steps, spacing, final in (
        (1, "trailing", "abar_0"), (7, "leading", "abar_0"), (6, "karras", "zero"),
        (16, "trailing", "zero"),
    ):
        tables = [
            solvers.make(spec, s, steps, "x0", spacing, final=final) for s in (SD, *OTHERS)
        ]
        if "final_noise" in spec and spacing == "karras":
            continue  # it asks whether the last timestep is 0, which is here up to rounding
        assert tables[1].s[0] > 4 and tables[0].s[0] == pytest.approx(1, abs=1e-15)
        for other in tables[1:]:
            assert_same_ends(tables[0], other)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "bh1" not in spec])
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_flow_matching_is_a_rescaled_diffusion(spec, prediction):
    """From pure noise on. (UniPC's bh1 does not leave it.)"""
    for steps in (1, 4, 13):
        tables = [solvers.make(spec, s, steps, prediction, "trailing") for s in (FLOW, ROUND)]
        assert_same_ends(*tables, prediction)


@pytest.mark.parametrize("name", ["flow", "flow:shift=3"])
def test_ddim_on_the_straight_line_is_eulers_method_for_the_flow(name):
    """x + (s' - s) u, to the last digits, for any outputs u and any nodes."""
    given, rng = schedule.get(name), np.random.default_rng(0)
    for spec, spacing in (("ddim", "trailing"), ("euler", "linspace"), ("dpmpp_1s", "trailing"),
                          ("euler", "timesteps:999,612.25,3.5")):
        steps = 3 if "timesteps" in spacing else 28
        table = solvers.make(spec, given, steps, "flow", spacing, final="zero")
        u = rng.standard_normal((steps, 5))
        x = z = rng.standard_normal(5)
        for s, s1, velocity in zip(table.sigma[:-1], table.sigma[1:], u):
            x = x + (s1 - s) * velocity
        outputs = iter(u)
        got = run(table, lambda *_, outputs=outputs: next(outputs), z).x
        np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-13)
        if spacing == "trailing" and 1000 % steps == 0:
            np.testing.assert_allclose(np.diff(table.sigma), -1 / steps)


@pytest.mark.parametrize("name", ["flow", "sd", "edm"])
def test_heun_over_the_line_is_of_second_order(name):
    given, errors = schedule.get(name), []
    for steps in (60, 120, 240):
        spacing = "karras" if name == "edm" else "linspace"
        table = solvers.make("heun:over=line", given, steps, "x0", spacing, final="abar_0")
        state = analytic.start(MIXTURE.quantile(QUANTILES, table.alpha[0], table.sigma[0]))
        x = run(table, MIXTURE.x0, state).x
        exact = MIXTURE.quantile(QUANTILES, table.alpha[-1], table.sigma[-1])
        errors.append(np.abs(x - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(orders[-1] - 2) < 0.2, (orders, errors)


def test_heun_over_either_is_the_same_at_constant_signal():
    for steps in (3, 10):
        tables = [
            solvers.make(spec, OTHERS[0], steps, "v", "trailing", final="abar_0")
            for spec in ("heun", "heun:over=line")
        ]
        np.testing.assert_allclose(tables[0].rows(), tables[1].rows(), rtol=1e-6)
    assert solvers.make("heun:over=line", FLOW, 5, "flow", "trailing").calls == 9
    with pytest.raises(UserError, match="over='time': choose one of noise, line"):
        solvers.make("heun:over=time", SD, 5)


def test_samples_start_from_the_first_nodes_scale():
    """A network that says x0 = 0 leaves a sample its noise alone."""
    def denoise(params, x_BHWC, t_B, cond):
        return 0 * x_BHWC

    sample, key, index = sampler.make_sampler(denoise, (2, 2, 1)), jax.random.key(0), jnp.arange(3)
    z_BHWC = sampler.initial_noise(key, index, (2, 2, 1))
    for given in (SD, *OTHERS):
        table = solvers.make("ddim", given, 4, "x0", "trailing", final="abar_0")
        got = sample(None, table.padded(4), None, {}, None, key, index)
        scale = np.hypot(given.alpha[-1], given.sigma[-1]) / given.sigma[-1] * given.sigma[0]
        np.testing.assert_allclose(got, scale * z_BHWC, rtol=1e-5)


def test_spacings_that_do_not_fit():
    for spacing, message in (
        ("leading", "ends in pure noise at t=999, but leading .* use spacing 'trailing'"),
        ("karras", "have no highest on schedule 'flow'"), ("ays", "no highest"),
    ):
        with pytest.raises(UserError, match=message):
            solvers.make("ddim", FLOW, 5, "flow", spacing)
    with pytest.raises(UserError, match="ays spacing is Stable Diffusion's, but schedule 'edm'"):
        solvers.make("ddim", schedule.get("edm"), 5, "v", "ays")
    with pytest.raises(UserError, match="'v' or 'x0' or 'flow'"):
        solvers.make("ddim", FLOW, 5, "epsilon", "trailing")


def test_grids_without_a_schedule_stay_on_their_own_curve():
    for alpha, sigma, size in (
        ([0.3, 0.6, 1], [0.7, 0.4, 0], lambda a, s: a + s), ([1, 1, 1], [9, 2, 0], lambda a, s: a),
    ):
        middle = grid.Grid([2, 1], alpha, sigma, "mine").with_midpoints()
        assert middle.steps == 3
        np.testing.assert_allclose(size(middle.alpha, middle.sigma), 1)
        np.testing.assert_allclose(middle.noise[1] ** 2, middle.noise[0] * middle.noise[2])
