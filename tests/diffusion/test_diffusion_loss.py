"""The loss in value and in distribution; validation points that only the index fixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import consistency, loss, parameterization, schedule
from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.diffusion.reparameterized import reparameterized
from ldm_scaling.errors import UserError

SD = schedule.get("sd")
SHAPE = (4, 4, 2)


def zero_network(params, x_BHWC, t_B, cond):
    return params * x_BHWC


def exact_network(prediction, x0_BHWC, sched=SD):
    """A network that knows x0 and so finds the noise."""

    def denoise(params, x_BHWC, t_B, cond):
        t_B = t_B.astype(int)
        alpha = jnp.asarray(sched.alpha, jnp.float32)[t_B][:, None, None, None]
        sigma = jnp.asarray(sched.sigma, jnp.float32)[t_B][:, None, None, None]
        eps_BHWC = (x_BHWC - alpha * x0_BHWC) / sigma
        return parameterization.target(prediction, x0_BHWC, eps_BHWC, alpha, sigma)

    return denoise


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
def test_a_network_that_knows_x0_has_no_loss(prediction):
    x0_BHWC = jax.random.normal(jax.random.key(0), (64, *SHAPE))
    denoise = exact_network(prediction, x0_BHWC)
    args = (denoise, None, x0_BHWC, {}, jax.random.key(1), SD, prediction)
    assert loss.diffusion_loss(*args).shape == (64,)
    assert float(loss.diffusion_loss(*args).max()) < 1e-8


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
def test_no_signal_is_needed_for_v_and_x0_at_pure_noise(prediction):
    zero = schedule.get("sd_zero_snr")
    x0_BHWC = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    args = (
        exact_network(prediction, x0_BHWC, zero), None, x0_BHWC, {},
        jnp.full(4, 999), jax.random.normal(jax.random.key(1), x0_BHWC.shape), zero, prediction,
    )
    if prediction == "epsilon":
        with pytest.raises(UserError, match="cannot tell x0 from pure noise"):
            loss.loss_at(*args)
    else:
        assert float(loss.loss_at(*args).max()) < 1e-10


def test_an_output_of_zero_costs_the_targets_power():
    # E eps^2 = 1, E x0^2 = 9, and v has alpha^2 E eps^2 + sigma^2 E x0^2 = 1 if E x0^2 is 1.
    for prediction, scale, expected in (("epsilon", 3, 1), ("x0", 3, 9), ("v", 1, 1)):
        x0_BHWC = scale * jax.random.normal(jax.random.key(0), (2048, *SHAPE))
        got = loss.diffusion_loss(
            zero_network, 0.0, x0_BHWC, {}, jax.random.key(1), SD, prediction
        )
        np.testing.assert_allclose(got.mean() / expected, 1, atol=0.03)  # 5 standard errors


def test_training_timesteps_are_uniform():
    seen = []

    def spy(params, x_BHWC, t_B, cond):
        seen.append(np.asarray(t_B))
        return x_BHWC

    n = 20_000
    loss.diffusion_loss(spy, None, jnp.zeros((n, 1, 1, 1)), {}, jax.random.key(3), SD, "v")
    (t,) = seen
    assert t.min() == 0 and t.max() == 999 and np.all(t == np.round(t))
    counts = np.histogram(t, bins=10, range=(0, 1000))[0]
    chi2 = np.sum((counts - n / 10) ** 2 / (n / 10))
    assert chi2 < 27.9  # 99.9% of chi-squared with 9 degrees of freedom


def test_low_precision_latents_and_outputs_are_computed_in_float32():
    x0_BHWC = jax.random.normal(jax.random.key(0), (8, *SHAPE)).astype(jnp.bfloat16)
    inputs = []

    def denoise(params, x_BHWC, t_B, cond):
        inputs.append(x_BHWC.dtype)
        return x_BHWC.astype(jnp.bfloat16)

    got = loss.diffusion_loss(denoise, None, x0_BHWC, {}, jax.random.key(1), SD, "epsilon")
    assert got.dtype == jnp.float32 and inputs == [jnp.float32]


def test_validation_depends_on_the_index_alone():
    n = 12
    x0 = jax.random.normal(jax.random.key(0), (n, *SHAPE))
    cond = {"context": jax.random.normal(jax.random.key(1), (n, 3, 2))}
    index = jnp.arange(100, 100 + n)

    def denoise(params, x_BHWC, t_B, cond):
        return x_BHWC * cond["context"].mean((1, 2))[:, None, None, None] + t_B[0] * 0

    @jax.jit
    def jitted(x0_BHWC, cond, index_B):
        return loss.validation_loss(denoise, None, x0_BHWC, cond, index_B, SD, "epsilon", draws=2)

    def run(order):
        return np.asarray(jitted(x0[order], {"context": cond["context"][order]}, index[order]))

    whole = run(np.arange(n))
    shuffled = np.random.default_rng(0).permutation(n)
    np.testing.assert_allclose(run(shuffled), whole[shuffled], rtol=1e-6)
    np.testing.assert_allclose(run(np.array([5])), whole[5:6], rtol=1e-6)


def test_another_seed_gives_other_validation_points():
    points = [loss.validation_points(jnp.arange(8), SHAPE, 1000, seed) for seed in (0, 1)]
    assert np.all(points[0][0] != points[1][0])
    assert not np.isclose(points[0][1], points[1][1]).all((1, 2, 3, 4)).any()


@pytest.mark.parametrize("seed", [0, 7])
def test_validation_timesteps_are_stratified_within_and_across_samples(seed):
    t_BK, eps = loss.validation_points(jnp.arange(40, 140), (8,), 1000, seed, draws=4)
    assert t_BK.shape == (100, 4) and eps.shape == (100, 4, 8)
    # One draw of each sample in each quarter.
    np.testing.assert_array_equal(t_BK // 250, np.tile(np.arange(4), (100, 1)))
    # One draw each: consecutive samples cover the timesteps far more evenly than chance.
    t_B1, _ = loss.validation_points(jnp.arange(40, 140), (8,), 1000, seed)
    counts = np.histogram(t_B1, bins=20, range=(0, 1000))[0]
    assert counts.min() >= 4 and counts.max() <= 6  # 5 each; chance gives 0..12
    # Independent noise everywhere.
    flat = np.asarray(eps).reshape(400, 8)
    assert len(np.unique(flat.round(5), axis=0)) == 400
    assert abs(flat.mean()) < 0.1 and abs(flat.std() - 1) < 0.06


def test_validation_timesteps_are_even_of_any_part_of_a_data_set():
    """Every 987th picture: at a Fibonacci number, multiples of the golden ratio stay in place."""
    index = 987 * jnp.arange(512)
    t_BK, eps = loss.validation_points(index, (8,), 1000, 0, place_B=jnp.arange(512))
    counts = np.histogram(t_BK, bins=20, range=(0, 1000))[0]
    assert counts.min() >= 24 and counts.max() <= 27  # 25.6 each
    # Noise is the picture's own, wherever it stands.
    _, same = loss.validation_points(index[::-1], (8,), 1000, 0, place_B=jnp.arange(512))
    np.testing.assert_array_equal(eps, same[::-1])


def test_validation_timesteps_stay_in_range():
    t_BK, _ = loss.validation_points(jnp.arange(100_000), (), 1000, 0, draws=1)
    assert int(t_BK.min()) == 0 and int(t_BK.max()) == 999


def test_validation_is_the_training_loss_on_average():
    x0 = 2 * jax.random.normal(jax.random.key(0), (4000, *SHAPE))
    train = loss.diffusion_loss(zero_network, 0.5, x0, {}, jax.random.key(1), SD, "epsilon")
    fixed = loss.validation_loss(
        zero_network, 0.5, x0, {}, jnp.arange(4000), SD, "epsilon"
    )
    error = np.hypot(train.std(), fixed.std()) / 4000**0.5
    assert abs(float(train.mean() - fixed.mean())) < 4 * error


def test_validation_points_that_cannot_be_are_refused():
    for index, more, told in (
        (jnp.arange(1), {"draws": 0}, "0 draws.*1 to 1000"),
        (jnp.arange(1), {"draws": 2.0}, "2.0 draws.*1 to 1000"),
        (jnp.arange(2), {}, r"index_B is \(2,\), but x0_BHWC \(1, 4"),
        ([0], {}, "index_B is list"), (jnp.arange(1), {"place_B": [0]}, "place_B is list"),
    ):
        with pytest.raises(UserError, match=told):
            loss.validation_loss(
                zero_network, 0.0, jnp.zeros((1, *SHAPE)), {}, index, SD, "epsilon", **more
            )


@pytest.mark.parametrize("output, given", [
    (lambda x: x[..., :1], r"\(2, 4, 4, 1\)"), (lambda x: x[:, :1, :1, :1], r"\(2, 1, 1, 1\)"),
    (lambda x: (x, x), "tuple"),
])
def test_an_output_that_would_be_broadcast_is_refused(output, given):
    x0_BHWC, t_B = jnp.zeros((2, *SHAPE)), jnp.arange(2)

    def denoise(params, x_BHWC, t_B, cond):
        return output(x_BHWC)

    told = rf"gives {given} for x_BHWC of shape \(2, 4, 4, 2\)"
    with pytest.raises(UserError, match=told):
        loss.diffusion_loss(denoise, None, x0_BHWC, {}, jax.random.key(0), SD, "v")
    with pytest.raises(UserError, match=told):
        reparameterized(denoise, SD, "v", "x0")(None, x0_BHWC, t_B, {})
    with pytest.raises(UserError, match=told):
        consistency.function(denoise, None, x0_BHWC, t_B, {}, Nodes.of(SD, "v"))
