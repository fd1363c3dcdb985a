"""Progressive and guided distillation: two DDIM steps in one, two calls in one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid as grids
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.sampler import State
from ldm_scaling.tasks.distillation import guided, progressive
from ldm_scaling.training.task import Beside
from tests.sampling.analytic import row_of
from tests.tasks.distillation import known

SD = schedule.get("sd")
# A short schedule from little noise to much, for what is trained.
SHORT = schedule.sd(50, 0.017, 0.24)
BESIDE = Beside(known.FROZEN, known.FROZEN)


def trailing(steps, final="zero", schedule=SD):
    return grids.build("trailing", schedule, steps, final=final)


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
@pytest.mark.parametrize("final", grids.FINALS)
def test_the_target_is_two_ddim_steps(prediction, final):
    """With it, the student's one DDIM row ends where the sampler's own two rows end, and where two
    steps of the affine map by hand end, in float64; at all steps, the last one too."""
    N, n = 4, 64
    grid, teacher = trailing(2 * N, final), known.teacher(prediction, SD)
    table = solvers.make("ddim", SD, 2 * N, prediction, "trailing", final=final)
    half = solvers.make("ddim", SD, N, "x0", "trailing", final=final)
    np.testing.assert_array_equal(half.alpha, table.alpha[::2])
    nodes = progressive.nodes_of(grid, prediction)
    z = np.random.default_rng(0).standard_normal((n, *known.SHAPE)).astype(np.float32)
    cond = {"shift": jnp.zeros((n, 3))}
    teach = jax.jit(lambda x, t: teacher(known.FROZEN, x, t, cond))
    aim = jax.jit(
        lambda z, j: progressive.target(teacher, known.FROZEN, z, j, cond, grid, nodes)
    )
    for j in range(N):
        x0 = aim(jnp.asarray(z), jnp.full(n, j))
        state = State.start(z)
        one = sampler.update(row_of(half, j), state, np.asarray(x0), 0.0).x
        deviation = z.reshape(n, 3) - grid.alpha[2 * j] * known.MEAN
        for r in (2 * j, 2 * j + 1):
            F = teach(jnp.float32(state.x), jnp.full(n, float(table.t[r])))
            state = sampler.update(row_of(table, r), state, np.asarray(F), 0.0)
            deviation = deviation * known.ddim_factor(
                grid.alpha[r], grid.sigma[r], grid.alpha[r + 1], grid.sigma[r + 1]
            )
        by_hand = grid.alpha[2 * j + 2] * known.MEAN + deviation
        # eps over alpha at t=999: a rounding of 1e-7 is multiplied by up to 15.
        atol = 5e-6 if prediction == "epsilon" and j == 0 else 1e-6
        scale = np.abs(by_hand).max()
        np.testing.assert_allclose(one, state.x, atol=atol * scale)
        np.testing.assert_allclose(one.reshape(n, 3), by_hand, atol=atol * scale)


def test_the_weight_makes_it_the_larger_of_the_errors_in_x0_and_in_eps():
    """As the authors' code has it."""
    grid = trailing(8)
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    rng = np.random.default_rng(1)
    z, x0, got = rng.standard_normal((3, 8, 2, 2, 1))
    a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    eps, got_eps = (z - a * x0) / s, (z - a * got) / s
    mse = [np.mean((p - q) ** 2, (1, 2, 3)) for p, q in ((x0, got), (eps, got_eps))]
    ours = progressive.weighted(
        progressive.weights(alpha, sigma), jnp.asarray(x0), jnp.asarray(got), np.arange(8)
    )
    assert float(ours) == pytest.approx(np.maximum(*mse).mean(), rel=1e-5)


def test_halving_reaches_the_teachers_samples():
    """8 steps learn 16, 4 learn 8: the last draws what the teacher draws in 16, within 0.01."""
    student, params = known.linear(SHORT)
    network, frozen = known.teacher("x0", SHORT), known.FROZEN
    for steps in (8, 4):
        loss = progressive.loss_fn(
            student, network, trailing(2 * steps, schedule=SHORT), "x0", known.plain_examples
        )
        state, metrics = known.train(
            loss, params, frozen, jax.random.key(steps), steps=1000, rate=1e-2
        )
        assert metrics["error_rms"][0] > 0.05 and metrics["error_rms"][-1] < 0.005
        network, frozen, params = student, state.ema, state.ema
    n = 256
    drawn = []
    for denoise, p, steps in (
        (known.teacher("x0", SHORT), known.FROZEN, 16), (student, params, 4)
    ):
        table = solvers.make("ddim", SHORT, steps, "x0", "trailing", final="zero")
        sample = sampler.make_sampler(denoise, known.SHAPE)
        cond = {"shift": jnp.zeros((n, 3))}
        drawn.append(sample(p, table.padded(16), None, cond, None, jax.random.key(0), np.arange(n)))
    np.testing.assert_allclose(*drawn, atol=0.01)


def told(prediction):
    """A network told w that is the guided teacher's exact function."""
    teacher = known.teacher(prediction, SD)
    return lambda p, x, t, cond: teacher(
        p, x, t, {"shift": cond["shift"] * cond["guidance"][:, None]}
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_imitation_of_guidance_has_no_loss(prediction):
    loss = guided.loss_fn(
        told(prediction), known.teacher(prediction, SD), SD, prediction, known.examples,
        known.UNCOND,
    )
    given = (known.FROZEN, jnp.zeros(2048), jax.random.key(0), BESIDE)
    value, metrics = known.run(loss, *given)
    assert value < 1e-9 and metrics["error_rms"] < 5e-6 and metrics["target_rms"] > 1
    # Deaf to its rate it has a loss.
    deaf = guided.loss_fn(
        known.teacher(prediction, SD), known.teacher(prediction, SD), SD, prediction,
        known.examples, known.UNCOND,
    )
    assert known.run(deaf, *given)[0] > 0.1


def test_a_small_student_learns_to_guide_and_then_to_halve():
    """Stage 1 in one network, stage 2 with that as a teacher who is told the rate too."""
    student, params = known.linear(SHORT)
    one = guided.loss_fn(
        student, known.teacher("x0", SHORT), SHORT, "x0", known.examples, known.UNCOND,
        rates=(1.0, 4.0),
    )
    state, first = known.train(one, params, known.FROZEN, jax.random.key(0), steps=1500, rate=1e-2)
    assert first["error_rms"][0] > 0.3 and first["error_rms"][-1] < 0.01
    two = progressive.loss_fn(
        student, student, trailing(4, schedule=SHORT), "x0", known.examples,
        rates=(1.0, 4.0),
    )
    _, second = known.train(two, state.ema, state.ema, jax.random.key(1), steps=1000, rate=1e-2)
    assert second["error_rms"][0] > 0.05 and second["error_rms"][-1] < 0.005


@pytest.mark.parametrize("name", ["sd", "sd_zero_snr", "flow", "edm"])
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_what_is_off_in_v_or_flow_weighs_alike_at_every_timestep(name, prediction):
    """Though SNR goes up to a million. Of x0 it would be the first timestep alone."""
    noise = schedule.get(name)
    x, off = jnp.zeros((noise.num_timesteps, 1, 1, 1)), 1e-3
    nodes = Nodes.of(noise, prediction)
    i_B = np.arange(noise.num_timesteps)
    one, other = (nodes.x0(x, x + f, i_B) for f in (0.0, off))
    weight_T = progressive.weights(noise.alpha, noise.sigma)
    lost_T = [
        float(progressive.weighted(weight_T, one[t : t + 1], other[t : t + 1], i_B[t : t + 1]))
        for t in i_B[::111]
    ]
    assert 0.2 * off**2 < min(lost_T) and max(lost_T) < 2 * off**2
    progressive.check(prediction, noise)


def test_predictions_whose_first_timestep_would_be_the_whole_loss():
    for name, prediction in (("flow", "x0"), ("edm", "x0"), ("edm", "epsilon")):
        with pytest.raises(UserError, match="give v or flow for the students' prediction"):
            guided.loss_fn(
                None, None, schedule.get(name), prediction, known.examples, None, rates=None
            )
    for prediction in ("epsilon", "x0"):
        progressive.check(prediction, SD)


def test_grids_that_do_not_halve():
    network = known.teacher("v", SD)
    with pytest.raises(UserError, match="5 steps: halving"):
        progressive.loss_fn(network, network, trailing(5), "v", known.examples)
    with pytest.raises(UserError, match="rates from 0.5"):
        progressive.loss_fn(
            network, network, trailing(8), "v", known.examples, rates=(0.5, 2.0)
        )
