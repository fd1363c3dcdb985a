"""The schedule against its published constants, and zero terminal SNR."""

import numpy as np
import pytest

from ldm_scaling.config import Diffusion, named
from ldm_scaling.config.named import Named, Option
from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers


def test_sd_has_the_published_constants():
    # Printed digits of Stable Diffusion's schedule, computed by others from its config.
    sd = schedule.get("sd")
    assert sd.num_timesteps == 1000
    abar = sd.alpha**2
    np.testing.assert_allclose(abar[[0, 1, 999]], [0.99915, 0.998296, 0.0046601], rtol=1e-5)
    ve_sigma = sd.sigma / sd.alpha
    np.testing.assert_allclose(ve_sigma[[0, -1]], [0.029167, 14.6146], rtol=1e-4)
    log_noise = schedule.log_noise(sd.noise)  # Of sigma / alpha: half log-SNR, its sign turned.
    np.testing.assert_allclose(log_noise[[0, -1]], [-3.5347, 2.6820], atol=5e-5)
    np.testing.assert_allclose(sd.alpha[-1], 0.0683, atol=5e-5)


def test_variance_preserving_and_half_log_snr():
    for name in ("sd", "sd_zero_snr"):
        s = schedule.get(name)
        np.testing.assert_allclose(s.alpha**2 + s.sigma**2, 1, rtol=1e-15)
        assert np.all(np.diff(schedule.log_noise(s.noise)) > 0)
    assert schedule.get("sd").alpha.dtype == np.float64


def test_zero_terminal_snr_moves_the_end_and_keeps_the_start():
    sd, zero = schedule.get("sd"), schedule.get("sd_zero_snr")
    assert zero.alpha[-1] == 0 and zero.zero_terminal_snr
    assert schedule.log_noise(zero.noise)[-1] == np.inf
    assert not sd.zero_terminal_snr
    np.testing.assert_allclose(zero.alpha[0], sd.alpha[0], rtol=1e-15)
    # Affine in the signal scale: second differences shrink by one common factor.
    ratio = np.diff(zero.alpha) / np.diff(sd.alpha)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_betas_match_diffusers():
    schedulers = pytest.importorskip(
        "diffusers.schedulers", reason="parity needs: pip install -e '.[parity]'"
    )
    for name, theirs in (
        ("linear", {"beta_schedule": "linear"}), ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("linear:beta_end=0.01", {"beta_schedule": "linear", "beta_end": 0.01}),
        ("sd:beta_end=0.02", {"beta_schedule": "scaled_linear", "beta_start": 0.00085}),
    ):
        given = schedule.get(name)
        peer = schedulers.DDPMScheduler(**{"beta_start": 1e-4, "beta_end": 0.02} | theirs)
        abar = given.alpha**2
        betas = 1 - abar / np.append(1, abar[:-1])
        np.testing.assert_allclose(betas, peer.betas.double(), rtol=1e-5)
        assert given.name == name
    assert schedule.get("sd:beta_end=0.0120").name == "sd"


def test_both_schedules_match_diffusers():
    pytest.importorskip("diffusers", reason="parity needs: pip install -e '.[parity]'")
    from diffusers.schedulers import DDIMScheduler

    for name, rescale in (("sd", False), ("sd_zero_snr", True)):
        peer = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            rescale_betas_zero_snr=rescale,
        )
        ours, theirs = schedule.get(name).alpha ** 2, peer.alphas_cumprod.double().numpy()
        # Theirs is built in float32.
        np.testing.assert_allclose(ours, theirs, rtol=5e-6, atol=1e-8)


def test_between_timesteps():
    """sigma / alpha is linear; from the last that is finite to pure noise alpha / sigma is."""
    sd, zero = schedule.get("sd"), schedule.get("sd_zero_snr")
    alpha, sigma = sd.at([0.25, 700.0, 998.5])
    wanted = [0.75 * sd.noise[0] + 0.25 * sd.noise[1], sd.noise[700], sd.noise[-2:].mean()]
    np.testing.assert_allclose(sigma / alpha, wanted, rtol=1e-12)
    t = np.array([997.5, 998.0, 998.25, 998.999, 999.0])
    with np.errstate(all="raise"):
        alpha, sigma = zero.at(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    last = zero.alpha[-2] / zero.sigma[-2]
    np.testing.assert_allclose((alpha / sigma)[1:], last * (999 - t[1:]), rtol=1e-9)
    np.testing.assert_allclose(sigma[0] / alpha[0], zero.noise[-3:-1].mean(), rtol=1e-12)
    noise = schedule.noise_level(alpha[1:], sigma[1:])  # And back.
    with np.errstate(all="raise"):
        np.testing.assert_allclose(zero.timestep_at(noise), t[1:], rtol=1e-12)


def test_is_frozen():
    sd = schedule.get("sd")
    with pytest.raises(ValueError):
        sd.alpha[0] = 0
    with pytest.raises(AttributeError):
        sd.name = "other"


@pytest.mark.parametrize(
    ("abar", "message"),
    [
        ([0.9, 0.5, 0.5], "must rise at every .* at t=1 to .* at t=2"),
        ([1.2, 0.5], "0.5 to 1.2"),
        ([0.5, np.nan], "nan"),
        ([[0.5]], r"shape \(1, 1\)"),
        ([], "shape"),
    ],
)
def test_refuses_what_is_no_schedule(abar, message):
    with pytest.raises(UserError, match=message):
        schedule.variance_preserving("mine", np.array(abar))


def test_a_schedule_of_ones_own(monkeypatch):
    """The table is the one that configs are checked against, and it names what is made."""
    assert schedule.SCHEDULES is named.SCHEDULES

    def tan(end):
        angle_T = np.linspace(0.01, end, 500)
        return schedule.Schedule("", np.cos(angle_T), np.sin(angle_T))

    monkeypatch.setitem(schedule.SCHEDULES, "tan", Named(tan, {"end": Option(1.5, 0.01, 1.57)}))
    assert Diffusion(schedule="tan:end=1.50").schedule == schedule.get("tan").name == "tan"
    other = schedule.get("tan:end=1.2")
    assert other.name == "tan:end=1.2" and other.num_timesteps == 500
    np.testing.assert_allclose(other.noise[-1], np.tan(1.2))
    assert solvers.make("dpmpp_2m", other, 10, "v").calls == 10
    with pytest.raises(UserError, match="end='2': give a number between 0.01 and 1.57"):
        Diffusion(schedule="tan:end=2")


def test_user_errors():
    with pytest.raises(UserError, match="choose one of sd, sd_zero_snr, linear, cosine, flow, edm"):
        schedule.get("sigmoid")
    with pytest.raises(UserError, match="beta_start=0.03, beta_end=0.02: needs"):
        schedule.get("linear:beta_start=0.03")
    with pytest.raises(UserError, match="num_timesteps=0"):
        schedule.cosine(0)
    with pytest.raises(UserError, match="'flow' has alpha.2 . sigma.2 from 0.5 to 1"):
        schedule.zero_terminal_snr(schedule.get("flow"))
    with pytest.raises(UserError, match="beta_start=0.5"):
        schedule.sd(beta_start=0.5)
    with pytest.raises(UserError, match="one timestep"):
        schedule.zero_terminal_snr(schedule.sd(num_timesteps=1))
