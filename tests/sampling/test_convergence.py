"""Orders of convergence and distributions, against data whose exact samples are known."""

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.sampling import solvers
from tests.sampling import analytic
from tests.sampling.analytic import MIXTURE, QUANTILES, run, uneven

SD = schedule.get("sd")


def build(name, g, **options):
    solver = solvers.SOLVERS[name]
    return solver.build(g, "x0", **{**solver.options, **options})


FREE = {"lower_order_final": False}
# Measured slope over the last halving of the steps within `SLACK` of it.
ORDERS = {
    "ddim": (1, {}, 0), "euler": (1, {}, 0), "dpmpp_1s": (1, {}, 0), "heun": (2, {}, 0),
    "dpmpp_2s": (2, FREE, 0), "dpmpp_2s midpoints": (2, {"midpoints": True}, 0),
    "dpmpp_2m": (2, FREE, 0), "dpmpp_2m heun": (2, FREE | {"solver_type": "heun"}, 0),
    # All published code halves the last term of the third order, which leaves order 2; see
    # docs/samplers.md. Started exactly, as its first steps are of order 1 and 2.
    "dpmpp_3m": (2, FREE, 2), "dpmpp_3m exact": (3, FREE | {"third_order": "exact"}, 2),
    # The corrector adds one. The third starts exactly too.
    "unipc 1": (2, FREE | {"order": 1}, 0), "unipc 2": (3, FREE, 0),
    "unipc 2 bh1": (3, FREE | {"variant": "bh1"}, 0), "unipc 3": (4, FREE | {"order": 3}, 3),
}
SLACK = 0.1


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_on_a_mixture(name):
    """A mixture of three Gaussians on the line, 12 quantiles of it, steps in turn long and half as
    long in log-SNR: the largest error falls with the claimed power of the number of steps."""
    order, options, first = ORDERS[name]
    errors = []
    for steps in (320, 640, 1280):
        g = uneven(steps)
        known = [MIXTURE.quantile(QUANTILES, g.alpha[k], g.sigma[k]) for k in range(first + 1)]
        x0 = [MIXTURE.x0(x, g.alpha[k], g.sigma[k]) for k, x in enumerate(known)]
        state = analytic.start(known[-1])
        if first:
            x0 = [np.zeros_like(known[0])] * 3 + x0[:-1]
            state = state._replace(y=known[-2], m1=x0[-1], m2=x0[-2], m3=x0[-3])
        x = run(build(name.split()[0], g, **options), MIXTURE.x0, state, first=first).x
        errors.append(np.abs(x - MIXTURE.quantile(QUANTILES, g.alpha[-1], g.sigma[-1])).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(orders[-1] - order) < SLACK, (orders, errors)
    assert errors[-1] < {1: 5e-3, 2: 5e-5, 3: 2e-7, 4: 2e-9}[order]


def test_higher_orders_are_better_at_few_steps_on_the_sd_schedule():
    errors = {}
    u = QUANTILES
    for spec in ("euler", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "unipc", "unipc:order=3"):
        table = solvers.make(spec, SD, 12, "x0", "karras")
        x = run(table, MIXTURE.x0, MIXTURE.quantile(u, table.alpha[0], table.sigma[0])).x
        errors[spec] = np.abs(x - MIXTURE.quantile(u)).mean()
    assert errors["dpmpp_2m"] < errors["euler"] / 2 and errors["dpmpp_2s"] < errors["euler"]
    assert errors["unipc"] < errors["dpmpp_2m"] and errors["unipc:order=3"] < errors["dpmpp_2m"]


# How the error of the variance falls: the SDE solvers of second order are so in distribution.
STOCHASTIC = {
    "ddim": (1, {"eta": 1.0}), "ddim half": (1, {"eta": 0.5}), "ddpm": (1, {}),
    "ddpm_large": (1, {}), "euler_ancestral": (1, {}), "euler_ancestral more": (1, {"eta": 1.5}),
    "dpmpp_sde": (1, {}), "dpmpp_2m_sde": (2, {}), "dpmpp_2m_sde half": (2, {"eta": 0.5}),
    "dpmpp_2m_sde heun": (2, {"solver_type": "heun"}), "dpmpp_3m_sde": (2, {}),
    "dpmpp_3m_sde exact": (2, {"third_order": "exact"}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_mean_and_variance_of_a_gaussian(name):
    """Exactly, without sampling: every row is linear and so is a Gaussian's denoiser."""
    order, options = STOCHASTIC[name]
    errors = []
    for steps in (100, 200, 400):
        g = uneven(steps)
        mean, variance = analytic.exact_moments(build(name.split()[0], g, **options))
        np.testing.assert_allclose(mean, g.alpha[-1] * analytic.MU, atol=1e-11)
        exact = (g.alpha[-1] * analytic.TAU) ** 2 + g.sigma[-1] ** 2
        errors.append(np.abs(variance / exact - 1).max())
    assert errors[-1] < (0.05 if order == 1 else 5e-4)
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(orders[-1] - order) < SLACK, (orders, errors)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_of_a_mixture_have_its_distribution(name):
    """20,000 samples over Stable Diffusion's noise levels, in steps so many that what is left of
    the solver's own error is small. The empirical distribution of exact samples strays further
    than `bound` from the true one with a probability of at most 1e-4 (Massart 1990), and their
    mean and variance further than 5 standard errors with 6e-7."""
    (order, options), n = STOCHASTIC[name], 20_000
    g = uneven(500 if order == 1 else 250, -2.68, 3.53)
    rng = np.random.default_rng(0)
    x = MIXTURE.quantile(rng.uniform(size=n), g.alpha[0], g.sigma[0])
    table = build(name.split()[0], g, **options)
    x = run(table, MIXTURE.x0, x, lambda r: rng.standard_normal(n)).x
    bound = (np.log(2 / 1e-4) / (2 * n)) ** 0.5
    empirical = (np.arange(n) + 0.5) / n
    assert np.abs(MIXTURE.cdf(np.sort(x), g.alpha[-1], g.sigma[-1]) - empirical).max() < bound
    mean, variance = MIXTURE.moments(g.alpha[-1], g.sigma[-1])
    assert abs(x.mean() - mean) < 5 * (variance / n) ** 0.5
    square = (x - mean) ** 2
    assert abs(square.mean() - variance) < 5 * (square.var() / n) ** 0.5
