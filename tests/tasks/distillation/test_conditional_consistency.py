"""CoDi where its answer is known: Gaussians, with a teacher's step and with its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.tasks.distillation import conditional_consistency
from ldm_scaling.training.task import Beside
from tests.tasks.distillation import known

SD = schedule.get("sd")
SHORT = schedule.sd(50, 0.017, 0.24)
BESIDE = Beside(known.FROZEN, known.FROZEN)


def once(told):
    """What is told its rate, told 1."""
    return lambda p, x, t, cond: told(p, x, t, cond | {"guidance": jnp.ones(len(x))})


def measured(student, prediction, schedule=SHORT, batch=8192, **options):
    loss = conditional_consistency.loss_fn(
        student, schedule, prediction, known.plain_examples, **options
    )
    value, metrics = known.run(loss, known.FROZEN, jnp.zeros(batch), jax.random.key(0), BESIDE)
    return float(value), {name: float(m) for name, m in metrics.items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_with_the_teachers_step_a_perfect_student_is_consistent(prediction):
    """And as far from the data as the ends of its trajectories are, by hand: x - f is linear in
    the data's deviation and in the noise."""
    chain = known.ddim_chain(SHORT, 1)
    student = once(known.perfect(prediction, SHORT, chain))
    value, metrics = measured(
        student, prediction, teacher=known.teacher(prediction, SHORT), skip=1, data_weight=2.0
    )
    assert metrics["consistency"] < 1e-10 and metrics["error_rms"] < 1e-5
    a, s = SHORT.alpha[:, None], SHORT.sigma[:, None]
    left = ((1 - chain * a) * known.SPREAD) ** 2 + (chain * s) ** 2
    left += ((1 - SHORT.alpha[0]) * known.MEAN) ** 2
    assert metrics["data"] == pytest.approx(left.mean(), rel=0.05)
    assert value == pytest.approx(metrics["consistency"] + 2.0 * metrics["data"])


@pytest.mark.parametrize("match", conditional_consistency.MATCHES)
@pytest.mark.parametrize("one_timestep", [False, True])
def test_its_own_step_keeps_both_x0_and_eps_where_the_data_are_one_point(match, one_timestep):
    """There trajectories are straight; only c_skip's trace is left, at the least noise."""
    frozen = (known.FROZEN[0], jnp.zeros(3))
    loss = conditional_consistency.loss_fn(
        known.teacher("v", SD), SD, "v",
        lambda batch, key: (jnp.broadcast_to(frozen[0], (len(batch), 1, 1, 3)),
                            {"shift": jnp.zeros((len(batch), 3))}),
        match=match, one_timestep=one_timestep,
    )
    # From the second step on: at t <= 20 the target is z itself, and eps is not.
    value, metrics = known.run(
        loss, frozen, jnp.zeros(512), jax.random.key(4), Beside((), frozen)
    )
    assert metrics["data"] < 1e-4
    assert metrics["consistency"] < (1e-4 if match == "x0" else 0.2)
    if one_timestep:
        assert metrics["consistency"] < 1e-8


@pytest.fixture(scope="module")
def trained():
    student, params = known.linear(SHORT)
    loss = conditional_consistency.loss_fn(student, SHORT, "x0", known.plain_examples, skip=1)
    state, _ = known.train(
        loss, params, (), jax.random.key(1), steps=2000, batch=1024, rate=5e-3, decay=0.995
    )
    return student, state


def test_a_small_student_reaches_its_fixed_point(trained):
    """Of each timestep's linear map, in closed form; the posterior mean is up to 0.09 away from it,
    the consistency function up to 1.2."""
    gain = known.codi_gain(SHORT, 1, 1.0)
    got = np.asarray(trained[1].ema["gain"])
    np.testing.assert_allclose(got[1:], gain[1:], atol=0.04)
    assert np.sqrt(np.mean((got[1:] - gain[1:]) ** 2)) < 0.01
    posterior = SHORT.alpha[:, None] * known.SPREAD**2 / known.std(SHORT) ** 2
    assert np.sqrt(np.mean((posterior[1:] - gain[1:]) ** 2)) > 0.02
    assert np.sqrt(np.mean((known.flow(SHORT)[1:] - gain[1:]) ** 2)) > 0.3


def moments(table, gain):
    """Mean and spread of what a student with this gain draws, a linear map of N(0, 1), by hand."""
    mean, spread = np.zeros(3), np.ones(3)
    for r, t in enumerate(table.t.astype(int)):
        slope = table.a[r] + table.b0[r] * gain[t]
        mean = slope * mean + table.b0[r] * (1 - gain[t] * SHORT.alpha[t]) * known.MEAN
        spread = np.abs(slope) * spread
    return mean, spread


@pytest.mark.parametrize("steps", [1, 4])
def test_it_draws_the_right_mean_and_the_spread_of_its_fixed_point(trained, steps):
    """The mean within 10%; of the spread one step has a fifth to a half and four steps four fifths,
    as the fixed point has it: with its own step CoDi gives up variance."""
    student, state = trained
    table, n = solvers.make("codi", SHORT, steps, "x0"), 20_000
    sample = sampler.make_sampler(student, known.SHAPE)
    cond = {"shift": jnp.zeros((n, 3))}
    x = sample(state.ema, table.padded(4), None, cond, None, jax.random.key(2), np.arange(n))
    x_BC = np.asarray(x)[:, 0, 0]
    mean, spread = moments(table, known.codi_gain(SHORT, 1, 1.0))
    np.testing.assert_allclose(x_BC.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(x_BC.std(0), spread, atol=0.05)
    np.testing.assert_allclose(x_BC.mean(0), known.MEAN, rtol=0.1, atol=0.03)
    share = spread / known.SPREAD
    assert np.all((0.75 < share) & (share < 0.85)) if steps == 4 else np.all(share < 0.5)


@pytest.mark.parametrize(
    "options, says",
    [({"skip": 0}, "skip=0"), ({"skip": 1000}, "skip=1000"), ({"match": "v"}, "match='v'"),
     ({"data_weight": -1.0}, "data_weight=-1.0")],
)
def test_bad_options(options, says):
    with pytest.raises(UserError, match=says):
        conditional_consistency.loss_fn(
            known.teacher("v", SD), SD, "v", known.plain_examples, **options
        )
