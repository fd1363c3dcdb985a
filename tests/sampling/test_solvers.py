"""Solvers in float64: identities, orders of convergence, marginals, the registry."""

import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, sampler, solvers
from ldm_scaling.sampling.table import COLUMNS, SamplerTable

SD = schedule.get("sd")
STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 20, 50, 250)
EVERY_GRID = [
    grid.build(spacing, SD, steps, convention, final)
    for spacing in grid.SPACINGS for convention in grid.CONVENTIONS for final in grid.FINALS
    for steps in STEP_COUNTS
]


def run(table: SamplerTable, denoise, x, noise=None):
    """The table in float64 numpy, through the same row update that the jitted loop runs."""
    m1 = m2 = np.zeros_like(x)
    for r in range(table.calls):
        row = {column: getattr(table, column)[r] for column in COLUMNS}
        z = 0.0 if noise is None else noise(r)
        x, m0 = sampler.update(row, x, denoise(r, x), m1, m2, z)
        m1, m2 = m0, m1
    return x


def assert_same_rows(one, other):
    for column in COLUMNS:
        np.testing.assert_allclose(
            getattr(one, column), getattr(other, column), rtol=0, atol=2e-12, err_msg=column
        )


def test_ddim_without_noise_is_first_order_dpm_solver_pp():
    for g in EVERY_GRID:
        assert_same_rows(
            solvers.ddim(g, "v"), solvers.dpm_solver_pp(g, "v", order=1)
        )


def test_ancestral_ddim_is_ddpm_with_small_variance():
    for g in EVERY_GRID:
        assert_same_rows(solvers.ddim(g, "v", eta=1.0), solvers.ddpm(g, "v"))


def test_large_variance_is_the_forward_steps_beta():
    # On the full grid with one timestep a step, c^2 is the training beta itself.
    t = np.arange(999, -1, -1)
    table = solvers.ddpm(grid.from_timesteps(SD, t, "zero"), "epsilon", variance="fixed_large")
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(table.c[:-1] ** 2, beta[t][:-1], rtol=1e-10)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_step_to_no_noise_returns_x0(name):
    for spacing in grid.SPACINGS:
        for steps in STEP_COUNTS:
            table = solvers.make(name, SD, steps, "v", spacing, final="zero")
            last = [getattr(table, column)[-1] for column in ("a", "b0", "b1", "b2", "c")]
            assert last == [0, 1, 0, 0, 0]


def test_final_noise_only_on_request():
    table = solvers.make("ddpm_large", SD, 50, final_noise=True)
    np.testing.assert_allclose(table.c[-1], 0.0413, atol=5e-5)  # as diffusers has it
    with pytest.raises(UserError, match="belongs to variance='fixed_large'"):
        solvers.ddpm(grid.leading(SD, 50), "v", final_noise=True)


# A Gaussian data distribution N(mu, tau^2), coordinate by coordinate: its exact denoiser is linear
# and its probability flow moves each quantile: x_t = alpha mu + sqrt(alpha^2 tau^2 + sigma^2) z.
MU = np.array([1.5, -0.7, 0.2])
TAU = np.array([0.3, 0.8, 1.3])
Z = np.array([0.4, -1.1, 2.0])


def flow(alpha, sigma):
    return alpha * MU + np.sqrt((alpha * TAU) ** 2 + sigma**2) * Z


def exact_denoiser(g, prediction):
    def denoise(r, x):
        alpha, sigma = g.alpha[r], g.sigma[r]
        gain = alpha * TAU**2 / ((alpha * TAU) ** 2 + sigma**2)
        x0 = MU + gain * (x - alpha * MU)
        eps = (x - alpha * x0) / sigma
        return parameterization.target(prediction, x0, eps, alpha, sigma)

    return denoise


def smooth_grid(steps):
    """Nodes even in half log-SNR, so that halving the step is exact."""
    lam = np.linspace(-2.5, 2.5, steps + 1)
    sigma = 1 / np.sqrt(1 + np.exp(2 * lam))
    return grid.Grid(np.arange(steps, 0, -1), np.sqrt(1 - sigma**2), sigma, "lambda")


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
@pytest.mark.parametrize(
    ("order", "solver"),
    [(1, solvers.ddim), (1, lambda g, p: solvers.dpm_solver_pp(g, p, order=1)),
     (2, lambda g, p: solvers.dpm_solver_pp(g, p, order=2))],
    ids=["ddim", "dpmpp_1", "dpmpp_2m"],
)
def test_order_of_convergence_on_a_gaussian(order, solver, prediction):
    steps = np.array([80, 160, 320, 640])
    errors = []
    for n in steps:
        g = smooth_grid(n)
        x = run(solver(g, prediction), exact_denoiser(g, prediction), flow(g.alpha[0], g.sigma[0]))
        errors.append(np.abs(x - flow(g.alpha[-1], g.sigma[-1])))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders[-1] - order) < 0.06), orders
    assert np.max(errors[-1]) < (2e-2 if order == 1 else 2e-4)


def test_second_order_is_better_at_few_steps_on_the_sd_schedule():
    errors = {}
    for name in ("dpmpp_1", "dpmpp_2m"):
        g = grid.build("trailing", SD, 10, "dpm", "zero")
        table = solvers.make(name, SD, 10, "epsilon", "trailing")
        x = run(table, exact_denoiser(g, "epsilon"), flow(g.alpha[0], g.sigma[0]))
        errors[name] = np.abs(x - (MU + TAU * Z)).max()
    assert errors["dpmpp_2m"] < errors["dpmpp_1"] / 2


def test_ancestral_sampling_converges_to_the_datas_variance():
    # The denoiser is linear, so the sample's mean and variance follow the rows exactly.
    errors = []
    for steps in (100, 200, 400):
        g = smooth_grid(steps)
        table = solvers.ddim(g, "v", eta=1.0)
        denoise = exact_denoiser(g, "v")
        noise = [np.zeros(3)] * steps
        mean = run(table, denoise, g.alpha[0] * MU, lambda r, noise=noise: noise[r])
        variance = np.zeros(3)
        start = np.sqrt((g.alpha[0] * TAU) ** 2 + g.sigma[0] ** 2)
        variance += (run(table, denoise, g.alpha[0] * MU + start) - mean) ** 2
        for r in range(steps):
            def kick(i, r=r):
                return np.ones(3) * (i == r)

            variance += (run(table, denoise, g.alpha[0] * MU, kick) - mean) ** 2
        np.testing.assert_allclose(mean, g.alpha[-1] * MU, atol=1e-12)
        exact = (g.alpha[-1] * TAU) ** 2 + g.sigma[-1] ** 2
        errors.append(np.abs(variance / exact - 1).max())
    assert errors[-1] < 0.02
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, rtol=0.1)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_rows_keep_the_marginal_of_a_known_image(name):
    # With x0 known, x = alpha x0 + sigma eps must hold row by row, and does so for every solver
    # but DDPM's larger variance, which leaves more noise. (Signal and noise, propagated exactly.)
    for steps in STEP_COUNTS:
        table = solvers.make(name, SD, steps, "v", "trailing")
        signal, variance = table.alpha[0], table.sigma[0] ** 2
        for r in range(steps):
            signal = table.a[r] * signal + table.b0[r] + table.b1[r] + table.b2[r]
            variance = table.a[r] ** 2 * variance + table.c[r] ** 2
            np.testing.assert_allclose(signal, table.alpha[r + 1], atol=1e-12)
            if name == "ddpm_large":
                assert variance >= table.sigma[r + 1] ** 2 - 1e-15
            else:
                np.testing.assert_allclose(variance, table.sigma[r + 1] ** 2, atol=1e-12)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr(name, prediction):
    zero = schedule.get("sd_zero_snr")
    for steps in STEP_COUNTS:
        table = solvers.make(name, zero, steps, prediction, "trailing")
        # Nothing of pure noise survives a step that draws none but its direction.
        assert table.alpha[0] == 0 and table.t[0] == 999
    with pytest.raises(UserError, match="'v' or 'x0'"):
        solvers.make(name, zero, 20, "epsilon", "trailing")
    with pytest.raises(UserError, match="starts at t=9.*use spacing 'trailing'"):
        solvers.make(name, zero, 20, prediction, "leading")


def test_order_control():
    def second(**options):
        return np.flatnonzero(solvers.make("dpmpp_2m", SD, prediction="v", **options).b1).tolist()

    assert second(steps=1) == [] and second(steps=2) == []
    assert second(steps=5, final="zero") == [1, 2, 3]
    assert second(steps=5, final="abar_0") == [1, 2, 3]
    assert second(steps=5, final="abar_0", lower_order_final=False) == [1, 2, 3, 4]
    assert second(steps=5, final="zero", lower_order_final=False) == [1, 2, 3]
    assert second(steps=20, final="abar_0") == list(range(1, 20))


def test_every_registered_solver_makes_tables_with_telling_names():
    names = set()
    for name in solvers.SOLVERS:
        for spacing in grid.SPACINGS:
            for steps in STEP_COUNTS:
                table = solvers.make(name, SD, steps, "epsilon", spacing)
                assert table.calls == steps and spacing in table.name and name in table.name
                names.add(table.name)
    assert len(names) == len(solvers.SOLVERS) * len(grid.SPACINGS) * len(STEP_COUNTS)
    for name, options in (("ddim", {"eta": 0.5}), ("dpmpp_2m", {"lower_order_final": False}),
                          ("ddim", {"final": "zero"}), ("ddim", {"offset": 0}),
                          ("ddpm_large", {"final_noise": True})):
        assert solvers.make(name, SD, 20, **options).name not in names


def test_user_errors_list_what_is_possible():
    with pytest.raises(UserError, match="choose one of ddim, ddpm, ddpm_large, dpmpp_1, dpmpp_2m"):
        solvers.make("plms", SD, 20)
    with pytest.raises(UserError, match="no option 'order'.* lower_order_final=True, final, off"):
        solvers.make("dpmpp_2m", SD, 20, order=3)
    with pytest.raises(UserError, match="no option 'etta': it has eta=0.0"):
        solvers.make("ddim", SD, 20, etta=1)
    with pytest.raises(UserError, match="leading, trailing, linspace"):
        solvers.make("ddim", SD, 20, spacing="karras")
    with pytest.raises(UserError, match="epsilon, v, x0"):
        solvers.make("ddim", SD, 20, "flow")
    with pytest.raises(UserError, match="at most 999 steps"):
        solvers.make("ddim", SD, 1000)
    with pytest.raises(UserError, match="eta=1.5"):
        solvers.make("ddim", SD, 20, eta=1.5)
    with pytest.raises(UserError, match="fixed_small, fixed_large"):
        solvers.ddpm(grid.leading(SD, 4), "v", variance="learned")
    with pytest.raises(UserError, match="order=3: choose 1 or 2"):
        solvers.dpm_solver_pp(grid.leading(SD, 4), "v", order=3)
    with pytest.raises(UserError, match="only its end"):
        solvers.ddim(grid.Grid([2, 1], [0.5, 1, 1], [0.75**0.5, 0, 0], "mine"), "v")


def test_options_are_those_that_the_name_leaves_open():
    assert solvers.SOLVERS["ddim"].options == {"eta": 0.0}
    assert solvers.SOLVERS["ddpm"].options == {}
    assert solvers.SOLVERS["ddpm_large"].options == {"final_noise": False}
    assert solvers.SOLVERS["dpmpp_2m"].options == {"lower_order_final": True}
