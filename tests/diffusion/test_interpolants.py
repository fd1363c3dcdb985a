"""Schedules other than variance-preserving ones: rectified flow, EDM, and any of one's own."""

import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.errors import UserError

SD, FLOW = schedule.get("sd"), schedule.get("flow")
REASON = "parity needs: pip install -e '.[parity]'"


def test_flow_is_straight_and_ends_in_pure_noise():
    for shift in (0.5, 1.0, 3.0):
        s = schedule.flow(shift=shift)
        np.testing.assert_allclose(s.alpha + s.sigma, 1, rtol=1e-15)
        assert s.straight and s.zero_terminal_snr and s.sigma[-1] == 1 and s.sigma[0] > 0
        assert not schedule.get("edm").straight and not SD.straight
        # The shift multiplies every noise level (Esser et al. 2024, eq. 23).
        np.testing.assert_allclose(s.noise[:-1], shift * FLOW.noise[:-1], rtol=1e-12)
    assert schedule.get("flow:shift=1").name == "flow" != schedule.get("flow:shift=3").name


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_what_diffusers_trains_at(shift):
    schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)
    peer = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    s = schedule.get(f"flow:shift={shift}")
    np.testing.assert_allclose(s.sigma[::-1], peer.sigmas.numpy(), rtol=2e-6)
    assert len(peer.sigmas) == s.num_timesteps


def test_edm_has_its_noise_levels_and_its_c_in():
    schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)
    for options in ({}, {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0}):
        peer = schedulers.EDMEulerScheduler(**options)
        peer.set_timesteps(1000)
        name = ",".join(f"{option}={value}" for option, value in options.items())
        edm = schedule.get("edm" + (":" + name if name else ""))
        sigmas, data = peer.sigmas.numpy()[:-1][::-1], peer.config.sigma_data
        np.testing.assert_allclose(edm.noise * data, sigmas, rtol=2e-6)
        # alpha x0 + sigma eps of unit variance is c_in of x0 data + sigma eps.
        c_in = peer.precondition_inputs(1.0, peer.sigmas.double()).numpy()[:-1][::-1]
        np.testing.assert_allclose(edm.alpha, c_in * data, rtol=2e-6)
        np.testing.assert_allclose(edm.sigma, c_in * sigmas, rtol=2e-6)


@pytest.mark.parametrize("sign", ["epsilon", "v_prediction"])
def test_v_of_edm_is_its_preconditioned_output(sign):
    """x0 = c_skip x + c_out F, where diffusers' "v_prediction" is ours and F's sign is free."""
    schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)
    torch = pytest.importorskip("torch", reason=REASON)
    peer = schedulers.EDMEulerScheduler(prediction_type=sign)
    edm, data = schedule.get("edm"), peer.config.sigma_data
    x, F = np.random.default_rng(0).standard_normal((2, 1000))
    p, q = parameterization.x0_coefficients("v", edm.alpha, edm.sigma)
    sigma = torch.from_numpy(edm.noise * data)
    theirs = peer.precondition_outputs(torch.from_numpy(x * data / edm.alpha), F, sigma).numpy()
    ours = p * x + q * (F if sign == "v_prediction" else -F)
    np.testing.assert_allclose(data * ours, theirs, rtol=1e-10, atol=1e-12)


def test_nodes_between_timesteps():
    exploding = schedule.Schedule("exploding", np.ones(1000), SD.noise)
    scale = np.exp(np.linspace(0.3, -0.2, 1000))
    rescaled = schedule.Schedule("rescaled", scale * SD.alpha, scale * SD.sigma)
    noise = np.array([0.05, 1.3, 8.9])
    for one, size in (
        (SD, lambda a, s: a**2 + s**2), (FLOW, lambda a, s: a + s), (exploding, lambda a, s: a),
    ):
        alpha, sigma = one.at_noise(noise)
        np.testing.assert_allclose(sigma / alpha, noise)
        np.testing.assert_allclose(size(alpha, sigma), 1, rtol=1e-14)
        t = one.timestep_at(noise)
        below, above = (one.noise[f(t).astype(int)] for f in (np.floor, np.ceil))
        assert np.all((below < noise) & (noise < above))
    alpha, sigma = rescaled.at_noise(noise)
    np.testing.assert_allclose(sigma / alpha, noise)
    t = rescaled.timestep_at(noise)
    np.testing.assert_allclose(
        np.hypot(alpha, sigma), np.exp(np.interp(t, [0, 999], [0.3, -0.2])), rtol=1e-6
    )
    # On the straight line time itself is between, up to pure noise.
    alpha, sigma = FLOW.at([998.5, 0.25, 999])
    np.testing.assert_allclose(sigma, [0.9995, 0.00125, 1], rtol=1e-12)
    np.testing.assert_allclose(alpha, [0.0005, 0.99875, 0], atol=1e-15)
    np.testing.assert_allclose(FLOW.timestep_at(np.array([0.9995 / 0.0005, 1.0])), [998.5, 499])
    assert FLOW.timestep_at(np.inf) == 999


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
def test_predictions_on_any_interpolant(prediction):
    """A perfect output gives back x0 and eps, at (alpha, sigma) off the circle too."""
    rng = np.random.default_rng(0)
    x0, eps, alpha, sigma = *rng.standard_normal((2, 50)), *rng.uniform(0.05, 9, (2, 50))
    x = alpha * x0 + sigma * eps
    F = parameterization.target(prediction, x0, eps, alpha, sigma)
    for wanted, coefficients in (
        (x0, parameterization.x0_coefficients), (eps, parameterization.eps_coefficients),
    ):
        p, q = coefficients(prediction, alpha, sigma)
        np.testing.assert_allclose(p * x + q * F, wanted, atol=1e-11)


def test_flow_prediction_is_the_velocity():
    x0, eps, s, ds = 0.7, -1.9, 0.4, 1e-6
    ahead, behind = ((1 - a) * x0 + a * eps for a in (s + ds, s - ds))
    u = parameterization.target("flow", x0, eps, 1 - s, s)
    np.testing.assert_allclose(u, (ahead - behind) / (2 * ds), rtol=1e-8)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [([1, 1], [0.2, 0.1], "must rise at every timestep, but goes from 0.2 at t=0 to 0.1 at t=1"),
     ([1, 0, 0], [0.1, 1, 1], "from inf at t=1 to inf at t=2"), ([1, 0.5], [0.1], "sigma"),
     ([1, 0], [0.1, 0], "not both 0"), ([1, -1], [0.1, 1], "alpha runs from -1"),
     ([1, 1], [0.1, np.inf], "sigma runs from 0.1 to inf")],
)
def test_refuses_what_is_no_schedule(alpha, sigma, message):
    with pytest.raises(UserError, match=message):
        schedule.Schedule("mine", alpha, sigma)


@pytest.mark.parametrize(
    ("name", "message"),
    [("flo", "did you mean 'flow'"), ("flow:shift=0", "shift='0': give a number between 0 and inf"),
     ("flow:shift", "shift='': give a number"), ("cosine:shift=3", "'cosine' has none"),
     ("flow:shift=2,shift=3", "each option once"), ("edm:rho=7", "has sigma_min=0.002, sigma_max"),
     ("edm:sigma_min=90", "0 < sigma_min < sigma_max"), ("flow:shift=inf", "between 0 and inf")],
)
def test_mistakes_in_a_name(name, message):
    with pytest.raises(UserError, match=message):
        schedule.get(name)
    with pytest.raises(UserError, match="flow schedule with num_timesteps=0"):
        schedule.flow(0)
