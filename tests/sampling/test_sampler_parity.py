"""Every solver, step by step and whole, against diffusers' schedulers with the same noise.

The schedule is the peer's own (it is built in float32), so what is compared is the solver. Where
the peer is known to be wrong, the test says so and sets it right from outside.
"""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.sampling import grid, sampler, solvers
from ldm_scaling.sampling.table import COLUMNS

REASON = "parity needs: pip install -e '.[parity]'"
pytest.importorskip("diffusers", reason=REASON)
torch = pytest.importorskip("torch", reason=REASON)
schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 20, 50, 250)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (2, 3, 3, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MAX_ROWS = 250


def schedule_of(peer):
    return Schedule("peer", peer.alphas_cumprod.double().numpy())


@jax.jit
def teacher_forced(table, x_RBHWC, F_RBHWC, noise_RBHWC):
    """Our x' of every row from the peer's x, the x0 history being ours."""

    def step(history, inputs):
        row, x, F, noise = inputs
        after, m0 = sampler.update(row, x, F, *history, noise)
        return (m0, history[0]), (after, m0)

    rows = {column: table[column] for column in COLUMNS}
    start = (jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    return jax.lax.scan(step, start, (rows, x_RBHWC, F_RBHWC, noise_RBHWC))[1]


def assert_same_steps(peer, table, step, tolerance=1e-5):
    """Runs the peer on random outputs and noise and compares each step."""
    assert peer.timesteps[: table.calls].tolist() == table.t.tolist()
    rng = np.random.default_rng(table.calls)
    n = table.calls
    F, noise = rng.standard_normal((2, n, *SHAPE)).astype("f4")
    x = np.empty((n + 1, *SHAPE), "f4")
    x[0] = rng.standard_normal(SHAPE)
    for r in range(n):
        args = [torch.from_numpy(array[r]) for array in (F, x, noise)]
        x[r + 1] = step(r, *args).numpy()

    def pad(array):
        return np.pad(array, [(0, MAX_ROWS - n)] + [(0, 0)] * len(SHAPE))

    ours, _ = teacher_forced(table.padded(MAX_ROWS), pad(x[:-1]), pad(F), pad(noise))
    axes = tuple(range(1, 1 + len(SHAPE)))
    error = np.abs(np.asarray(ours[:n]) - x[1:]).max(axes) / np.abs(x[1:]).max(axes)
    assert error.max() <= tolerance, (table.name, int(error.argmax()), error.max())


def ddim_step(peer, table, eta):
    """The peer steps to t - 1000 // N, which misses the true neighbour in linspace spacing and in
    trailing where N does not divide 1000 (its issues 11347 and 12633): there it is told the true
    stride, as a number of steps that yields it."""
    spacing, n = peer.config.timestep_spacing, table.calls
    honest = spacing == "leading" or (spacing == "trailing" and 1000 % n == 0)
    t = [*table.t.astype(int).tolist(), -1]

    def step(r, F, x, noise):
        if not honest:
            peer.num_inference_steps = fractions.Fraction(1000, t[r] - t[r + 1])
        return peer.step(F, t[r], x, eta=eta, variance_noise=noise).prev_sample

    return step


@pytest.mark.parametrize("spacing", grid.SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim(spacing, prediction, eta):
    peer = schedulers.DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing,
        prediction_type=PREDICTIONS[prediction],
    )
    for steps in STEP_COUNTS:
        peer.set_timesteps(steps)
        table = solvers.make("ddim", schedule_of(peer), steps, prediction, spacing, eta=eta)
        assert_same_steps(peer, table, ddim_step(peer, table, eta))


def test_ddim_of_the_peer_misses_its_neighbour_where_it_is_set_right_above():
    """4 linspace steps visit 999, 666, 333, 0. Given the right output, x must be at 666 after the
    first step: ours is, the peer's has the noise of 749 = 999 - 1000 // 4."""
    peer = schedulers.DDIMScheduler(**SD, timestep_spacing="linspace", clip_sample=False)
    peer.set_timesteps(4)
    given = schedule_of(peer)
    x0, eps = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("f4")

    def at(t):
        return (given.alpha[t] * x0 + given.sigma[t] * eps).astype("f4")

    theirs = peer.step(torch.from_numpy(eps), 999, torch.from_numpy(at(999))).prev_sample.numpy()
    table = solvers.make("ddim", given, 4, spacing="linspace")
    row = {column: getattr(table, column)[0] for column in COLUMNS}
    ours, _ = sampler.update(row, at(999), eps, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(ours, at(666), atol=1e-5)
    np.testing.assert_allclose(theirs, at(749), atol=1e-5)


def test_ddim_to_no_noise():
    peer = schedulers.DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="leading"
    )
    for steps in STEP_COUNTS:
        peer.set_timesteps(steps)
        table = solvers.make("ddim", schedule_of(peer), steps, final="zero")
        assert_same_steps(peer, table, ddim_step(peer, table, 0.0))


def ddpm_step(peer, table, monkeypatch):
    """The peer's DDPM draws its own noise: it is handed ours in place of the draw."""
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"

    def step(r, F, x, noise):
        monkeypatch.setattr(module, lambda *args, **kwargs: noise)
        return peer.step(F, peer.timesteps[r], x).prev_sample

    return step


@pytest.mark.parametrize("spacing", grid.SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["ddpm", "ddpm_large"])
def test_ddpm(name, spacing, prediction, monkeypatch):
    options = {} if name == "ddpm" else {"final_noise": True}
    peer = schedulers.DDPMScheduler(
        **SD, clip_sample=False, steps_offset=1, timestep_spacing=spacing,
        prediction_type=PREDICTIONS[prediction],
        variance_type="fixed_small" if name == "ddpm" else "fixed_large",
    )
    for steps in STEP_COUNTS:
        peer.set_timesteps(steps)
        table = solvers.make(name, schedule_of(peer), steps, prediction, spacing, **options)
        assert_same_steps(peer, table, ddpm_step(peer, table, monkeypatch))


def dpm_step(peer):
    return lambda r, F, x, noise: peer.step(F, peer.timesteps[r], x).prev_sample


@pytest.mark.parametrize("spacing", grid.SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", grid.FINALS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_pp(order, final, prediction, spacing):
    peer = schedulers.DPMSolverMultistepScheduler(
        **SD, algorithm_type="dpmsolver++", solver_order=order, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero" if final == "zero" else "sigma_min",
        timestep_spacing=spacing, steps_offset=1, prediction_type=PREDICTIONS[prediction],
    )
    name = {1: "dpmpp_1", 2: "dpmpp_2m"}[order]
    for steps in (*STEP_COUNTS, 14, 15):  # the last step's order changes between these two
        peer.set_timesteps(steps)
        table = solvers.make(name, schedule_of(peer), steps, prediction, spacing, final=final)
        assert_same_steps(peer, table, dpm_step(peer))


def test_dpm_solver_pp_of_full_order_to_the_end():
    peer = schedulers.DPMSolverMultistepScheduler(
        **SD, solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min",
        timestep_spacing="leading", steps_offset=1,
    )
    for steps in STEP_COUNTS:
        peer.set_timesteps(steps)
        options = {"final": "abar_0", "lower_order_final": False}
        table = solvers.make("dpmpp_2m", schedule_of(peer), steps, **options)
        assert_same_steps(peer, table, dpm_step(peer))


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_zero_terminal_snr(name, prediction, monkeypatch):
    options = {
        **SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "prediction_type": PREDICTIONS[prediction],
    }
    if name == "ddim":
        peer = schedulers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    elif name.startswith("ddpm"):
        variance = "fixed_small" if name == "ddpm" else "fixed_large"
        peer = schedulers.DDPMScheduler(**options, clip_sample=False, variance_type=variance)
    else:
        # This one puts 2^-24 in place of 0; its schedule is the one compared on.
        order = {"dpmpp_1": 1, "dpmpp_2m": 2}[name]
        peer = schedulers.DPMSolverMultistepScheduler(**options, solver_order=order)
    given = schedule_of(peer)
    assert given.alphas_cumprod[-1] == (2**-24 if name.startswith("dpmpp") else 0)
    final_noise = {"final_noise": True} if name == "ddpm_large" else {}
    for steps in STEP_COUNTS:
        peer.set_timesteps(steps)
        table = solvers.make(name, given, steps, prediction, "trailing", **final_noise)
        if name == "ddim":
            step = ddim_step(peer, table, 0.0)
        elif name.startswith("ddpm"):
            step = ddpm_step(peer, table, monkeypatch)
        else:
            step = dpm_step(peer)
        assert_same_steps(peer, table, step)


MIX = np.random.default_rng(0).standard_normal((4, 4)).astype("f4") / 2


def network(lib, mix, x, t, context):
    """The same small network in JAX and torch."""
    return lib.tanh(x @ mix + context[:, None]) + 0.3 * lib.sin(t / 300.0)


@pytest.fixture(scope="module")
def sample():
    def denoise(params, x_BHWC, t_B, cond):
        return network(jnp, params, x_BHWC, t_B[:, None, None, None], cond["context"])

    return sampler.make_sampler(denoise, SHAPE[1:])


@jax.jit
def all_noise(key, index_B):
    rows = jax.vmap(lambda r: sampler.row_noise(key, index_B, r, SHAPE[1:]))(jnp.arange(20))
    return sampler.initial_noise(key, index_B, SHAPE[1:]), rows


@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddpm", "ddpm_large", "dpmpp_1", "dpmpp_2m"])
def test_whole_trajectories_with_guidance(name, sample, monkeypatch):
    """The jitted loop against the peer's, with the same network, guidance and noise."""
    context = np.random.default_rng(1).standard_normal((2, 1, 4)).astype("f4")
    empty = np.zeros((1, 1, 4), "f4")
    key, index, w = jax.random.key(5), jnp.arange(2), 3.5
    start, noise = (np.array(z) for z in all_noise(key, index))
    for steps, spacing in ((4, "leading"), (7, "trailing"), (20, "leading")):
        options = {"timestep_spacing": spacing, "steps_offset": 1, **SD}
        extra = {"eta": 0.6} if name == "ddim_eta" else {}
        if name.startswith("ddim"):
            peer = schedulers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
        elif name.startswith("ddpm"):
            variance = "fixed_small" if name == "ddpm" else "fixed_large"
            peer = schedulers.DDPMScheduler(**options, clip_sample=False, variance_type=variance)
            extra = {} if name == "ddpm" else {"final_noise": True}
        else:
            order = {"dpmpp_1": 1, "dpmpp_2m": 2}[name]
            peer = schedulers.DPMSolverMultistepScheduler(**options, solver_order=order)
        peer.set_timesteps(steps)
        table = solvers.make(
            name.removesuffix("_eta"), schedule_of(peer), steps, "epsilon", spacing, **extra
        )
        ours = sample(
            jnp.asarray(MIX), table.padded(MAX_ROWS), jnp.full(2, w),
            {"context": jnp.asarray(context)}, {"context": jnp.asarray(empty)}, key, index,
        )
        if name.startswith("ddim"):
            step = ddim_step(peer, table, extra.get("eta", 0.0))
        else:
            step = (
                ddpm_step(peer, table, monkeypatch) if name.startswith("ddpm") else dpm_step(peer)
            )
        x = torch.from_numpy(start)
        for r in range(steps):
            t = peer.timesteps[r].float()
            F_c, F_u = (
                network(torch, torch.from_numpy(MIX), x, t, torch.from_numpy(c))
                for c in (context, empty)
            )
            x = step(r, F_u + w * (F_c - F_u), x, torch.from_numpy(noise[r]))
        error = np.abs(np.asarray(ours) - x.numpy()).max() / x.abs().max().item()
        assert error < 3e-5, (steps, spacing, error)
