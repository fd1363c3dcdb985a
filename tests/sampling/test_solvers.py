"""Solvers in float64: what their rows must be, and the registry."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, solvers
from ldm_scaling.sampling.history import moments
from ldm_scaling.sampling.table import COLUMNS
from tests.sampling import analytic

SD, ZERO_SNR = schedule.get("sd"), schedule.get("sd_zero_snr")
STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 14, 15, 20, 50, 61, 250)
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "ays")
EVERY_GRID = [
    grid.build(spacing, SD, steps, convention, final)
    for spacing in SPACINGS for convention in grid.CONVENTIONS for final in grid.FINALS
    for steps in STEP_COUNTS
]
# Every option that makes other rows.
SPECS = (
    *solvers.SOLVERS, "ddim:eta=0.5", "ddim:eta=1", "euler_ancestral:eta=2",
    "ddpm_large:final_noise=true", "dpmpp_2s:midpoints=true", "dpmpp_2s:solver_type=heun",
    "dpmpp_2s:lower_order_final=false", "dpmpp_2m:lower_order_final=false",
    "dpmpp_2m:solver_type=heun", "dpmpp_3m:third_order=exact,lower_order_final=false",
    "dpmpp_3m_sde:third_order=exact", "dpmpp_2m_sde:eta=0.5", "unipc:order=1",
    "unipc:order=3,lower_order_final=false", "unipc:order=3,variant=bh1", "unipc:variant=bh1",
)
DISTILLED = ("lcm", "codi")


def assert_same_rows(one, other, columns=COLUMNS):
    for column in columns:
        np.testing.assert_allclose(
            getattr(one, column), getattr(other, column), rtol=0, atol=2e-12, err_msg=column
        )


def euler_row(s, s1, x, x0, eta=0.0):
    """Euler's method in variance-exploding coordinates: the scale of x, of x0 and of the noise."""
    up = min(s1, eta * (s1**2 * (s**2 - s1**2) / s**2) ** 0.5)
    down = (s1**2 - up**2) ** 0.5
    return x + (x - x0) / s * (down - s), up


def test_ddim_without_noise_is_first_order_dpm_solver_pp():
    for g in EVERY_GRID:
        assert_same_rows(solvers.ddim(g, "v"), solvers.dpm_solver_pp(g, "v", order=1))


def test_ddim_with_all_noise_is_ddpm_and_the_first_order_sde_solver():
    for g in EVERY_GRID:
        ddim = solvers.ddim(g, "v", eta=1.0)
        assert_same_rows(ddim, solvers.ddpm(g, "v"))
        assert_same_rows(ddim, solvers.dpm_solver_pp(g, "v", order=1, eta=1.0))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.7])
def test_ddim_is_eulers_method_with_fresh_noise(eta):
    for g in EVERY_GRID:
        rows = solvers.euler_ancestral(g, "v", eta=eta)
        if eta <= 1:
            assert_same_rows(rows, solvers.ddim(g, "v", eta=eta))
        s = g.noise
        for k in range(0, g.steps, max(1, g.steps // 10)):
            a, up = euler_row(s[k], s[k + 1], 1.0, 0.0, eta)
            b0, _ = euler_row(s[k], s[k + 1], 0.0, 1.0, eta)
            alpha, alpha1 = g.alpha[k], g.alpha[k + 1]
            wanted = [a * alpha1 / alpha, b0 * alpha1, up * alpha1]
            got = [rows.a[k], rows.b0[k], rows.c[k]]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("final", grid.FINALS)
def test_heuns_table_is_heuns_method(final):
    mixture = analytic.MIXTURE
    for steps in (1, 2, 7, 50):
        g = grid.build("linspace", SD, steps, "dpm", final)
        table = solvers.heun(g, "x0")
        assert table.calls == 2 * steps - (final == "zero")
        x = table.alpha[0] * np.linspace(-3, 3, 7) + table.sigma[0]
        s, y = g.noise, x / g.alpha[0]

        def slope(y, k, g=g, s=s):
            return (y - mixture.x0(g.alpha[k] * y, g.alpha[k], g.sigma[k])) / s[k]

        for k in range(steps):
            d, dt = slope(y, k), s[k + 1] - s[k]
            if s[k + 1] > 0:
                d = (d + slope(y + d * dt, k + 1)) / 2
            y = y + d * dt
        got = analytic.run(table, mixture.x0, x).x
        np.testing.assert_allclose(got, g.alpha[-1] * y, rtol=1e-9)


def test_unipcs_predictor_is_dpm_solver_pp():
    step = ("a", "b0", "b1", "b2", "c")
    for g in EVERY_GRID:
        free = {"lower_order_final": False}
        two = solvers.unipc(g, "v", variant="bh2", **free)
        assert_same_rows(two, solvers.dpm_solver_pp(g, "v", **free), step)
        three = solvers.unipc(g, "v", order=3, **free)
        exact = solvers.dpm_solver_pp(g, "v", order=3, third_order="exact", **free)
        assert_same_rows(three, exact, step)


def test_singlestep_with_midpoints_is_the_second_x0_alone():
    # k-diffusion's form: from x over the whole step with the x0 of its middle.
    for g in EVERY_GRID:
        table = solvers.dpm_solver_pp(g, "v", variant="singlestep", midpoints=True)
        nodes, k, r = g.noise, 0, 0
        while r < table.calls:
            pair = 0 < nodes[k + 1] < nodes[k]
            if pair:
                # x' = a2 (a1 x + b1 m1) + b0 m0 + b1' m1: nothing of m1 may be left.
                left = table.a[r + 1] * table.b0[r] + table.b1[r + 1]
                np.testing.assert_allclose(left, 0, atol=1e-12)
                kept = table.a[r + 1] * table.a[r]
                np.testing.assert_allclose(kept, g.sigma[k + 1] / g.sigma[k], atol=1e-12)
            r, k = r + 1 + pair, k + 1
        assert k == g.steps


def test_large_variance_is_the_forward_steps_beta():
    # On the full grid with one timestep a step, c^2 is the training beta itself.
    t = np.arange(999, -1, -1)
    table = solvers.ddpm(grid.from_timesteps(SD, t, "zero"), "epsilon", variance="fixed_large")
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(table.c[:-1] ** 2, beta[t][:-1], rtol=1e-10)


def test_moments_are_the_integrals_they_say():
    H = np.array([0, 1e-9, 1e-4, 0.3, 0.999, 1.001, 3.0, 20.0, 200.0, np.inf])
    got = moments(H, 4)
    x, w = np.polynomial.legendre.leggauss(60)
    s, w = (x + 1) / 2, w / 2
    for i, h in enumerate(H[:-2]):
        for j in range(4):
            # A step in two halves, so that the quadrature sees the layer at its end.
            parts = [(a + (b - a) * s, (b - a) * w) for a, b in ((0, 0.5), (0.5, 0.9), (0.9, 1))]
            wanted = sum((w * h * np.exp(-h * (1 - s)) * s**j).sum() for s, w in parts)
            np.testing.assert_allclose(got[j, i], wanted, rtol=1e-13)
    np.testing.assert_array_equal(got[:, -1], 1)


def flow_of_power(j, lam, x_over_sigma):
    """x / sigma at every node when x0 is lam^j: its derivative in lam is exp(lam) lam^j."""
    def primitive(lam):
        # exp(lam) (lam^j - j lam^(j-1) + j (j-1) lam^(j-2) - ...)
        total, factor = 0.0, 1.0
        for i in range(j, -1, -1):
            total, factor = total + factor * lam**i, -factor * i
        return np.exp(lam) * total

    return x_over_sigma + primitive(lam) - primitive(lam[0])


@pytest.mark.parametrize(
    ("name", "options", "degree", "first"),
    [("dpmpp_1s", {}, 0, 0), ("dpmpp_2m", {"solver_type": "heun"}, 1, 1),
     ("dpmpp_2s", {"solver_type": "heun"}, 1, 0),
     ("dpmpp_3m", {"third_order": "exact"}, 2, 2), ("dpmpp_3m", {"third_order": "public"}, 1, 2),
     ("unipc", {"order": 1}, 0, 1), ("unipc", {"order": 2}, 2, 2),
     ("unipc", {"order": 3}, 3, 3), ("unipc", {"order": 3, "variant": "bh1"}, 3, 3)],
)
def test_integrates_polynomials_exactly(name, options, degree, first):
    """With an x0 that is a polynomial in log-SNR, whatever x, the samples are known: rows from
    `first` on, started there exactly, must hit them up to the claimed degree and no further."""
    if name != "dpmpp_1s":
        options = {**options, "lower_order_final": False}
    g = analytic.uneven(9, -1.5, 1.5)
    lam = -np.log(g.noise)
    solver = solvers.SOLVERS[name]
    table = solver.build(g, "x0", **{**solver.options, **options})
    if name == "dpmpp_2s":
        g = analytic.uneven(8, -1.5, 1.5)  # whole pairs
        lam, table = -np.log(g.noise), solver.build(g, "x0", **{**solver.options, **options})
    for j in range(degree + 2):
        x = g.sigma * flow_of_power(j, lam, 0.7)
        before = [lam[k] ** j if k >= 0 else 0.0 for k in (first - 1, first - 2, first - 3)]
        state = analytic.State(x[first], x[first - 1], *before)
        if name == "unipc" and first:
            # The x that a predictor leaves is not what is corrected: it may be anything.
            state = state._replace(x=123.0)
        x0 = {alpha: lam[k] ** j for k, alpha in enumerate(g.alpha)}
        state = analytic.run(table, lambda x, alpha, sigma, x0=x0: x0[alpha], state, first=first)
        if name == "unipc":
            # Its output is not corrected: the last y, where the last row began, is.
            got, wanted = state.y, x[-2]
        else:
            got, wanted = state.x, x[-1]
        error = abs(got - wanted)
        assert error < 1e-13 if j <= degree else error > 1e-6, (j, error)


@pytest.mark.parametrize("spec", SPECS)
def test_a_known_image_stays_known(spec):
    """With x0 known, x = alpha x0 + sigma eps ends as alpha' x0 + sigma' eps: mean and variance,
    propagated exactly. DDPM's larger variance leaves more noise, the distilled a trace of x."""
    for schedule_ in (SD, ZERO_SNR):
        if schedule_ is ZERO_SNR and "bh1" in spec:
            continue
        for steps in STEP_COUNTS[:-2]:
            for final in grid.FINALS:
                table = solvers.make(spec, schedule_, steps, "x0", "trailing", final=final)
                mean, variance = analytic.exact_moments(table, np.ones(1), np.zeros(1))
                alpha, variance1 = table.alpha[-1], table.sigma[-1] ** 2
                if spec.startswith("ddpm_large"):
                    np.testing.assert_allclose(mean, alpha, atol=1e-12)
                    assert variance >= variance1 - 1e-15
                else:
                    atol = 2e-3 if spec in DISTILLED else 1e-12
                    np.testing.assert_allclose(mean, alpha, atol=atol)
                    np.testing.assert_allclose(variance, variance1, atol=atol)


# The others do not on purpose, and have tests of their own.
@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s not in ("lcm", "codi", "ddpm_large:final_noise=true")]
)
def test_a_step_to_no_noise_returns_x0(spec):
    for spacing in SPACINGS:
        for steps in STEP_COUNTS:
            table = solvers.make(spec, SD, steps, "v", spacing, final="zero")
            last = [getattr(table, column)[-1] for column in ("a", "b0", "b1", "b2", "c")]
            assert last == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr(spec, prediction):
    if "bh1" in spec:
        with pytest.raises(UserError, match="cannot leave pure noise: choose 'bh2'"):
            solvers.make(spec, ZERO_SNR, 20, prediction, "trailing")
        return
    for steps in STEP_COUNTS:
        table = solvers.make(spec, ZERO_SNR, steps, prediction, "trailing")
        # Its making has checked that every number is finite and no signal or noise is lost.
        assert table.alpha[0] == 0 and table.t[0] == 999
    with pytest.raises(UserError, match="'v' or 'x0'"):
        solvers.make(spec, ZERO_SNR, 20, "epsilon", "trailing")
    with pytest.raises(UserError, match="starts at t=9.*use spacing 'trailing'"):
        solvers.make(spec, ZERO_SNR, 20, prediction, "leading")


@pytest.mark.parametrize("spec", SPECS)
def test_predictions_are_the_same_sampler(spec):
    """A network that predicts eps or v instead of x0 leads to the same samples."""
    mixture = analytic.MIXTURE
    x = np.linspace(-2, 2, 5)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((12, 5))
    outcomes = []
    for prediction in parameterization.PREDICTIONS:
        table = solvers.make(spec, SD, 6, prediction, "trailing")
        network = analytic.prediction_of(prediction, mixture.x0)
        outcomes.append(analytic.run(table, network, x, lambda r: z[r]).x)
    np.testing.assert_allclose(outcomes[0], outcomes[2], atol=1e-10)
    np.testing.assert_allclose(outcomes[1], outcomes[2], atol=1e-10)


def test_final_noise_only_on_request():
    table = solvers.make("ddpm_large", SD, 50, final_noise=True)
    np.testing.assert_allclose(table.c[-1], 0.0413, atol=5e-5)  # as diffusers has it
    with pytest.raises(UserError, match="belongs to variance='fixed_large'"):
        solvers.ddpm(grid.build("leading", SD, 50), "v", final_noise=True)


def test_lcm_and_codi():
    """At t = 0 a consistency model is the identity; far from it LCM is x0 with fresh noise and
    CoDi is DDIM (Song et al. 2023, section 3)."""
    lcm = solvers.make("lcm", SD, 4, spacing=None)
    assert lcm.t.tolist() == [999, 759, 499, 259] and lcm.sigma[-1] == 0 == lcm.c[-1]
    np.testing.assert_allclose(lcm.c, lcm.sigma[1:])
    np.testing.assert_allclose(lcm.b0, lcm.alpha[1:], rtol=1e-7)
    np.testing.assert_allclose(lcm.a, 0, atol=1e-7)
    codi = solvers.make("codi", SD, 4, spacing=None)
    assert codi.t.tolist() == [980, 720, 460, 200]
    ddim = solvers.ddim(grid.from_timesteps(SD, codi.t), "epsilon")
    assert_same_rows(dataclasses.replace(codi, a=ddim.a, b0=ddim.b0), ddim)
    np.testing.assert_allclose(codi.a, ddim.a, atol=1e-7)
    np.testing.assert_allclose(codi.b0, ddim.b0, atol=1e-7)
    # From the end to the end nothing is done: no noise is left in twice, or added.
    for at_zero in (solvers.make("codi", SD, 50), solvers.make("lcm:final=abar_0", SD, 5,
                                                               spacing="linspace")):
        assert at_zero.t[-1] == 0
        assert [at_zero.a[-1], at_zero.b0[-1], at_zero.c[-1]] == [1, 0, 0]
    clean = solvers.make("lcm", SD, 5, spacing="linspace")  # the consistency function's own
    assert [clean.a[-1], clean.b0[-1], clean.c[-1]] == [1, 0, 0]


def test_calls():
    for spec, final, wanted in (
        ("ddim", "zero", 8), ("heun", "zero", 15), ("heun", "abar_0", 16), ("dpmpp_2s", "zero", 8),
        ("dpmpp_2s:midpoints=true", "zero", 15), ("dpmpp_2s:midpoints=true", "abar_0", 16),
        ("unipc", "zero", 8), ("dpmpp_3m_sde", "zero", 8),
    ):
        assert solvers.make(spec, SD, 8, final=final).calls == wanted
    # From pure noise there is no middle and no second slope.
    assert solvers.make("heun", ZERO_SNR, 8, "v", "trailing").calls == 14
    for spec, from_noise in (("heun", 15), ("heun:over=line", 16), ("dpmpp_2s:midpoints=true", 15)):
        for given, spacing, wanted in (
            (SD, "trailing", 16), (SD, "karras", 15),  # whose last step has no length
            (ZERO_SNR, "trailing", from_noise),
        ):
            assert solvers.make(spec, given, 8, "v", spacing, final="abar_0").calls == wanted


def test_order_control():
    def looks_back(spec, steps, **options):
        table = solvers.make(spec, SD, steps, "v", **options)
        return [1 + (table.b1[k] != 0) + (table.b2[k] != 0) for k in range(steps)]

    for spec, steps, options, wanted in (
        ("dpmpp_2m", 1, {}, [1]), ("dpmpp_2m", 2, {}, [1, 1]),
        ("dpmpp_2m", 5, {}, [1, 2, 2, 2, 1]), ("dpmpp_2m", 5, {"final": "abar_0"}, [1, 2, 2, 2, 1]),
        ("dpmpp_2m", 5, {"final": "abar_0", "lower_order_final": False}, [1, 2, 2, 2, 2]),
        ("dpmpp_2m", 5, {"lower_order_final": False}, [1, 2, 2, 2, 1]),
        ("dpmpp_2m", 14, {"final": "abar_0"}, [1] + [2] * 12 + [1]),
        ("dpmpp_2m", 15, {"final": "abar_0"}, [1] + [2] * 14),
        ("dpmpp_3m", 2, {}, [1, 1]), ("dpmpp_3m", 3, {}, [1, 2, 1]),
        ("dpmpp_3m", 6, {}, [1, 2, 3, 3, 2, 1]),
        ("dpmpp_3m", 6, {"lower_order_final": False}, [1, 2, 3, 3, 3, 1]),
        ("dpmpp_3m", 15, {}, [1, 2] + [3] * 12 + [1]),
        ("dpmpp_3m_sde", 6, {}, [1, 2, 3, 3, 3, 1]),
        ("dpmpp_2s", 5, {}, [1, 2, 1, 2, 1]), ("dpmpp_2s", 6, {}, [1, 2, 1, 2, 1, 1]),
        ("dpmpp_2s", 6, {"final": "abar_0"}, [1, 2, 1, 2, 1, 1]),
        ("dpmpp_2s", 6, {"final": "abar_0", "lower_order_final": False}, [1, 2] * 3),
        ("unipc", 6, {}, [1, 2, 2, 2, 2, 1]), ("unipc", 40, {}, [1] + [2] * 38 + [1]),
        ("unipc", 6, {"order": 3}, [1, 2, 3, 3, 2, 1]), ("unipc", 2, {"order": 3}, [1, 1]),
        ("unipc", 5, {"order": 3, "lower_order_final": False}, [1, 2, 3, 3, 1]),
    ):
        assert looks_back(spec, steps, **options) == wanted, (spec, steps, options)
