"""The consistency function: the identity at the smallest noise, and diffusers' own elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import consistency, parameterization, schedule
from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.errors import UserError

SD = schedule.get("sd")
RNG = np.random.default_rng(0)
Z, F = RNG.standard_normal((2, 5, 2, 3, 4)).astype(np.float32)


def network(params, x_BHWC, t_B, cond):
    return params


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
def test_it_is_the_identity_at_the_smallest_noise_whatever_the_network_says(prediction):
    nodes = Nodes.of(SD, prediction)
    out = consistency.function(network, 1e3 * F, Z, jnp.zeros(5, int), {}, nodes)
    np.testing.assert_array_equal(out, Z)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_it_is_what_lcm_denoises_to(prediction):
    schedulers = pytest.importorskip(
        "diffusers.schedulers", reason="compares with diffusers: pip install -e '.[parity]'"
    )
    import torch

    name = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    peer = schedulers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type=name,
    )
    peer.set_timesteps(50)
    t_B = np.array([999, 759, 259, 39, 19])
    nodes = Nodes.of(SD, prediction)
    got = consistency.function(network, jnp.asarray(F), jnp.asarray(Z), t_B, {}, nodes)
    for i, t in enumerate(t_B):
        theirs = peer.step(torch.from_numpy(F[i]), int(t), torch.from_numpy(Z[i])).denoised
        # x0 of eps is divided by alpha, 0.07 at the most noise, in float32 on both sides.
        np.testing.assert_allclose(got[i], theirs.numpy(), rtol=0, atol=3e-5)


def test_nodes_read_what_they_noised():
    """x0 and eps come back from x and the output that a perfect network has."""
    x0, eps = Z.astype(np.float64), F.astype(np.float64)
    i_B = np.array([3, 200, 500, 700, 990])
    alpha, sigma = (a[i_B].reshape(-1, 1, 1, 1) for a in (SD.alpha, SD.sigma))
    for prediction in parameterization.PREDICTIONS:
        nodes = Nodes.of(SD, prediction)
        x = nodes.noisy(jnp.asarray(Z), jnp.asarray(F), i_B)
        np.testing.assert_allclose(x, alpha * x0 + sigma * eps, atol=1e-6)
        right = parameterization.target(prediction, x0, eps, alpha, sigma).astype(np.float32)
        np.testing.assert_allclose(nodes.x0(x, jnp.asarray(right), i_B), x0, atol=2e-5)
        np.testing.assert_allclose(nodes.eps(x, jnp.asarray(right), i_B), eps, atol=2e-5)


def test_a_prediction_that_the_schedule_rules_out():
    with pytest.raises(UserError, match="alpha = 0"):
        Nodes.of(schedule.get("sd_zero_snr"), "epsilon")
    with pytest.raises(UserError, match="unknown prediction 'noise'"):
        Nodes.of(SD, "noise")
