"""Weights of the loss: what they are in papers and peers, and that they are of one error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Diffusion, named
from ldm_scaling.config.named import Named, Option
from ldm_scaling.diffusion import loss, parameterization, schedule, weighting
from ldm_scaling.errors import UserError

REASON = "parity needs: pip install -e '.[parity]'"
SD, FLOW, EDM = (schedule.get(name) for name in ("sd", "flow", "edm"))
WEIGHTED = ("min_snr", "min_snr:gamma=1", "snr", "sigma_sqrt", "cosmap", "p2:gamma=0.5", "debiased")


def test_min_snr_as_published():
    """Hang et al. 2023, section 3.4: what the loss of each prediction is multiplied by."""
    snr = SD.alpha**2 / SD.sigma**2
    least = np.minimum(snr, 5)
    for prediction, wanted in (("x0", least), ("epsilon", least / snr), ("v", least / (snr + 1))):
        got = weighting.weights("min_snr", SD, prediction)
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_p2_and_debiased_as_published():
    """Both papers weigh the error of eps; an error of v is 1 / sqrt(SNR + 1) of one of eps."""
    snr = SD.alpha**2 / SD.sigma**2
    for name, of_eps in (
        ("p2", 1 / (1 + snr)), ("p2:gamma=0.5", (1 + snr) ** -0.5),
        ("p2:gamma=2,k=0.3", (0.3 + snr) ** -2), ("debiased", snr**-0.5),
    ):
        for prediction, wanted in (("epsilon", of_eps), ("v", of_eps * snr / (snr + 1))):
            got = weighting.weights(name, SD, prediction)
            np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_a_weighting_of_ones_own(monkeypatch):
    """The table is the one that configs are checked against, and what it gives is looked at."""
    assert weighting.WEIGHTINGS is named.WEIGHTINGS

    def add(name, make):
        monkeypatch.setitem(weighting.WEIGHTINGS, name, Named(make, {"power": Option(2.0)}))

    add("mine", lambda schedule, power: schedule.alpha**power)
    assert Diffusion(weighting="mine:power=2").weighting == "mine"
    for spelt, power in (("mine", 2), ("mine:power=3", 3)):
        np.testing.assert_allclose(weighting.weights(spelt, SD, "x0"), SD.alpha**power)
    add("short", lambda schedule, power: np.ones(3))
    add("below", lambda schedule, power: 0.5 - schedule.sigma)
    for name, message in (("short", r"shape \(3,\): give one for each of the 1000"),
                          ("below", "'below' is -0.0.* at t=.* of schedule 'sd': every weight")):
        with pytest.raises(UserError, match=message):
            weighting.weights(name, SD, "v")


def test_flow_matchings_as_in_diffusers():
    """Its sigma_sqrt is of x0, which its training script makes of the output; cosmap is the
    paper's, of the velocity."""
    training_utils = pytest.importorskip("diffusers.training_utils", reason=REASON)
    torch = pytest.importorskip("torch", reason=REASON)
    for name, prediction in (("sigma_sqrt", "x0"), ("cosmap", "flow")):
        theirs = training_utils.compute_loss_weighting_for_sd3(name, torch.tensor(FLOW.sigma))
        ours = weighting.weights(name, FLOW, prediction)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    np.testing.assert_allclose(weighting.weights("sigma_sqrt", FLOW, "flow"), 1, rtol=1e-12)
    # A density over time, as it was derived (Esser et al. 2024, appendix): its integral is 1.
    s, w = FLOW.sigma, weighting.weights("cosmap", FLOW, "flow")
    np.testing.assert_allclose(np.trapezoid(w, s), 1, atol=2e-3)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("of", [SD, EDM, FLOW], ids=lambda s: s.name)
def test_it_is_the_error_of_one_thing_whatever_the_network_outputs(name, of):
    """A network that is wrong in x0 by this much has this loss in every parameterisation."""
    rng = np.random.default_rng(0)
    t = np.arange(0, 1000, 37)
    x0, eps, wrong = rng.standard_normal((3, len(t)))
    alpha, sigma = of.alpha[t], of.sigma[t]
    x = alpha * x0 + sigma * eps
    losses = []
    for prediction in parameterization.PREDICTIONS:
        if prediction == "epsilon" and of.zero_terminal_snr:
            with pytest.raises(UserError, match="cannot tell x0"):
                weighting.weights(name, of, prediction)
            continue
        said, right = (
            parameterization.target(prediction, y, (x - alpha * y) / sigma, alpha, sigma)
            for y in (x0 + wrong, x0)
        )
        losses.append(weighting.weights(name, of, prediction)[t] * (said - right) ** 2)
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-6)


def test_snr_is_the_error_of_eps():
    np.testing.assert_allclose(weighting.weights("snr", SD, "epsilon"), 1, rtol=1e-12)


def test_an_end_that_is_not_trained_is_logged_once(caplog):
    weighting._say_untrained.cache_clear()
    for name, prediction in (("min_snr", "v"), ("snr", "x0"), ("p2", "flow")):
        for _ in range(2):
            assert weighting.weights(name, FLOW, prediction)[-1] == 0
    assert len(caplog.records) == 3
    assert "'min_snr' is 0 in the pure noise that schedule 'flow' ends in" in caplog.text
    caplog.clear()
    for name in ("sigma_sqrt", "cosmap"):
        assert weighting.weights(name, FLOW, "flow")[-1] > 0
    assert weighting.weights("min_snr", SD, "v")[-1] > 0
    assert not caplog.records


def test_the_loss_is_weighted_by_timestep_and_validation_is_not():
    seen = []

    def network(params, x_BHWC, t_B, cond):
        seen.append(np.asarray(t_B).astype(int))
        return x_BHWC

    x0_BHWC = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    args = (network, None, x0_BHWC, {}, jax.random.key(1), SD, "v")
    plain = loss.diffusion_loss(*args)
    weighted = loss.diffusion_loss(*args, weighting="min_snr")
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_allclose(
        weighted / plain, weighting.weights("min_snr", SD, "v")[seen[0]], rtol=1e-5
    )
    assert weighting.weights("none", SD, "v") is None and weighted.dtype == jnp.float32


def test_mistakes():
    for name, message in (
        ("minsnr", "did you mean 'min_snr'"), ("min_snr:gamma=0", "gamma='0'"),
        ("snr:gamma=5", "'snr' has none"),
    ):
        with pytest.raises(UserError, match=message):
            weighting.weights(name, SD, "v")
        with pytest.raises(UserError, match="diffusion.weighting.*" + message):
            Diffusion(weighting=name)
    clean = schedule.variance_preserving("clean", [1.0, 0.5])
    with pytest.raises(UserError, match="a timestep without noise"):
        weighting.weights("snr", clean, "v")
    with pytest.raises(UserError, match="unknown prediction"):
        weighting.weights("snr", SD, "noise")
