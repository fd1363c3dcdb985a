"""The rows of one table as a scan: the loop's samples, gradients, and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler, solvers
from tests.sampling import analytic
from tests.sampling.analytic import MU, TAU

SD = schedule.get("sd")
SHAPE, KEY, INDEX = (3, 3, 2), jax.random.key(5), np.array([4, 0, 9])
PARAMS = {"w": np.array([[0.4, -0.3], [0.2, 0.5]], "f4"), "c": np.array([0.3, -0.2], "f4")}
COND, EMPTY = {"c": np.array([[1.0], [2.0], [-1.0]], "f4")}, {"c": np.zeros((1, 1), "f4")}


def network(params, x_BHWC, t_B, cond):
    c_B11C = (cond["c"] * params["c"])[:, None, None]
    return jnp.tanh(x_BHWC @ params["w"] + c_B11C + jnp.sin(t_B / 300)[:, None, None, None])


LOOP = sampler.make_sampler(network, SHAPE)


def start(table):
    return np.float32(table.s[0]) * sampler.initial_noise(KEY, INDEX, SHAPE)


@pytest.mark.parametrize("spec", [
    "ddim", "ddim:guidance_low=0.3,guidance_high=6,rescale=0.5", "dpmpp_3m_sde", "unipc", "heun",
])  # fmt: skip
@pytest.mark.parametrize("guided", [False, True])
def test_it_is_what_the_loop_draws(spec, guided):
    table = solvers.make(spec, SD, 5, "v", "trailing", final="zero")
    more = (np.array([4.0, 1.0, 2.0], "f4"), EMPTY) if guided else (None, None)
    wanted = LOOP(PARAMS, table.padded(10), more[0], COND, more[1], KEY, INDEX)
    x, kept = sampler.trajectory(
        network, PARAMS, table, start(table), COND, *more, key=KEY, index_B=INDEX, keep=("x", "x0")
    )
    np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-5)
    assert kept["x"].shape == kept["x0"].shape == (table.calls, 3, *SHAPE)
    np.testing.assert_array_equal(kept["x"][-1], x)
    np.testing.assert_array_equal(kept["x0"][-1], x)  # the last step has no noise
    F = network(PARAMS, start(table), jnp.full(3, table.t[0]), COND)
    if not guided:
        x0 = np.float32(table.p[0]) * start(table) + np.float32(table.q[0]) * F
        np.testing.assert_allclose(kept["x0"][0], x0, atol=1e-5)


def test_gradients_are_finite_differences():
    table = solvers.make("dpmpp_2m:guidance_high=2", SD, 4, "v", "trailing")
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params, cond, uncond, x = jax.tree.map(
            lambda a: jnp.asarray(a, "f8"), (PARAMS, COND, EMPTY, start(table)))
        some = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), (params, x))

        def loss(params, x):
            x, kept = sampler.trajectory(
                network, params, table, x, cond, jnp.full(3, 3.0), uncond, keep=("x0",)
            )
            assert x.dtype == kept["x0"].dtype == np.float64
            return jnp.sum(x**2) + jnp.sum(jnp.sin(kept["x0"]))

        value = jax.jit(loss)

        def along(h):
            return value(*jax.tree.map(lambda a, b: a + h * b, (params, x), some))

        found = jax.jit(jax.grad(loss, (0, 1)))(params, x)
        slope = sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (found, some))))
        np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_orders_of_convergence_in_float64(name, order):
    """Gaussians, whose denoiser and trajectories are known. In float32 no error falls below 1e-7.
    """
    errors = []
    with jax.enable_x64(True):
        for steps in (160, 320):
            grid = analytic.uneven(steps)
            solver = solvers.SOLVERS[name]
            more = {"lower_order_final": False} if name in ("dpmpp_2m", "unipc") else {}
            table = solver.build(grid, "x0", **{**solver.options, **more})

            def x0_of(params, x_BC, t_B, cond, grid=grid, steps=steps):
                node = (steps - t_B.astype(int))[:, None]
                alpha, sigma = jnp.asarray(grid.alpha)[node], jnp.asarray(grid.sigma)[node]
                gain = alpha * TAU**2 / ((alpha * TAU) ** 2 + sigma**2)
                return MU + gain * (x_BC - alpha * MU)

            z_BC = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
            first, wanted = (
                grid.alpha[k] * MU + np.hypot(grid.alpha[k] * TAU, grid.sigma[k]) * z_BC
                for k in (0, -1)
            )
            x, _ = sampler.trajectory(x0_of, None, table, first, {})
            errors.append(float(jnp.abs(x - wanted).max()))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15, errors
    assert errors[1] < {1: 1e-2, 2: 1e-4, 3: 1e-6}[order]


def test_guided_by_a_weaker_network():
    """Autoguidance: F_weak + w (F - F_weak), both of the prompt; with uncond the weaker sees that.
    """
    table = solvers.make("ddim:guidance_high=3", SD, 4, "v", "trailing")
    weak = {"shift": np.float32(0.2)}

    def weaker(params, x_BHWC, t_B, cond):
        assert x_BHWC.shape[0] == 3
        return params["shift"] + 0.1 * x_BHWC + cond["c"][:, None, None]

    w_B = np.array([1.0, 2.0, 3.0], "f4")
    sample = sampler.make_sampler(network, SHAPE, weaker=weaker)
    for uncond, seen in (({}, COND), (EMPTY, {"c": np.zeros((3, 1), "f4")})):
        def by_hand(params, x, t_B, cond, seen=seen):
            F, F_weak = network(PARAMS, x, t_B, cond), weaker(weak, x, t_B, seen)
            noise = jnp.interp(t_B[0], np.arange(1000), SD.noise)
            w = jnp.where(noise <= 3, w_B, 1)[:, None, None, None]
            return F_weak + w * (F - F_weak)

        x, _ = sampler.trajectory(by_hand, None, table, start(table), COND)
        args = table.padded(10), w_B, COND, uncond, KEY, INDEX
        np.testing.assert_allclose(sample((PARAMS, weak), *args), x, rtol=1e-4, atol=1e-5)
    plain, _ = sampler.trajectory(network, PARAMS, table, start(table), COND)
    alone = sample((PARAMS, weak), table.padded(10), None, COND, None, KEY, INDEX)
    np.testing.assert_allclose(alone, plain, atol=1e-5)


def test_errors():
    table = solvers.make("ddim", SD, 2, "v")
    for given, keep, more, message in (
        (table, ("v",), {}, "keep='v': choose of x, x0"),
        (solvers.make("ddpm", SD, 2, "v"), (), {}, "adds noise: give a key"),
        (table, "v", {}, "keep='v': choose of x, x0"),
        (table.padded(), (), {}, r"a Padded, not a SamplerTable: give it without .padded\(\)"),
        (table, (), {"guidance_B": np.ones(3)}, "both guidance_B and uncond"),
        (table, (), {"guidance_B": 3.0, "uncond": EMPTY}, r"guidance_B \(\)"),
        (table, (), {"index_B": np.arange(2)}, r"index_B has shape \(2,\), but x_BHWC \(3, 3"),
    ):
        with pytest.raises(UserError, match=message):
            sampler.trajectory(network, PARAMS, given, start(table), COND, keep=keep, **more)
    _, kept = sampler.trajectory(
        network, PARAMS, table, start(table), COND, keep="x0", index_B=[0, 1, 2]
    )
    assert list(kept) == ["x0"]
    with pytest.raises(UserError, match="x_BHWC is bfloat16, which rounds timesteps"):
        sampler.trajectory(network, PARAMS, table, start(table).astype("bfloat16"), COND)
    with pytest.raises(UserError, match="x_BHWC is float64, .* enable jax_enable_x64"):
        sampler.trajectory(network, PARAMS, table, np.asarray(start(table), np.float64), COND)
    with pytest.raises(UserError, match="index_B has shape"):  # not of conditioning alone
        sampler.trajectory(lambda p, x, t, c: x, None, table, start(table), {}, index_B=INDEX[:1])
