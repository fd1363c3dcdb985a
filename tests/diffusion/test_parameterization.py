"""eps, v and x0 are three views of one pair (x0, eps)."""

import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.errors import UserError

SD = schedule.get("sd")


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_a_perfect_output_gives_back_x0_and_eps(prediction, t):
    rng = np.random.default_rng(t)
    x0, eps = rng.standard_normal((2, 8))
    alpha, sigma = SD.alpha[t], SD.sigma[t]
    x = alpha * x0 + sigma * eps
    F = parameterization.target(prediction, x0, eps, alpha, sigma)
    p, q = parameterization.x0_coefficients(prediction, alpha, sigma)
    np.testing.assert_allclose(p * x + q * F, x0, atol=1e-12)
    p, q = parameterization.eps_coefficients(prediction, alpha, sigma)
    np.testing.assert_allclose(p * x + q * F, eps, atol=1e-12)


def test_v_and_x0_work_at_pure_noise_and_epsilon_is_refused():
    zero = schedule.get("sd_zero_snr")
    alpha, sigma = zero.alpha[-2:], zero.sigma[-2:]
    x0, eps = np.array([2.0, 2.0]), np.array([-3.0, -3.0])
    for prediction in ("v", "x0", "flow"):
        F = parameterization.target(prediction, x0, eps, alpha, sigma)
        p, q = parameterization.x0_coefficients(prediction, alpha, sigma)
        np.testing.assert_allclose(p * (alpha * x0 + sigma * eps) + q * F, x0)
        parameterization.check(prediction, zero)
    with pytest.raises(UserError, match="'v' or 'x0'.*'sd'"):
        parameterization.x0_coefficients("epsilon", alpha, sigma)
    with pytest.raises(UserError, match="sd_zero_snr"):
        parameterization.check("epsilon", zero)


def test_user_errors():
    with pytest.raises(UserError, match="choose one of epsilon, v, x0, flow"):
        parameterization.target("noise", 1.0, 1.0, 1.0, 0.0)
    with pytest.raises(UserError, match=r"'linear' is no noise schedule: schedule.get\(name\)"):
        parameterization.check("epsilon", "linear")
    with pytest.raises(UserError, match="sigma = 0"):
        parameterization.eps_coefficients("x0", [1.0], [0.0])
