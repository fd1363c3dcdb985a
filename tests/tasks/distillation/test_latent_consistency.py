"""Latent consistency distillation where its answer is known: Gaussians, and any teacher's chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import consistency, schedule
from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.tasks.distillation import latent_consistency
from ldm_scaling.training.task import Beside
from tests.sampling.analytic import MIXTURE
from tests.tasks.distillation import known

SD = schedule.get("sd")
# A short schedule from little noise to much, for what is trained.
SHORT = schedule.sd(50, 0.017, 0.24)
BESIDE = Beside(known.FROZEN, known.FROZEN)


def measured(student, teacher, schedule, prediction, rates, batch=4096, **options):
    loss = latent_consistency.loss_fn(
        student, teacher, schedule, prediction, known.examples, known.UNCOND,
        rates=rates, **options,
    )
    value, metrics = known.run(loss, known.FROZEN, jnp.zeros(batch), jax.random.key(0), BESIDE)
    return float(value), {name: float(m) for name, m in metrics.items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_student_has_no_loss(prediction):
    """One whose f is where the teacher's 50 guided DDIM steps end, at any rate."""
    student = known.perfect(prediction, SD, known.ddim_chain(SD, 20))
    teacher = known.teacher(prediction, SD)
    value, metrics = measured(student, teacher, SD, prediction, (1.0, 4.0))
    assert value < 1e-8 and metrics["error_rms"] < 1e-6 and metrics["gap"] == 0
    assert 1 < metrics["target_rms"] < 4


def test_the_exact_trajectory_differs_by_what_a_ddim_step_is_off():
    """With f the exact trajectory's, the error is the factor that one step is off, by hand."""
    flow, rate, skip = known.flow(SD), 3.0, 20
    _, metrics = measured(
        known.perfect("v", SD, flow), known.teacher("v", SD), SD, "v", (rate, rate), 16384,
        skip=skip,
    )
    t = np.arange(skip - 1, 1000, skip)
    s = np.maximum(t - skip, 0)
    a, b = SD.alpha[:, None], SD.sigma[:, None]
    off = flow[s] * known.ddim_factor(a[t], b[t], a[s], b[s]) - flow[t]
    # z lies around alpha (mean + shift), the guided trajectory around alpha (mean + w shift).
    square = known.std(SD)[t] ** 2 + (a[t] * (1 - rate) * known.SHIFT) ** 2
    assert metrics["error_rms"] == pytest.approx(np.sqrt(np.mean(off**2 * square)), rel=0.03)
    assert metrics["error_rms"] < 0.01


def test_huber_counts_small_errors_squared_and_large_ones_by_size():
    """Both limits of sqrt(d^2 + c^2) - c, on a student that is off by d everywhere but at 0."""
    teacher = known.teacher("x0", SHORT)
    perfect = known.perfect("x0", SHORT, known.ddim_chain(SHORT, 50))

    def off(params, x_BHWC, t_B, cond):
        return perfect(params, x_BHWC, t_B, cond) + 0.1

    # One step from t=49 to 0, where f is the identity: the error is c_out d = 0.1.
    value, _ = measured(off, teacher, SHORT, "x0", (2.0, 2.0), 64, skip=50, huber=10.0)
    assert value == pytest.approx(0.1**2 / 2 / 10, rel=1e-2)
    value, _ = measured(off, teacher, SHORT, "x0", (2.0, 2.0), 64, skip=50, huber=1e-5)
    assert value == pytest.approx(0.1, rel=1e-3)


@pytest.fixture(scope="module")
def trained():
    """A student that is linear in x and w, at every timestep anew; the whole train step."""
    student, params = known.linear(SHORT)
    loss = latent_consistency.loss_fn(
        student, known.teacher("x0", SHORT), SHORT, "x0", known.examples, known.UNCOND,
        rates=(1.0, 4.0), skip=1,
    )
    state, metrics = known.train(
        loss, params, known.FROZEN, jax.random.key(1), steps=3000, rate=5e-3
    )
    return student, state, metrics


def test_a_small_student_reaches_the_consistency_function(trained):
    """Within 0.01, and so within 0.04 of the exact trajectories."""
    _, state, metrics = trained
    chain, alpha = known.ddim_chain(SHORT, 1)[1:], SHORT.alpha[1:, None]
    # f = alpha_0 m + R (z - alpha m), m = mean + w shift; c_out is 1 to a thousandth.
    around = SHORT.alpha[0] - chain * alpha
    np.testing.assert_allclose(state.ema["gain"][1:], chain, atol=0.01)
    np.testing.assert_allclose(state.ema["bias"][1:], around * known.MEAN, atol=0.01)
    np.testing.assert_allclose(state.ema["shift"][1:], around, atol=0.01)
    assert np.abs(chain - known.flow(SHORT)[1:]).max() < 0.03
    assert metrics["error_rms"][0] > 0.1 and metrics["error_rms"][-1] < 0.01
    assert 0 < metrics["gap"][50:].max() < 0.1


@pytest.mark.parametrize("rate", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_draws_the_right_distribution_in_one_step_and_in_four(trained, steps, rate):
    """Mean and spread of the guided Gaussian. Samples start from N(0, 1), where noisy data have the
    mean 0.05 m, and end at node 0, whose signal is 0.99."""
    student, state, _ = trained
    n = 20_000
    cond = {"shift": jnp.broadcast_to(jnp.float32(known.SHIFT), (n, 3)),
            "guidance": jnp.full(n, rate)}
    sample = sampler.make_sampler(student, known.SHAPE)
    table = solvers.make("lcm", SHORT, steps, "x0")
    x = sample(state.ema, table.padded(4), None, cond, None, jax.random.key(2), np.arange(n))
    x_BC = np.asarray(x)[:, 0, 0]
    mean = known.MEAN + rate * known.SHIFT
    np.testing.assert_allclose(x_BC.mean(0), mean, rtol=0.08, atol=0.03)
    # Node 0, where trajectories end, has a little noise left.
    np.testing.assert_allclose(x_BC.std(0), known.std(SHORT)[0], rtol=0.06)


def mixture_x0(x, alpha, sigma):
    """The exact denoiser of a mixture, under a trace."""
    w, mu, tau = (jnp.asarray(a[:, 0], jnp.float32) for a in (MIXTURE.w, MIXTURE.mu, MIXTURE.tau))
    std = jnp.sqrt((alpha[..., None] * tau) ** 2 + sigma[..., None] ** 2)
    z = (x[..., None] - alpha[..., None] * mu) / std
    p = jax.nn.softmax(jnp.log(w / std) - z**2 / 2)
    return jnp.sum(p * (mu + alpha[..., None] * tau**2 / std * z), -1)


def mixture_teacher(params, x_BHWC, t_B, cond):
    t_B = t_B.astype(int)
    alpha, sigma = (jnp.asarray(a, jnp.float32)[t_B, None] for a in (SHORT.alpha, SHORT.sigma))
    return mixture_x0(x_BHWC[:, 0, 0], alpha, sigma)[:, None, None]


def mixture_chain(z, t, skip):
    """Where the teacher's DDIM steps from t lead, in float64, by the tests' own mixture."""
    while t:
        s = max(t - skip, 0)
        x0 = MIXTURE.x0(z, SHORT.alpha[t], SHORT.sigma[t])
        eps = (z - SHORT.alpha[t] * x0) / SHORT.sigma[t]
        z, t = SHORT.alpha[s] * x0 + SHORT.sigma[s] * eps, s
    return z


def mixture_examples(batch, key):
    which_key, normal_key = jax.random.split(key)
    k = jax.random.choice(which_key, 3, batch.shape, p=jnp.asarray(MIXTURE.w[:, 0]))
    mu, tau = (jnp.asarray(a[:, 0], jnp.float32)[k] for a in (MIXTURE.mu, MIXTURE.tau))
    x0 = mu + tau * jax.random.normal(normal_key, batch.shape)
    return x0.reshape(-1, 1, 1, 1), {}


def mlp(params, x_BHWC, t_B, cond):
    """x0 of x by a hidden layer, another network at each timestep."""
    x = x_BHWC[:, 0, 0]
    node = (t_B.astype(int) + 1) // 10
    h = jnp.tanh(x * params["scale"][node] + params["shift"][node])
    out = jnp.sum(h * params["out"][node], -1, keepdims=True) + params["bias"][node]
    return (x * params["gain"][node] + out)[:, None, None]


def test_a_small_network_reaches_a_mixtures_consistency_function():
    """Trajectories bend there: DDIM's own chain within 0.06 rms, between the 2% quantiles."""
    key, nodes, width = jax.random.key(3), 6, 24
    shift = jnp.linspace(-3, 3, width) * jnp.ones((nodes, 1))
    params = {
        "scale": jnp.full((nodes, width), 2.0), "shift": shift,
        "out": jnp.zeros((nodes, width)), "bias": jnp.zeros((nodes, 1)),
        "gain": jnp.full((nodes, 1), 0.5),
    }
    loss = latent_consistency.loss_fn(
        mlp, mixture_teacher, SHORT, "x0", mixture_examples, {}, rates=(1.0, 1.0), skip=10,
        huber=0.03,
    )
    state, _ = known.train(loss, params, (), key, steps=2000, rate=5e-3, batch=512)
    near = Nodes.of(SHORT, "x0")
    u = np.linspace(0.02, 0.98, 49)
    for t in (9, 29, 49):
        z = MIXTURE.quantile(u, SHORT.alpha[t], SHORT.sigma[t])
        got = consistency.function(
            mlp, state.ema, jnp.float32(z).reshape(-1, 1, 1, 1), jnp.full(len(z), t), {}, near
        )[:, 0, 0, 0]
        error = np.asarray(got) - mixture_chain(z, t, 10)
        assert np.sqrt(np.mean(error**2)) < 0.06, t
        # The mean alone is far: a chain is no posterior mean.
        far = MIXTURE.x0(z, SHORT.alpha[t], SHORT.sigma[t]) - mixture_chain(z, t, 10)
        assert t == 9 or np.sqrt(np.mean(far**2)) > 0.3


@pytest.mark.parametrize(
    "options, says",
    [
        ({"skip": 30}, "skip=30"), ({"skip": 0}, "skip=0"), ({"huber": 0.0}, "huber=0.0"),
        ({"rates": (0.0, 4.0)}, "rates from 0.0 to 4.0"), ({"rates": (5.0, 4.0)}, "lower first"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(UserError, match=says):
        latent_consistency.loss_fn(
            mlp, mlp, SD, "v", known.examples, known.UNCOND, **options
        )
