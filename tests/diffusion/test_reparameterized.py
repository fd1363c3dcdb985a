"""A network in other words: the same pictures and gradients, whatever it is said to predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import parameterization, schedule
from ldm_scaling.diffusion.reparameterized import reparameterized
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler, solvers

SD = schedule.get("sd")
SHAPE = (4, 4, 3)
PARAMS = jax.random.normal(jax.random.key(0), (3, 3)) / 2


def network(params, x_BHWC, t_B, cond):
    """Says eps, somehow."""
    return jnp.tanh(x_BHWC @ params) + 0.3 * jnp.sin(t_B / 200.0)[:, None, None, None]


def draw(denoise, prediction):
    table = solvers.make("ddim", SD, 5, prediction, "trailing")
    sample = sampler.make_sampler(denoise, SHAPE)
    return sample(PARAMS, table.padded(5), None, {}, None, jax.random.key(1), np.arange(6))


@pytest.mark.parametrize("want", ["v", "x0"])
def test_a_student_starts_as_its_teachers_exact_function(want):
    """Sampled in the new parameterisation it draws what the teacher draws in its own."""
    student = reparameterized(network, SD, "epsilon", want)
    teachers = draw(network, "epsilon")
    assert float(jnp.std(teachers)) > 0.5
    scale = float(jnp.abs(teachers).max())
    np.testing.assert_allclose(draw(student, want), teachers, atol=2e-5 * scale)


@pytest.mark.parametrize("have", parameterization.PREDICTIONS)
@pytest.mark.parametrize("want", parameterization.PREDICTIONS)
def test_there_and_back_is_the_network(have, want):
    t_B = jnp.array([5.0, 300.0, 620.5, 980.0])
    x_BHWC = jax.random.normal(jax.random.key(2), (4, *SHAPE))
    there = reparameterized(network, SD, have, want)
    back = reparameterized(there, SD, want, have)
    np.testing.assert_allclose(
        back(PARAMS, x_BHWC, t_B, {}), network(PARAMS, x_BHWC, t_B, {}), atol=3e-4
    )
    if have == want:
        assert there is network


def test_its_gradient_is_the_networks_times_what_it_is_multiplied_by():
    """v = (eps - sigma x) / alpha, from x = alpha x0 + sigma eps and v = alpha eps - sigma x0."""
    t, x_BHWC = 700, jax.random.normal(jax.random.key(3), (2, *SHAPE))

    def total(denoise):
        return jax.grad(lambda p: jnp.sum(denoise(p, x_BHWC, jnp.full(2, float(t)), {})))(PARAMS)

    student = reparameterized(network, SD, "epsilon", "v")
    np.testing.assert_allclose(total(student), total(network) / SD.alpha[t], rtol=2e-5, atol=1e-5)


def test_what_cannot_be_said_is_refused():
    zero = schedule.get("sd_zero_snr")
    for have, want in (("epsilon", "v"), ("v", "epsilon")):
        with pytest.raises(UserError, match="alpha = 0"):
            reparameterized(network, zero, have, want)
    given = (PARAMS, jnp.ones((1, *SHAPE)), jnp.array([999.0]), {})
    # There all is noise, and x0 = alpha x - sigma v is -v.
    out = reparameterized(network, zero, "v", "x0")(*given)
    np.testing.assert_allclose(out, -network(*given))
