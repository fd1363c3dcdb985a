"""Which timesteps are drawn: quantiles and whole draws against diffusers' densities."""

from unittest import mock

import jax
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import ks_2samp, kstest, norm

from ldm_scaling.config import Diffusion, named
from ldm_scaling.config.named import Named, Option
from ldm_scaling.diffusion import loss, schedule, timesteps
from ldm_scaling.errors import UserError

REASON = "parity needs: pip install -e '.[parity]'"
FLOW, EDM = schedule.get("flow"), schedule.get("edm")
U = (np.arange(500) + 0.5) / 500
N = 20_000


def peers_density(scheme, u=None, **options):
    """diffusers' draws, from its own randomness or from the quantiles u of it."""
    torch = pytest.importorskip("torch", reason=REASON)
    training_utils = pytest.importorskip("diffusers.training_utils", reason=REASON)
    given = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | options
    if u is None:
        generator = torch.Generator().manual_seed(0)
        return training_utils.compute_density_for_timestep_sampling(
            scheme, N, **given, generator=generator
        ).numpy()

    def normal(mean, std, **kwargs):
        return torch.from_numpy(mean + std * ndtri(u))

    with mock.patch.object(torch, "rand", lambda **kwargs: torch.from_numpy(u)):
        with mock.patch.object(torch, "normal", normal):
            return training_utils.compute_density_for_timestep_sampling(
                scheme, len(u), **given
            ).numpy()


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_logit_normal_quantiles(mean, std):
    theirs = peers_density("logit_normal", U, logit_mean=mean, logit_std=std)
    ours = timesteps.logit_normal(U, mean=mean, std=std)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


@pytest.mark.parametrize("scale", [1.29, 0.81, -0.9])
def test_mode_quantiles(scale):
    """The peer's map falls, u from 1 to 0."""
    theirs = peers_density("mode", 1 - U, mode_scale=scale)
    ours = timesteps.mode(U, scale=scale)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)
    assert np.all(np.diff(ours) > 0)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "uniform"])
def test_draws_have_the_peers_distribution(scheme):
    t_B = np.asarray(timesteps.draw(scheme, jax.random.key(0), N, FLOW))
    assert t_B.min() >= 0 and t_B.max() <= 999 and t_B.dtype == np.int32
    theirs = np.floor(1000 * peers_density("none" if scheme == "uniform" else scheme))
    assert ks_2samp(t_B, theirs).pvalue > 1e-3


@pytest.mark.parametrize("density", timesteps.DENSITIES)
def test_draws_are_the_same_in_64_bits(density):
    key = jax.random.key(0)
    wanted = timesteps.draw(density, key, 1000, FLOW)
    with jax.enable_x64(True):
        got = timesteps.draw(density, key, 1000, FLOW)
    assert wanted.dtype == got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


def test_shifted_training_is_training_on_the_shifted_schedule():
    shifted = FLOW.sigma[timesteps.draw("shifted:shift=3", jax.random.key(0), N, FLOW)]
    other = schedule.get("flow:shift=3")
    same = other.sigma[timesteps.draw("uniform", jax.random.key(1), N, other)]
    # Between timesteps there is nothing: up to one of 1000 to either side.
    assert ks_2samp(np.round(shifted, 2), np.round(same, 2)).statistic < 0.03


def test_log_normal_noise_levels():
    t_B = timesteps.draw("log_normal", jax.random.key(0), N, EDM)
    log_sigma = np.log(EDM.noise[t_B] * 0.5)  # EDM's own sigma, of data with deviation 0.5
    np.testing.assert_allclose(log_sigma.mean(), -1.2, atol=5 * 1.2 / N**0.5)
    np.testing.assert_allclose(log_sigma.std(), 1.2, atol=5 * 1.2 / (2 * N) ** 0.5)
    # On a straight schedule a log-normal sigma / alpha is a logit-normal time.
    t_B = timesteps.draw("log_normal:mean=0.4,std=0.8", jax.random.key(0), N, FLOW)
    logit = np.log(FLOW.noise[t_B])
    assert np.abs(norm.cdf(np.sort(logit), 0.4, 0.8) - U.repeat(N // 500)).max() < 0.02


def test_the_loss_is_trained_at_them():
    seen = []

    def spy(params, x_BHWC, t_B, cond):
        seen.append(np.asarray(t_B))
        return x_BHWC

    x0_BHWC = np.zeros((N, 1, 1, 1), np.float32)
    loss.diffusion_loss(
        spy, None, x0_BHWC, {}, jax.random.key(3), FLOW, "flow", "logit_normal:mean=1,std=0.5"
    )
    s = (seen[0] + 0.5) / 1000
    np.testing.assert_allclose(np.log(s / (1 - s)).mean(), 1, atol=5 * 0.5 / N**0.5)


def test_a_density_of_ones_own(monkeypatch):
    """The table is the one that configs are checked against; t = T u^(1/power)."""
    assert timesteps.DENSITIES is named.DENSITIES
    density = timesteps.by_quantile(lambda u_B, power: u_B ** (1 / power))
    monkeypatch.setitem(timesteps.DENSITIES, "power", Named(density, {"power": Option(2.0)}))
    assert Diffusion(timesteps="power:power=2.0").timesteps == "power"
    t_B = np.asarray(timesteps.draw("power:power=3", jax.random.key(0), N, FLOW))
    assert kstest((t_B + 0.5) / 1000, lambda x: np.clip(x, 0, 1) ** 3).statistic < 0.02


@pytest.mark.parametrize(
    ("density", "message"),
    [("lognormal", "did you mean 'log_normal'"), ("logit_normal:std=0", "std='0'"),
     ("mode:scale=2", "between -1 and 1.75"), ("uniform:shift=3", "'uniform' has none"),
     ("logit_normal:0,1", "write name:option=value")],
)
def test_mistakes(density, message):
    with pytest.raises(UserError, match=message):
        timesteps.draw(density, jax.random.key(0), 4, FLOW)
    with pytest.raises(UserError, match="diffusion.timesteps.*" + message):
        Diffusion(timesteps=density)
